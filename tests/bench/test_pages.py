# SPDX-License-Identifier: Apache-2.0
"""How fast weights come into memory before a drain, beside what the disk itself gives."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from glm_fleet.serving.pages import Memory, resident, shards, warm

from .conftest import Record

SHARDS, SHARD_BYTES = 4, 256 * 1024 * 1024
ROUNDS = 3
RELAXED = Memory(1 << 40, 1 << 40, 0.0)


def drop(folder: Path) -> None:
    """Put the shards out of memory, or say that this file system does not do that."""
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert 1 not in resident(handle.fileno(), SHARD_BYTES), "pages stay: use a real disk"


def read_plainly(folder: Path) -> float:
    """Read the shards one after another, as `cat` does; return the seconds."""
    buffer = bytearray(4 * 1024 * 1024)
    begun = time.monotonic()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.monotonic() - begun


def bring_in(folder: Path) -> float:
    """Have the shards read before a drain; return the seconds."""
    found = warm(shards(folder), rate=1 << 40, reserve=0, memory=lambda: RELAXED)
    assert found.read + found.cached == SHARDS * SHARD_BYTES
    return found.seconds


def test_weights_come_in_at_the_rate_of_the_disk(tmp_path: Path, record: Record) -> None:
    for number in range(SHARDS):
        with (tmp_path / f"{number}.safetensors").open("wb") as handle:
            for _ in range(SHARD_BYTES >> 20):
                handle.write(os.urandom(1 << 20))
            handle.flush()
            os.fsync(handle.fileno())
    cold, warmed, rates = [], [], []
    for _ in range(ROUNDS):
        drop(tmp_path)
        plain = read_plainly(tmp_path)
        drop(tmp_path)
        cold.append(bring_in(tmp_path) / plain)
        warmed.append(bring_in(tmp_path) / plain)
        rates.append(SHARDS * SHARD_BYTES / plain / 1e6)
    context = (
        f"{SHARDS} shards of {SHARD_BYTES >> 20} MiB, a plain read at "
        f"{statistics.median(rates):.0f} MB/s, median of {ROUNDS}"
    )
    record("weights_before_drain_cold", statistics.median(cold), goal=1.2,
           unit="of a plain read", context=context)  # fmt: skip
    record("weights_before_drain_warm", statistics.median(warmed), goal=0.1,
           unit="of a plain read", context=context)  # fmt: skip
