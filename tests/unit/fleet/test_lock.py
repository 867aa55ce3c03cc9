# SPDX-License-Identifier: Apache-2.0
"""The fleet's lock: one run at a time, who it is, and when it may be taken over."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.fleet.lock import DONE, RUNNING, STOPPED, FleetLock, ago, taken_error

NOON = "2026-11-22T12:00:00+00:00"
LATER = "2026-11-22T12:05:00+00:00"
EVENING = "2026-11-22T18:00:00+00:00"


def claim(run: str, **changed: Any) -> dict[str, Any]:
    return {
        "run": run,
        "operation": "upgrade",
        "owner": f"{run}@ctl",
        "controller": "boot ns",
        "pid": 7,
        "pid_start": 70,
        "targets": {"gpu01": "abc"},
        **changed,
    }


@pytest.fixture
def lock(tmp_path: Path) -> FleetLock:
    return FleetLock(tmp_path / "glm-fleet")


def take(lock: FleetLock, run: str, *, replace: str = "", now: str = NOON) -> dict[str, Any]:
    return lock.take(claim(run), replace=replace, now=now)


def test_a_fleet_that_nobody_ever_changed_is_free(lock: FleetLock) -> None:
    assert lock.roll() == {}
    assert lock.held() == {}


def test_the_second_run_is_told_who_has_the_lock(lock: FleetLock) -> None:
    take(lock, "first")
    lock.keep("first", now=LATER)
    with pytest.raises(FleetError) as error:
        take(lock, "second", now=EVENING)
    assert (
        "upgrade by first@ctl, process 7, began 6 hours ago, last sign of life 6 hours ago"
        in error.value.found
    )
    assert "serve_takeover=true" in error.value.remedy
    assert error.value.details["holder"]["run"] == "first"
    assert lock.roll()["run"] == "first"


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (NOON, NOON, "0 s"),
        (NOON, "2026-11-22T12:01:59+00:00", "119 s"),
        (NOON, "2026-11-22T12:02:00+00:00", "2 min"),
        (NOON, "2026-11-22T13:30:00+00:00", "90 min"),
        (NOON, "2026-11-22T14:00:00+00:00", "2 hours"),
        (NOON, "2026-11-25T12:00:00+00:00", "3 days"),
        (LATER, NOON, "0 s"),
        ("", NOON, "some time"),
        ("None", NOON, "some time"),
    ],
)
def test_ages_are_said_in_words(then: str, now: str, said: str) -> None:
    assert ago(then, now) == said


def test_a_record_with_gaps_still_makes_a_sentence() -> None:
    assert "began some time ago" in str(taken_error({}, NOON))


def test_taking_again_keeps_the_time_it_was_taken(lock: FleetLock) -> None:
    take(lock, "first")
    record = lock.take(claim("first", targets={"gpu02": "x"}), replace="", now=LATER)
    assert (record["taken"], record["seen"], record["targets"]) == (NOON, LATER, {"gpu02": "x"})
    assert lock.roll() == record


@pytest.mark.parametrize("state", [DONE, STOPPED])
def test_a_lock_that_was_given_back_is_free_and_its_record_stays(
    lock: FleetLock, state: str
) -> None:
    take(lock, "first")
    lock.end("first", state, now=LATER)
    assert lock.roll()["state"] == state
    assert lock.roll()["targets"] == {"gpu01": "abc"}
    assert take(lock, "second", now=EVENING)["taken"] == EVENING


def test_a_lock_is_taken_only_from_the_run_that_was_named(lock: FleetLock) -> None:
    take(lock, "first")
    with pytest.raises(FleetError):
        take(lock, "second", replace="third")
    assert take(lock, "second", replace="first", now=LATER)["taken"] == LATER
    # Who lost it notices, and cannot give away what is not its own.
    with pytest.raises(FleetError, match="second@ctl"):
        lock.keep("first", now=LATER)
    lock.end("first", STOPPED, now=LATER)
    assert (lock.roll()["run"], lock.roll()["state"]) == ("second", RUNNING)


def test_a_lock_that_was_given_back_cannot_be_kept(lock: FleetLock) -> None:
    take(lock, "first")
    lock.end("first", DONE, now=LATER)
    with pytest.raises(FleetError):
        lock.keep("first", now=LATER)
    lock.end("first", STOPPED, now=LATER)
    assert lock.roll()["state"] == DONE


def test_a_run_without_a_plan_does_not_forget_where_the_last_roll_began(lock: FleetLock) -> None:
    lock.take(claim("first", backs={"gpu01": "old"}), replace="", now=NOON)
    lock.end("first", STOPPED, now=LATER)
    assert take(lock, "second")["backs"] == {"gpu01": "old"}
    record = lock.take(claim("second", backs={"gpu01": "new"}), replace="", now=LATER)
    assert record["backs"] == {"gpu01": "new"}


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"run": 7, "state": "running"}', '{"run": "a", "state": "?"}']
)
def test_a_damaged_record_gives_no_lock_away(lock: FleetLock, tmp_path: Path, damage: str) -> None:
    take(lock, "first")
    path = tmp_path / "glm-fleet/roll.json"
    path.write_text(damage)
    for attempt in (
        lambda: take(lock, "second"),
        lambda: lock.keep("first", now=NOON),
        lambda: lock.end("first", DONE, now=NOON),
        lock.roll,
    ):
        with pytest.raises(FleetError, match=r"roll\.json cannot be used.*remove this file"):
            attempt()
    assert path.read_text() == damage
    path.unlink()
    assert take(lock, "second")["run"] == "second"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"gpu01": 7}', '{"gpu01": {"by": "me"}}'])
def test_a_damaged_hold_lets_no_node_back(lock: FleetLock, tmp_path: Path, damage: str) -> None:
    lock.hold("gpu01", by="me", reason="board", now=NOON)
    path = tmp_path / "glm-fleet/held.json"
    path.write_text(damage)
    for attempt in (
        lock.held,
        lambda: lock.unhold("gpu01"),
        lambda: lock.hold("gpu02", by="me", reason="x", now=NOON),
    ):
        with pytest.raises(FleetError, match=r"held\.json cannot be used.*drain again"):
            attempt()
    assert path.read_text() == damage


def _race(folder: str, run: str) -> str:
    """In a process of its own: take the lock, or give the owner who has it."""
    try:
        FleetLock(Path(folder)).take(claim(run), replace="", now=NOON)
    except FleetError as error:
        return str(error.details["holder"]["run"])
    return run


def test_of_many_takers_one_wins_and_all_agree_who(tmp_path: Path) -> None:
    names = [f"run{number}" for number in range(8)]
    with ProcessPoolExecutor(4) as pool:
        winners = list(pool.map(_race, [str(tmp_path)] * len(names), names))
    assert len(set(winners)) == 1
    assert FleetLock(tmp_path).roll()["run"] == winners[0]


def test_nodes_are_held_with_a_name_and_a_reason(lock: FleetLock) -> None:
    assert lock.hold("gpu01", by="first@ctl", reason="fans", now=NOON)
    assert not lock.hold("gpu01", by="second@ctl", reason="fans", now=LATER)
    assert lock.held() == {"gpu01": {"by": "first@ctl", "at": NOON, "reason": "fans"}}
    assert lock.hold("gpu01", by="second@ctl", reason="disk", now=LATER)
    assert lock.hold("gpu02", by="second@ctl", reason="", now=LATER)
    assert lock.unhold("gpu01")
    assert not lock.unhold("gpu01")
    assert list(lock.held()) == ["gpu02"]


def test_holds_and_the_lock_leave_each_other_alone(lock: FleetLock) -> None:
    take(lock, "first")
    lock.hold("gpu01", by="first@ctl", reason="fans", now=NOON)
    lock.end("first", DONE, now=LATER)
    assert list(lock.held()) == ["gpu01"]
