# SPDX-License-Identifier: Apache-2.0
"""The state and the journal of a unit."""

from __future__ import annotations

from typing import Any

from .runner import Runner


def unit_state(runner: Runner, unit: str) -> dict[str, Any]:
    """Return active_state, sub_state, n_restarts, main_pid, invocation_id and result."""
    names = {
        "ActiveState": "active_state",
        "SubState": "sub_state",
        "NRestarts": "n_restarts",
        "MainPID": "main_pid",
        "InvocationID": "invocation_id",
        "Result": "result",
        "ActiveEnterTimestamp": "started_at",
    }
    answer = runner(["systemctl", "show", unit, *(f"--property={key}" for key in names)])
    state: dict[str, Any] = dict.fromkeys(names.values(), "")
    for line in answer.stdout.splitlines():
        key, _, value = line.partition("=")
        if key in names:
            state[names[key]] = value
    for key in ("n_restarts", "main_pid"):
        state[key] = int(state[key]) if str(state[key]).isdigit() else 0
    return state


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
    """
    answer = runner(
        ["journalctl", "--no-pager", "--output=cat", f"--unit={unit}", f"--lines={most}"],
        check=False,
    )
    return answer.stdout.splitlines()
