# SPDX-License-Identifier: Apache-2.0
"""Who changes the fleet just now, and which nodes are held out of service.

Both are written down on the first gateway, where every run passes. The record of a roll
stays when it ends, so that a roll-back that was cut off goes on to the same targets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from ..core.files import exclusive, write_atomically

FOLDER = Path("/var/lib/glm-fleet")
RUNNING, DONE, STOPPED = "running", "done", "stopped"


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def ago(then: str, now: str) -> str:
    """Say how long ago an ISO time was, in words."""
    try:
        seconds = (datetime.fromisoformat(now) - datetime.fromisoformat(then)).total_seconds()
    except ValueError:
        return "some time"
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def taken_error(record: Mapping[str, Any], now: str) -> FleetError:
    """Make the error for a lock that somebody else has."""
    return FleetError(
        "Another run is changing this fleet",
        expected="no other roll",
        found=(
            f"{record.get('operation')} by {record.get('owner')}, process {record.get('pid')}, "
            f"began {ago(str(record.get('taken')), now)} ago, "
            f"last sign of life {ago(str(record.get('seen')), now)} ago"
        ),
        remedy="wait for it. If you know that it is dead, take the lock over on purpose with "
        "-e serve_takeover=true",
        details={"holder": dict(record)},
    )


class FleetLock:
    """The lock and the holds, in files below one folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._roll = folder / "roll.json"
        self._held = folder / "held.json"
        self._guard = folder / ".lock"

    def roll(self) -> dict[str, Any]:
        """Return the record of the last roll, {} if there was none.

        Shape: {run, operation, owner, controller, pid, pid_start, taken, seen, state, targets,
        backs}.
        """
        return _load(self._roll)

    def held(self) -> dict[str, dict[str, str]]:
        """Return {node: {by, at, reason}} of the nodes that are held out of service."""
        return {str(node): dict(each) for node, each in _load(self._held).items()}

    def take(self, claim: Mapping[str, Any], *, replace: str, now: str) -> dict[str, Any]:
        """Take the lock. ``replace`` names the run whose lock may be taken from it.

        Raises `FleetError` that says who has it.
        """
        with exclusive(self._guard):
            known = self.roll()
            if known.get("state") == RUNNING and known.get("run") not in (claim["run"], replace):
                raise taken_error(known, now)
            record = {**claim, "state": RUNNING, "taken": now, "seen": now}
            if known.get("run") == claim["run"]:
                record["taken"] = known["taken"]
            if not record.get("backs"):
                # A run that ends before it has a plan leaves what the last roll began with.
                record["backs"] = known.get("backs") or {}
            write_atomically(self._roll, json.dumps(record, indent=1) + "\n")
            return record

    def keep(self, run: str, *, now: str) -> None:
        """Give a sign of life; raises `FleetError` when somebody took the lock over."""
        with exclusive(self._guard):
            known = self.roll()
            if known.get("run") != run or known.get("state") != RUNNING:
                raise taken_error(known, now)
            write_atomically(self._roll, json.dumps({**known, "seen": now}, indent=1) + "\n")

    def end(self, run: str, state: str, *, now: str) -> None:
        """Give the lock back, if it is still ours."""
        with exclusive(self._guard):
            known = self.roll()
            if known.get("run") == run and known.get("state") == RUNNING:
                ended = {**known, "seen": now, "state": state}
                write_atomically(self._roll, json.dumps(ended, indent=1) + "\n")

    def hold(self, node: str, *, by: str, reason: str, now: str) -> bool:
        """Hold a node out of service; tell whether that is new."""
        with exclusive(self._guard):
            known = self.held()
            if known.get(node, {}).get("reason") == reason:
                return False
            known[node] = {"by": by, "at": now, "reason": reason}
            write_atomically(self._held, json.dumps(known, indent=1) + "\n")
            return True

    def unhold(self, node: str) -> bool:
        """End the hold of a node; tell whether there was one."""
        with exclusive(self._guard):
            known = self.held()
            if known.pop(node, None) is None:
                return False
            write_atomically(self._held, json.dumps(known, indent=1) + "\n")
            return True
