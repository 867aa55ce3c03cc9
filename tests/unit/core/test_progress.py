# SPDX-License-Identifier: Apache-2.0
"""How far something has come, and when it is worth saying."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from glm_fleet.core import format
from glm_fleet.core.progress import Meter, Progress, ProgressFile, Reporter, bar, from_json, line

HALF = Progress("fetching", 237_000_000_000, 474_000_000_000, 1.2e9)


class Clock:
    """A clock that only goes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_sizes_and_times_are_for_people() -> None:
    sizes = [format.human_bytes(count) for count in (5, 1500, 475e9)]
    assert sizes == ["5 B", "1.5 kB", "475.0 GB"]
    assert [format.duration(each) for each in (9, 75, 3725)] == ["0:09", "1:15", "1:02:05"]


def test_a_line_has_bytes_rate_and_time_left() -> None:
    assert line(HALF) == "fetching: 237.0 GB of 474.0 GB (50%), 1.2 GB/s, 3:18 left"
    assert bar(HALF) == "[##########..........]  50% 237.0 GB/474.0 GB 1.2 GB/s 3:18 fetching"


def test_what_has_no_size_or_no_rate_promises_nothing() -> None:
    assert line(Progress("waiting", 0, 0, 0.0)) == "waiting"
    assert "left" not in line(Progress("fetching", 0, 10, 0.0))


def test_the_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    meter = Meter("hashing", 10_000, clock=clock)
    meter.start(4000)
    for _ in range(60):
        clock.now += 1
        meter.add(10)
    assert meter.read().rate == pytest.approx(10)
    assert meter.read().done == 4600
    for _ in range(60):
        clock.now += 1
        meter.add(50)
    assert meter.read().rate == pytest.approx(50)


def test_bytes_that_were_there_before_have_no_rate() -> None:
    clock = Clock()
    meter = Meter("fetching", 1000, clock=clock)
    meter.start(900)
    clock.now += 10
    assert meter.read().rate == 0
    assert meter.read().share == 0.9


def test_the_file_lives_as_long_as_the_work(tmp_path: Path) -> None:
    path = tmp_path / "run" / "progress.json"
    with ProgressFile(path, Meter("fetching", 10)) as meter:
        meter.add(3)
        for _ in range(200):
            if path.is_file():
                break
            time.sleep(0.01)
        seen = from_json(path.read_text())
    assert seen is not None
    assert (seen.what, seen.total) == ("fetching", 10)
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"what": "x"}'])
def test_a_file_that_says_nothing_is_no_progress(text: str) -> None:
    assert from_json(text) is None
    assert from_json(HALF.as_json()) == HALF


def test_a_log_gets_a_line_each_half_minute_and_one_for_each_phase() -> None:
    clock = Clock()
    reporter = Reporter("gpu01", terminal=False, clock=clock)
    said = []
    assert reporter.show(HALF) == ""
    clock.now += 3
    for _ in range(90):
        said.append(reporter.show(HALF))
        clock.now += 1
    assert [each for each in said if each] == [f"  gpu01: {line(HALF)}\n"] * 3
    assert (
        reporter.show(Progress("verifying", 0, 10, 0.0)) == "  gpu01: verifying: 0 B of 10 B (0%)\n"
    )
    assert reporter.end() == ""


def test_an_hour_is_not_a_hundred_lines() -> None:
    clock = Clock()
    reporter = Reporter("gpu01", terminal=False, clock=clock)
    said: list[float] = []
    for _ in range(3600):
        clock.now += 1
        if reporter.show(HALF):
            said.append(clock.now)
    assert 15 < len(said) < 30
    assert max(later - before for before, later in zip(said, said[1:])) <= 300


def test_a_terminal_gets_one_line_that_is_drawn_anew() -> None:
    clock = Clock()
    reporter = Reporter("gpu01", terminal=True, clock=clock)
    assert reporter.end() == ""
    clock.now += 3
    assert reporter.show(HALF).startswith("\r")
    assert reporter.show(HALF) == ""
    clock.now += 1
    assert not reporter.show(HALF).endswith("\n")
    assert reporter.end().startswith("\r")
