# SPDX-License-Identifier: Apache-2.0
"""The record that the pre-start check writes of each start, and what really runs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, TypedDict

from ..core.decode import Words, read
from ..core.errors import FleetError
from ..core.runner import Runner
from ..core.systemd import unit_state

START_RECORD = Path("/run/glm-fleet/serving.json")


class StartRecord(TypedDict, total=False):
    """What the pre-start check writes down of a start; {} where nothing was started."""

    release: Words
    model: Words
    unit_sha256: Words
    environment_sha256: Words
    invocation: Words


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, '' when there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def make_record(
    *, release_link: Path, model_link: Path, unit: Path, environment: Path, invocation: str
) -> StartRecord:
    """Describe what starts now: names of release and model, digests of unit and environment."""

    def name(link: Path) -> str:
        return link.readlink().name if link.is_symlink() else ""

    return {
        "release": name(release_link),
        "model": name(model_link),
        "unit_sha256": digest(unit),
        "environment_sha256": digest(environment),
        "invocation": invocation,
    }


_RELEASE_IN_MAPS = re.compile(r"/releases/([^/\s]+)/lib/")


def running_release(main_pid: int, proc: Path = Path("/proc")) -> str:
    """Return the release whose libraries a process has mapped, '' if that cannot be seen.

    The kernel names files without symbolic links: this is the release that runs.
    """
    try:
        text = (proc / str(main_pid) / "maps").read_text(errors="replace")
    except OSError:
        return ""
    found = _RELEASE_IN_MAPS.search(text)
    return found.group(1) if found else ""


def read_record(path: Path = START_RECORD) -> StartRecord:
    """Return what the pre-start check wrote down, {} if there is nothing that can be used.

    Then nothing proves what runs, which is what everybody who asks takes {} for.
    """
    try:
        return read(StartRecord, path)
    except (FileNotFoundError, FleetError):
        return {}


def read_note(path: Path) -> dict[str, str]:
    """Return a note about a start, which its ``invocation`` names; {} as of `read_record`."""
    try:
        return read(dict[str, Words], path)
    except (FileNotFoundError, FleetError):
        return {}


def read_running(runner: Runner, unit: str, record: Path = START_RECORD) -> dict[str, Any]:
    """Say what runs: {active, invocation, record, unit}."""
    state = unit_state(runner, unit)
    return {
        "active": state["active_state"] == "active",
        "invocation": state["invocation_id"],
        "record": read_record(record),
        "unit": state,
    }
