# SPDX-License-Identifier: Apache-2.0
"""The rehearsals of a node: of which release on which GPUs, and how each ended."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from ..core.decode import Amount, Count, Words, read
from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.runner import Runner

REHEARSALS = Path("/var/lib/glm-fleet/rehearsals.json")
_MOST_RECORDS = 8


class Rehearsed(TypedDict):
    """A rehearsal of this node.

    The first five say of what, ``command`` being a digest of unit, environment and
    configuration; ``seconds`` is how long it took, ``time_s`` when, in seconds since 1970, and
    ``problem`` why it failed, '' if it passed.
    """

    gpus: Words
    driver: Words
    release: Words
    cuda_graphs: Words
    command: Words
    passed: bool
    problem: Words
    seconds: Amount
    time_s: Amount
    layers: Count
    of_layers: Count


_KEY = ("gpus", "driver", "release", "command")


class Hardware(TypedDict):
    """What a release runs on: ``gpus`` as ``8 x NVIDIA A100-SXM4-80GB``, and the driver."""

    gpus: str
    driver: str


def read_hardware(run: Runner) -> Hardware:
    """Ask the driver for the GPUs of this node; raises `FleetError`."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    rows = [line.rpartition(",") for line in run(query, timeout=60).stdout.splitlines()]
    names = [name.strip() for name, comma, _ in rows if comma]
    drivers = sorted({version.strip() for _, comma, version in rows if comma})
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return {"gpus": ", ".join(counted), "driver": ", ".join(drivers)}


def read_rehearsals(path: Path = REHEARSALS) -> list[Rehearsed]:
    """Return the last rehearsals of this node, newest last; [] where none is known."""
    try:
        return list(read(list[Rehearsed], path))
    except (FileNotFoundError, FleetError):
        return []


def note_rehearsal(done: Rehearsed, path: Path = REHEARSALS) -> None:
    """Remember a rehearsal; the one before of the same release on the same GPUs is replaced."""
    others = [each for each in read_rehearsals(path) if not _is_same(each, done)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([*others, done][-_MOST_RECORDS:], indent=1) + "\n")


def _is_same(one: Rehearsed, other: Rehearsed) -> bool:
    return all(one[key] == other[key] for key in _KEY)  # type: ignore[literal-required]


def known_to_pass(
    known: Sequence[Rehearsed], hardware: Hardware, release: str, command: str
) -> Rehearsed | None:
    """Return the rehearsal that passed of this very release on these GPUs, None without one.

    One that failed counts for nothing: what was in its way may be mended.
    """
    for each in reversed(known):
        same = (each["gpus"], each["driver"]) == (hardware["gpus"], hardware["driver"])
        if same and each["passed"] and (each["release"], each["command"]) == (release, command):
            return each
    return None


def in_words(done: Rehearsed) -> str:
    """Say what a rehearsal that passed gave."""
    of = f"{done['layers']} of {done['of_layers']} layers with random weights"
    return f"rehearsed in {done['seconds']:.0f} s ({of})"


def for_a_report(done: Rehearsed) -> str:
    """Say of which release a rehearsal was, when, and how it ended."""
    day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(min(done["time_s"], 4e9)))
    how = in_words(done) if done["passed"] else f"failed: {done['problem']}"
    return f"{done['release']}, {day} UTC: {how}"
