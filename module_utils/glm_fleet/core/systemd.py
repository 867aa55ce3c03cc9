# SPDX-License-Identifier: Apache-2.0
"""The state and the journal of a unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

from .decode import Count, Words
from .format import parse_count
from .runner import Runner

_TIMEOUT_S = 20.0
_WORDS = {
    "Id": "name",
    "LoadState": "load_state",
    "ActiveState": "active_state",
    "SubState": "sub_state",
    "Result": "result",
    "InvocationID": "invocation_id",
    "ActiveEnterTimestamp": "active_since",
}
_COUNTS = {"NRestarts": "n_restarts", "MainPID": "main_pid"}
# The pre-start checks of the serving unit, one for each start; its messages bear the invocation
# of the start that it checks.
PRESTART = "glm-prestart@*.service"


class UnitState(TypedDict, total=False):
    """What systemd says of a unit; {} where it was not asked."""

    name: Words
    load_state: Words
    active_state: Words
    sub_state: Words
    result: Words
    n_restarts: Count
    main_pid: Count
    invocation_id: Words
    active_since: Words


def read_units(runner: Runner, names: Sequence[str]) -> dict[str, UnitState]:
    """Ask systemd about units: {name: `unit_state` of it}."""
    states = [_parse(block) for block in _show(runner, names).split("\n\n")]
    return {state["name"]: state for state in states if state["name"]}


def unit_state(runner: Runner, unit: str) -> UnitState:
    """Return what systemd says of a unit: every key, '' and 0 where it says nothing."""
    return _parse(_show(runner, [unit]))


def _show(runner: Runner, names: Sequence[str]) -> str:
    command = ["systemctl", "show", f"--property={','.join((*_WORDS, *_COUNTS))}", *names]
    return runner(command, timeout=_TIMEOUT_S).stdout.strip()


def _parse(block: str) -> UnitState:
    told = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
    words = {ours: told.get(theirs, "") for theirs, ours in _WORDS.items()}
    counts = {ours: parse_count(told.get(theirs, "")) or 0 for theirs, ours in _COUNTS.items()}
    return cast(UnitState, {**words, **counts})


def journal(runner: Runner, invocation: str, most: int | None = None) -> list[str]:
    """Return the (last ``most``) messages of one start of the unit, oldest first."""
    if not invocation:
        return []
    answer = runner(
        [
            "journalctl",
            "--no-pager",
            "--output=cat",
            *([f"--lines={most}"] if most else []),
            f"_SYSTEMD_INVOCATION_ID={invocation}",
            "+",
            f"INVOCATION_ID={invocation}",
        ],
        check=False,
    )
    return answer.stdout.splitlines()


def last_words(runner: Runner, unit: str, most: int = 300) -> list[str]:
    """Return the unit's last messages over all its starts, oldest first.

    A start that died was followed by the next one, so the journal of one start is not enough.
    What the pre-start check of the unit said is among them.
    """
    units = [f"--unit={unit}", f"--unit={PRESTART}"]
    answer = runner(
        ["journalctl", "--no-pager", "--output=cat", *units, f"--lines={most}"],
        check=False,
    )
    return answer.stdout.splitlines()
