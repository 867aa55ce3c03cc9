# SPDX-License-Identifier: Apache-2.0
"""Says for the module of this name who asks, and whether the holder of the lock still lives."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path
from typing import Any

from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import FleetAction

_display = Display()


class ActionModule(FleetAction):
    """Runs the module on the gateway, with the identity of this run."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result."""
        claim = _claim(str(arguments.get("operation", "")))
        arguments["claim"] = claim
        if arguments.get("state") in ("free", "taken"):
            known = self.module("fleet_lock", {"state": "info"}, variables)
            if known.get("failed") or known.get("unreachable"):
                return known
            holder = known["roll"]
            running = holder.get("state") == "running" and holder.get("run") != claim["run"]
            takeover = str(arguments.get("takeover", False)).lower() in ("true", "yes", "1")
            if running and (takeover or _dead(holder, claim)):
                arguments["replace"] = holder["run"]
                _display.display(
                    f"  The lock of {holder.get('operation')} by {holder.get('owner')} is taken "
                    f"over: {'on purpose' if takeover else 'its process is gone'}."
                )
        return self.module("fleet_lock", arguments, variables)


def _claim(operation: str) -> dict[str, Any]:
    """Describe this run. Tasks run in forks of it, so its process is the parent of ours."""
    pid = os.getppid()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    start = _start_of(pid)
    return {
        "run": f"{boot[:8]}-{pid}-{start}",
        "operation": operation,
        "owner": f"{getpass.getuser()}@{socket.gethostname()}",
        # Process ids mean something within one boot and one namespace only.
        "controller": f"{boot} {Path('/proc/self/ns/pid').readlink()}",
        "pid": pid,
        "pid_start": start,
    }


def _start_of(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _dead(holder: dict[str, Any], claim: dict[str, Any]) -> bool:
    """Tell whether the holder ran on this very controller, and its process is gone."""
    if holder.get("controller") != claim["controller"]:
        return False
    pid = int(holder.get("pid") or 0)
    start = _start_of(pid)
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
