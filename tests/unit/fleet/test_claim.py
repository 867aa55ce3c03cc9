# SPDX-License-Identifier: Apache-2.0
"""Who asks for the fleet's lock, and does its holder live?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from glm_fleet.fleet import claim


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another run on this controller."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def holder(pid: int, **changed: Any) -> dict[str, Any]:
    mine = claim.claim_of("upgrade")
    return {**mine, "run": "other", "pid": pid, "pid_start": claim.start_of(pid), **changed}


def test_a_run_says_who_it_is() -> None:
    mine = claim.claim_of("upgrade")
    assert mine["operation"] == "upgrade"
    assert mine["pid"] == os.getppid()
    assert mine["pid_start"] == claim.start_of(os.getppid()) > 0
    assert "@" in mine["owner"]
    # Every task of a run is the same run.
    assert claim.claim_of("other")["run"] == mine["run"]


def test_a_living_run_is_not_dead(other: subprocess.Popen[bytes]) -> None:
    assert not claim.is_dead(holder(other.pid), claim.claim_of(""))


def test_a_killed_run_is_dead_even_before_anybody_waits_for_it(
    other: subprocess.Popen[bytes],
) -> None:
    left = holder(other.pid)
    other.kill()
    deadline = time.monotonic() + 5
    while not claim.is_dead(left, claim.claim_of("")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other.wait()
    assert claim.is_dead(left, claim.claim_of(""))


def test_a_process_that_got_the_number_of_the_run_later_is_another_one(
    other: subprocess.Popen[bytes],
) -> None:
    assert claim.is_dead(holder(other.pid, pid_start=1), claim.claim_of(""))


@pytest.mark.parametrize("controller", ["another boot", "", None])
def test_a_run_elsewhere_is_never_judged(controller: str | None) -> None:
    gone = holder(2**22 + 1, pid_start=5, controller=controller)
    assert not claim.is_dead(gone, claim.claim_of(""))


def test_a_holder_without_a_process_is_dead() -> None:
    assert claim.start_of(2**22 + 1) == 0
    assert claim.is_dead(holder(2**22 + 1, pid_start=5), claim.claim_of(""))


def test_a_run_that_proc_hides_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    left = holder(os.getppid())
    monkeypatch.setattr(claim, "start_of", lambda pid: 0)

    def not_yours(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", not_yours)
    assert not claim.is_dead(left, {"controller": left["controller"]})
