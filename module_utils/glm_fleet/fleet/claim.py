# SPDX-License-Identifier: Apache-2.0
"""Who takes the fleet's lock: a run, named by a process that this controller can look for."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def claim_of(operation: str) -> dict[str, Any]:
    """Describe this run. Tasks run in forks of it, so its process is the parent of ours."""
    pid = os.getppid()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    start = start_of(pid)
    return {
        "run": f"{boot[:8]}-{pid}-{start}",
        "operation": operation,
        "owner": f"{getpass.getuser()}@{socket.gethostname()}",
        # Process ids mean something within one boot and one namespace only.
        "controller": f"{boot} {Path('/proc/self/ns/pid').readlink()}",
        "pid": pid,
        "pid_start": start,
    }


def start_of(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def is_dead(holder: Mapping[str, Any], claim: Mapping[str, Any]) -> bool:
    """Tell whether the holder ran on this very controller, and its process is gone."""
    if holder.get("controller") != claim["controller"]:
        return False
    pid = int(holder.get("pid") or 0)
    start = start_of(pid)
    # Where /proc hides other users' processes, only a signal tells that there is one.
    return start != holder.get("pid_start") and (start > 0 or not _exists(pid))


def _exists(pid: int) -> bool:
    """Tell whether a process of another user exists; one of ours would be seen in /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return False
