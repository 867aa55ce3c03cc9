# SPDX-License-Identifier: Apache-2.0
"""Accepts a node unless it was accepted as it is now: what the module `acceptance` does."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import FleetError
from ...core.files import write_atomically
from ...core.procfs import Process, list_processes
from ...core.runner import Runner
from ...core.systemd import unit_state
from ...release.installed import COMPLETE, is_complete
from ..prestart import wait_until_clear
from .record import FAILED, RECORD, Record, read_acceptance, why_needed
from .run import Settings, accept, fingerprint_now, read_report
from .table import sentences

_STOP_S = 1800.0
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Wish:
    """What is wanted of an acceptance.

    ``force`` repeats one that passed, ``stop`` ends an engine that runs (whoever says so has
    drained the node), ``only_look`` changes nothing. ``free_mib`` is what a free GPU may use.
    """

    unit: str = "glm-serving.service"
    force: bool = False
    stop: bool = False
    only_look: bool = False
    free_mib: int = 1024
    patience_s: float = _PATIENCE_S


def find_environment(root: Path, release: str) -> Path:
    """Return the environment to accept a node with.

    ``release`` names it; otherwise it is the active one, or the one that was staged last. Raises
    `FleetError` when there is none.
    """
    releases = root / "releases"
    current = root / "current"
    names = [release] if release else []
    if not release and current.is_symlink():
        names.append(current.readlink().name)
    if not release:
        built = sorted(
            releases.glob(f"*/{COMPLETE}"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        names += [path.parent.name for path in built]
    for name in names:
        if is_complete(releases / name, name):
            return releases / name
    raise FleetError(
        "There is no environment of a release to accept this node with",
        expected=f"{release or 'a release'} below {releases}",
        found="none that was built to its end",
        remedy="run site.yml, which stages the release and accepts the node",
    )


def ensure(
    settings: Settings,
    wish: Wish,
    run: Runner,
    *,
    say: Callable[[str], object] = lambda _: None,
    path: Path = RECORD,
    processes: Callable[[], list[Process]] = list_processes,
    kill: Callable[[int, int], None] = os.kill,
) -> dict[str, Any]:
    """Accept the node if that is needed; see RETURN of the module `acceptance`.

    Raises `FleetError` when an earlier engine holds the GPUs, or there are none.
    """
    record = read_acceptance(path)
    reasons = why_needed(record, fingerprint_now(settings, read_report(run)))
    if not reasons and wish.force:
        reasons = ["it was asked for"]
    if not reasons:
        return _result([], False, record)
    state = unit_state(run, wish.unit)["active_state"]
    engine = state not in ("inactive", "failed")
    busy = f"{wish.unit} is {state}" if engine and not wish.stop else ""
    if wish.only_look or busy:
        # Boards that did not pass may not go on, whatever was started on them since.
        failed = reasons == [FAILED]
        found = _result(reasons, False, record if failed else {})
        return {**found, "busy": busy, "passed": None, "did_not_pass": failed}
    if engine:
        run(["systemctl", "stop", wish.unit], timeout=_STOP_S)
    wait_until_clear(
        runner=run,
        processes=processes,
        # What is left of an engine is ended only where one was to be stopped.
        kill=kill if wish.stop else _leave,
        uid=pwd.getpwnam(settings.user).pw_uid,
        limit_mib=wish.free_mib,
        patience_s=wish.patience_s,
    )
    record = accept(settings, run, say=say)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return _result(reasons, True, record)


def _leave(_pid: int, _signal: int) -> None:
    """End nothing: a process that stays is named in the refusal."""


def unknown() -> dict[str, Any]:
    """Return what is known of a node whose release is not staged yet."""
    return {**_result([], False, {}), "busy": "its release is not staged yet"}


def _result(reasons: list[str], ran: bool, record: Record) -> dict[str, Any]:
    faults = record.get("faults", ())
    passed = record.get("passed")
    return {
        "needed": reasons,
        "ran": ran,
        "passed": passed,
        "did_not_pass": ran and not passed,
        "busy": "",
        "message": "" if passed is not False else refusal(record),
        # What ran before on these boards computes right.
        "of_release": bool(faults) and all(each["of_release"] for each in faults),
        "record": record,
    }


def refusal(record: Record) -> str:
    """Say why a node is not accepted, and what to do, in one line."""
    faults = sorted(record.get("faults", ()), key=lambda each: each["of_release"])
    remedies = dict.fromkeys(each["remedy"] for each in faults)
    said = FleetError(
        "This node did not pass its acceptance",
        expected="GPUs that compute right, and as fast as their board does",
        found=sentences(record),
        remedy=f"{'; '.join(remedies)}; then run again",
    )
    # A turn puts its own words behind it.
    return str(said).rstrip(".")
