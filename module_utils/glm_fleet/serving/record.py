# SPDX-License-Identifier: Apache-2.0
"""The record that the pre-start check writes of each start, and what really runs."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..core.runner import Runner
from ..core.systemd import unit_state

RECORD = Path("/run/glm-fleet/serving.json")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, '' when there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def make_record(
    *, release_link: Path, model_link: Path, unit: Path, environment: Path, invocation: str
) -> dict[str, str]:
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
        text = (proc / str(main_pid) / "maps").read_text()
    except OSError:
        return ""
    found = _RELEASE_IN_MAPS.search(text)
    return found.group(1) if found else ""


def read_record(path: Path = RECORD) -> dict[str, str]:
    """Return what the pre-start check wrote down, {} if there is nothing."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_running(runner: Runner, unit: str, record: Path = RECORD) -> dict[str, Any]:
    """Say what runs: {active, invocation, record, unit}."""
    state = unit_state(runner, unit)
    return {
        "active": state["active_state"] == "active",
        "invocation": state["invocation_id"],
        "record": read_record(record),
        "unit": state,
    }
