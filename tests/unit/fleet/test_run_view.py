# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it goes: what is worth a line, and that nothing is told twice."""

from __future__ import annotations

from glm_fleet.core.errors import FleetError
from glm_fleet.core.table import Line
from glm_fleet.fleet.run_view import RunView, has_no_room, named, title

NODES = [f"gpu{number:02}" for number in range(1, 17)]
FULL = str(FleetError("The disk is full", expected="5 GB", found="1 GB", remedy="free some room"))


class Clock:
    """A clock that only goes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def texts(lines: list[Line]) -> list[str]:
    return [each.text for each in lines]


def test_a_phase_in_which_nothing_changes_is_one_line() -> None:
    clock = Clock()
    view = RunView(120, clock=clock)
    shown: list[str] = []
    for phase in range(20):
        shown += texts(view.begin_phase(f"Phase {phase}"))
        for task in range(10):
            shown += texts(view.begin_task(f"Task {task}"))
        clock.now += 61
    shown += texts(view.begin_phase("Nobody takes part in this"))
    shown += texts(view.end())
    assert len(shown) == 20
    assert shown[:2] == [" 0:00  Phase 0", " 1:01  Phase 1"]


def test_a_change_names_its_task_and_hosts_once() -> None:
    view = RunView(120, clock=Clock())
    view.begin_task("Stage | Make the folders")
    for host in ("gpu02", "gpu01", "gpu02"):
        view.changes(host)
    assert texts(view.begin_task("Next")) == [
        "  changed: Stage | Make the folders: gpu01 and gpu02"
    ]
    for host in NODES:
        view.changes(host)
    assert texts(view.end()) == ["  changed: Next: gpu01, gpu02 and 14 others"]
    foretells = RunView(120, clock=Clock(), check_mode=True)
    foretells.begin_task("Restart")
    foretells.changes("gpu01")
    assert texts(foretells.end()) == ["  would change: Restart: gpu01"]


def test_a_difference_that_hosts_share_is_shown_once() -> None:
    view = RunView(120, clock=Clock())
    view.begin_task("Install the unit")
    for host in NODES[:3]:
        view.differs(host, "--- before\n+++ after\n-old\n+new\n")
        view.changes(host)
    assert texts(view.begin_task("Write settings")) == [
        "  changed: Install the unit: gpu01, gpu02 and gpu03",
        "--- before", "+++ after", "-old", "+new",
    ]  # fmt: skip
    for host, value in zip(NODES, "112"):
        view.differs(host, f"+{value}")
    lines = view.end()
    assert texts(lines) == ["  on gpu01 and gpu02:", "+1", "  on gpu03:", "+2"]
    assert lines[1].tone == "good"


def test_a_difference_commands_no_terminal() -> None:
    view = RunView(120, clock=Clock())
    view.begin_task("Write")
    view.differs("gpu01", "+\x1b]52;c;cm0gLXJm\x07")
    assert "\x1b" not in "".join(texts(view.end()))


def test_a_failure_is_named_at_once_and_its_figures_wait_for_the_end() -> None:
    view = RunView(120, clock=Clock())
    view.begin_task("Unpack")
    assert texts(view.fails("gpu02", FULL)) == ["  fatal: [gpu02]: Unpack: The disk is full"]
    assert view.fails("gpu01", FULL) == view.fails("gpu03", FULL) == []
    (whole,) = texts(view.fails("gpu04", "Gone. What to do: find it.", whole=True))
    assert whole == "  fatal: [gpu04]: Unpack: Gone. What to do: find it."
    assert texts(view.begin_task("Next")) == ["  as well on gpu01 and gpu03"]
    many = "It has 2 mistakes:\n  - one\n  - two\n. What to do: mend them."
    assert has_no_room(many) and has_no_room("x" * 500) and not has_no_room(FULL)
    assert texts(view.fails("", many, whole=True)) == [
        "  fatal: Next: It has 2 mistakes:", "      - one", "      - two",
        "    . What to do: mend them.",
    ]  # fmt: skip
    assert view.end() == []


def test_what_a_task_says_is_shown_as_it_is() -> None:
    view = RunView(120, clock=Clock())
    view.begin_task("Say")
    view.says("", "The fleet is back.")
    view.says("gpu02", "would be started")
    view.says("gpu01", "would be started")
    view.says("gw01", "client  keys\nalice   2\n")
    assert texts(view.end()) == [
        "  The fleet is back.",
        "  gpu01 and gpu02: would be started",
        "  gw01:", "  client  keys", "  alice   2",
    ]  # fmt: skip


def test_a_long_task_is_named_while_it_runs() -> None:
    view = RunView(120, clock=Clock())
    view.begin_task("Build the environment of the release")
    assert view.still_runs().text == "  Build the environment of the release ..."


def test_names_and_titles() -> None:
    assert (named([]), named(["a"]), named(["a", "b"])) == ("", "a", "a and b")
    assert named(list("abcd"), most=3) == "a, b and 2 others"
    assert title(FULL) == "The disk is full"
    assert title("no such file") == "no such file"
    assert len(title("its own " * 100)) < 300
    assert title("It has 2 mistakes:\n  - one") == "It has 2 mistakes"
