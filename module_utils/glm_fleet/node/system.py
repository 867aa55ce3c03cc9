# SPDX-License-Identifier: Apache-2.0
"""Clock, operating system, memory, disks, users and units of a host."""

from __future__ import annotations

import os
import platform
import pwd
import re
from pathlib import Path
from typing import Any

from ..core.runner import Runner
from .query import TIMEOUT_S, Host

_SYSTEM_UID_END = 1000


def read_clock(controller_epoch: float | None, host: Host) -> dict[str, float]:
    """Return {epoch_s, skew_s}; the skew contains the time that the question was under way."""
    now = host.now()
    if controller_epoch is None:
        return {"epoch_s": now}
    return {"epoch_s": now, "skew_s": round(now - controller_epoch, 3)}


def read_os(os_release: Path) -> dict[str, str]:
    """Return {id, version, name, kernel, arch} of the operating system."""
    pairs = (line.partition("=") for line in os_release.read_text().splitlines() if "=" in line)
    fields = {key: value.strip("\"'") for key, _, value in pairs}
    return {
        "id": fields.get("ID", ""),
        "version": fields.get("VERSION_ID", ""),
        "name": fields.get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        "arch": platform.machine(),
    }


def read_systemd_version(run: Runner) -> int | None:
    """Return the major version of systemd."""
    match = re.match(r"systemd (\d+)", run(["systemctl", "--version"], timeout=TIMEOUT_S).stdout)
    return int(match.group(1)) if match else None


def read_memory(meminfo: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), flags=re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def read_uptime(uptime: Path) -> float:
    """Return the seconds since the host was started."""
    return float(uptime.read_text().split()[0])


def read_disk(path: Path) -> dict[str, Any]:
    """Return the file system that holds ``path``, or would: {path, exists, mount, ...} in bytes.

    ``device`` is equal for paths that share one file system and so its free space.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    existing = existing.resolve()
    mount = existing
    while not os.path.ismount(mount):
        mount = mount.parent
    space = os.statvfs(existing)
    return {
        "path": str(path),
        "existing": str(existing),
        "mount": str(mount),
        "device": existing.stat().st_dev,
        "free_bytes": space.f_bavail * space.f_frsize,
        "total_bytes": space.f_blocks * space.f_frsize,
    }


def read_user(name: str) -> dict[str, Any]:
    """Return {exists, uid, system}: a system user has a uid below 1000."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return {"exists": False}
    return {"exists": True, "uid": entry.pw_uid, "system": entry.pw_uid < _SYSTEM_UID_END}
