# SPDX-License-Identifier: Apache-2.0
"""The end of a run in ten lines: how it ended, each cause once, and what to do."""

from __future__ import annotations

from typing import Any

from glm_fleet.core.errors import FleetError
from glm_fleet.fleet.summary import MOST_LINES, EndedRun, Failure, summarize

FULL = str(FleetError("The disk is full", expected="5 GB", found="1 GB", remedy="free some room"))


def end(**given: Any) -> list[str]:
    run = {"changed": {"gpu01": 0, "gw01": 0}, "failed": [], "failures": [], **given}
    return [each.text for each in summarize(EndedRun("site.yml", 201.0, **run))]


def test_a_run_without_a_failure_is_one_line() -> None:
    assert end() == ["site.yml took 3:21: nothing changed."]
    some = {"gpu01": 3, "gpu02": 1, "gw01": 0}
    (line,) = end(changed=some)
    assert line == "site.yml took 3:21: 4 tasks changed something on 2 of 3 hosts."
    (line,) = end(changed=some, check_mode=True)
    assert line == "site.yml took 3:21: 4 tasks would change something on 2 of 3 hosts."


def test_what_several_hosts_share_is_told_once() -> None:
    names = [f"gpu{number:02}" for number in range(1, 9)]
    failures = [Failure(name, "Unpack the release", FULL) for name in names]
    assert end(failed=names, failures=failures) == [
        "site.yml took 3:21: nothing changed, and it stopped: gpu01, gpu02 and 6 others failed.",
        "  gpu01, gpu02 and 6 others: The disk is full. Expected: 5 GB. Found: 1 GB (Unpack the "
        "release)",
        "    What to do: free some room",
    ]


def test_the_last_failure_of_a_host_is_the_one_that_ended_it() -> None:
    failures = [Failure("gpu01", "Try", "rescued"), Failure("gpu01", "Rescue", "it got worse")]
    lines = end(failed=["gpu01"], failures=[*failures, Failure("gw01", "Try", "rescued")])
    assert lines[1] == "  gpu01: it got worse (Rescue)"
    assert lines[2].startswith("    What to do: run it again when this is mended")
    assert not any("rescued" in line for line in lines)


def test_there_are_never_more_than_ten_lines() -> None:
    names = [f"gpu{number:02}" for number in range(30)]
    failures = [Failure(name, "x", f"{name} has a cause\nof {'its own ' * 200}") for name in names]
    lines = end(failed=names, failures=failures)
    assert len(lines) == MOST_LINES
    assert lines[1] == "  gpu00: gpu00 has a cause, as told above (x)"
    assert lines[-1] == "  26 more causes stand above."
    assert all("\n" not in line and len(line) < 500 for line in lines)


def test_a_host_that_stood_for_all_is_not_blamed() -> None:
    lines = end(failed=["gpu01"], failures=[Failure("gpu01", "Look", "gpu02 is broken", once=True)])
    assert lines[0] == "site.yml took 3:21: nothing changed, and it stopped."
    assert lines[1] == "  gpu02 is broken (Look)"
