# SPDX-License-Identifier: Apache-2.0
"""Shows how far a cold start has come while the attestation waits for it."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

_display = Display()
_LOOK_S = 10.0
_PATIENCE_S = 60.0


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
            look = self._look(arguments, task_vars)
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
                reason = f"it makes no progress for {stall:.0f} s"
                return self._look({**arguments, "give_up": reason}, task_vars)

    def _look(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        """Look once. One lost connection in a start of 45 minutes is not the end of it."""
        lost = time.monotonic()
        while True:
            try:
                seconds = 0.0 if arguments.get("give_up") else _LOOK_S
                return self._module({**arguments, "mode": "watch", "seconds": seconds}, task_vars)
            except AnsibleConnectionFailure:
                if time.monotonic() - lost > _PATIENCE_S:
                    raise
                time.sleep(5)
