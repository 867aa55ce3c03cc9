# SPDX-License-Identifier: Apache-2.0
"""Shows how far a cold start has come while the attestation waits for it."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

_display = Display()
_LOOK_S = 10.0


class ActionModule(ActionBase):
    """Runs the module; with ``mode: attest`` watches the start first."""

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the module's result."""
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        if arguments.get("mode") == "attest":
            if self._task.check_mode:
                return {"changed": False, "skipped": True, "msg": "nothing to attest in check mode"}
            watched = self._watch(arguments, task_vars)
            if watched.get("failed") or not watched["watched"]["ready"]:
                return watched
        return self._module(arguments, task_vars)

    def _module(self, args: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        result: dict[str, Any] = self._execute_module(
            module_name="vllm_probe", module_args=args, task_vars=task_vars
        )
        return result

    def _watch(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        host = (task_vars or {}).get("inventory_hostname", "")
        stall = float(arguments.get("stall_timeout", 900))
        begun = moved = time.monotonic()
        progress = said = ""
        while True:
            look = self._module({**arguments, "mode": "watch", "seconds": _LOOK_S}, task_vars)
            if look.get("failed") or look["watched"]["ready"]:
                return look
            now = time.monotonic()
            watched = look["watched"]
            if watched["progress"] != progress:
                progress, moved = watched["progress"], now
            line = f"  {host}: {watched['phase']}"
            if line != said or now - begun > _LOOK_S:
                said = line
                _display.display(f"{line} ({now - begun:.0f} s)")
            if now - moved > stall:
                return {
                    **look,
                    "failed": True,
                    "msg": (
                        f"The node makes no progress. Expected: a start that moves within "
                        f"{stall:.0f} s. Found: {watched['phase']}, then nothing. What to do: "
                        "read `journalctl -u glm-serving` on the node."
                    ),
                }
