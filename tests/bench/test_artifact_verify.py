# SPDX-License-Identifier: Apache-2.0
"""What verifying an artifact costs, against the system's own tools on all cores."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from glm_fleet.artifact.hashes import find_damage
from glm_fleet.artifact.store import Store

from .conftest import Record

ROUNDS = 3
SHARDS = 12
SHARD_BYTES = 32 * 1024 * 1024


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def test_verification_against_the_tools_of_the_system(tmp_path: Path, record: Record) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(SHARDS):
        noise = random.Random(number).randbytes(SHARD_BYTES)  # noqa: S311 - the same each time
        (source / f"model-{number:05d}.safetensors").write_bytes(noise)
    (source / "config.json").write_text("{}\n")
    store = Store(tmp_path / "artifacts")
    manifest = store.adopt(source, kind="model", slug="noise", provenance={})
    folder = store.published_path("model", manifest.id)
    names = "".join(f"{entry.path}\n" for entry in manifest.files)
    cores = len(os.sched_getaffinity(0))

    def tool(*words: str) -> None:
        subprocess.run(
            ["xargs", "-n", "1", "-P", str(cores), *words],
            input=names,
            text=True,
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def ours() -> None:
        assert find_damage(folder, manifest, deep=True) == []

    peers = {"sha256sum": ("sha256sum",), "openssl": ("openssl", "sha256")}
    ratios: dict[str, list[float]] = {
        name: [] for name, words in peers.items() if shutil.which(words[0])
    }
    for number in range(ROUNDS):
        for name, rates in ratios.items():
            # In turns, so that neither always runs first. The files are in memory for both.
            if number % 2:
                own = seconds(ours)
                other = seconds(lambda name=name: tool(*peers[name]))
            else:
                other = seconds(lambda name=name: tool(*peers[name]))
                own = seconds(ours)
            rates.append(own / other)
    for name, rates in ratios.items():
        context = (
            f"time to verify {manifest.bytes / 1e6:.0f} MB in {len(manifest.files)} files from "
            f"memory, xargs -P{cores} {name}, median of {ROUNDS}"
        )
        goal = 1 / 0.9
        value = statistics.median(rates)
        record(f"artifact_verify_{name}", value, goal=goal, unit=f"times {name}", context=context)
