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
from typing import Annotated, Any, Literal, TypedDict, TypeVar, cast

from ..core.decode import Size, read
from ..core.errors import FleetError
from ..core.files import exclusive, write_atomically

FOLDER = Path("/var/lib/glm-fleet")
RUNNING, DONE, STOPPED = "running", "done", "stopped"
_T = TypeVar("_T")


class _RollOptional(TypedDict, total=False):
    backs: dict[str, Any]
    targets: dict[str, Any]


class _Roll(_RollOptional):
    """The record of a roll, as far as it decides anything."""

    run: Annotated[str, Size(200)]
    state: Literal["running", "done", "stopped"]
    taken: str
    seen: str


class _Hold(TypedDict):
    by: str
    at: str
    reason: str


def _load(kind: type[_T], path: Path, none: _T, remedy: str) -> _T:
    """Return what a file of the gateway holds, ``none`` if there is no such file.

    A file that is damaged is no file that is absent: a lock would be given away that somebody has,
    and a node that is held would come back.
    """
    try:
        return read(kind, path, remedy=remedy)
    except FileNotFoundError:
        return none


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
        none: dict[str, Any] = {}
        return dict(
            _load(
                cast("type[dict[str, Any]]", _Roll),
                self._roll,
                none,
                "see that nobody's run is under way, then remove this file on the first gateway",
            )
        )

    def held(self) -> dict[str, dict[str, str]]:
        """Return {node: {by, at, reason}} of the nodes that are held out of service."""
        remedy = "remove this file on the first gateway, then drain again the nodes to be held"
        none: dict[str, _Hold] = {}
        held = _load(dict[str, _Hold], self._held, none, remedy)
        return {node: {**cast("dict[str, str]", each)} for node, each in held.items()}

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
