# SPDX-License-Identifier: Apache-2.0
"""Weights in memory before a start, and never at the cost of who needs the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_fleet.serving import pages
from glm_fleet.serving.pages import (
    Memory,
    pages_in_words,
    read_memory,
    refusal,
    resident,
    shards,
    warm,
)

GIB = 1 << 30
MIB = 1 << 20
RELAXED = Memory(64 * GIB, 48 * GIB, 0.0)


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        with (folder / name).open("wb") as handle:
            handle.write(os.urandom(5 * MIB))
            handle.flush()
            os.fsync(handle.fileno())
    return folder


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "resident", lambda _, size: bytes(-(-size // 4096)))


def drop(folder: Path) -> bool:
    """Put the files out of memory; tell whether this file system does that."""
    gone = True
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            gone &= 1 not in resident(handle.fileno(), 5 * MIB)
    return gone


def test_what_the_disk_has_is_read_once(model: Path) -> None:
    if not drop(model):
        pytest.skip("this file system keeps its pages")
    first = warm(shards(model), rate=10 * GIB, reserve=GIB, memory=lambda: RELAXED)
    assert (first.read, first.cached, first.stopped) == (10 * MIB, 0, "")
    again = warm(shards(model), rate=10 * GIB, reserve=GIB, memory=lambda: RELAXED)
    assert (again.read, again.cached) == (0, 10 * MIB)


def test_only_what_is_missing_counts_as_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "resident", lambda _, size: b"\1\1\0" + b"\1" * (size // 4096 - 3))
    found = warm(shards(model), rate=GIB, reserve=GIB, memory=lambda: RELAXED)
    assert (found.read, found.cached) == (2 * 4096, 10 * MIB - 2 * 4096)


@pytest.mark.usefixtures("cold")
def test_the_rate_is_kept(model: Path) -> None:
    clock = Clock()
    found = warm(
        shards(model), rate=2 * MIB, reserve=GIB, memory=lambda: RELAXED, clock=clock,
        sleep=clock.sleep,
    )  # fmt: skip
    assert found.seconds == pytest.approx(5.0)
    assert found.as_dict()["bytes_per_second"] == 2 * MIB


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize(
    ("memory", "why"),
    [
        (Memory(64 * GIB, GIB + MIB, 0.0), "do not fit into"),
        (Memory(64 * GIB, 48 * GIB, 20.0), "wait for memory"),
    ],
)
def test_a_node_that_is_short_of_memory_reads_nothing(
    model: Path, memory: Memory, why: str
) -> None:
    found = warm(shards(model), rate=GIB, reserve=GIB, memory=lambda: memory)
    assert (found.read, found.cached) == (0, 0)
    assert why in found.stopped


@pytest.mark.usefixtures("cold")
def test_it_ends_when_memory_gets_short(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_LOOK", 4 * MIB)
    looks: Iterator[Memory] = iter([RELAXED, RELAXED, Memory(64 * GIB, 48 * GIB, 50.0)])
    found = warm(shards(model), rate=10 * GIB, reserve=GIB, memory=lambda: next(looks))
    # Asked before the first byte, after 4 MiB and after 9: the pieces are of 2, 2 and 1 MiB.
    assert found.read == 9 * MIB
    assert "wait for memory" in found.stopped


def test_a_person_reads_what_was_done() -> None:
    done = {"cached_bytes": 2 * 10**9, "read_bytes": 8 * 10**9, "bytes_per_second": 10**9}
    assert pages_in_words(done) == (
        "2.0 GB of the model were in memory, 8.0 GB were read before the drain; all of it takes "
        "this disk 10 s"
    )
    assert pages_in_words({"stopped": "it is short"}) == "not read ahead: it is short"
    assert pages_in_words({}) == ""


def test_the_nodes_own_words_are_read(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n")
    assert read_memory(tmp_path) == Memory(2 * MIB, MIB, 0.0)
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/memory").write_text("some avg10=12.50 avg60=1.00\nfull avg10=1.00\n")
    assert read_memory(tmp_path).pressure == 12.5
    assert "wait for memory" in refusal(read_memory(tmp_path), 0, 0)
    assert refusal(read_memory(), 0, 0) == "" or "wait" in refusal(read_memory(), 0, 0)
