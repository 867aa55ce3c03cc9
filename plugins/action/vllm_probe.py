# SPDX-License-Identifier: Apache-2.0
"""Shows how far a cold start has come, and then its attestation."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_background import BackgroundAction
from glm_fleet.core.progress import Progress, Reporter

_display = Display()
_LOOK_S = 10.0
_PATIENCE_S = 60.0


class ActionModule(BackgroundAction):
    """Runs the module; with ``mode: attest`` watches the start first."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result."""
        if arguments.get("mode") == "attest":
            if self._task.check_mode:
                return {"changed": False, "skipped": True, "msg": "nothing to attest in check mode"}
            watched = self._watch(arguments, variables)
            if watched.get("failed") or not watched["watched"]["ready"]:
                return watched
            return self.watch("vllm_probe", arguments, variables)
        return self.module("vllm_probe", arguments, variables)

    def _watch(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        host = variables.get("inventory_hostname", "")
        stall = float(arguments.get("stall_timeout", 900))
        limit = float(arguments.get("start_timeout") or 0)
        begun = moved = time.monotonic()
        progress = ""
        # A start has no figures: a line for each of its phases, and one now and then.
        reporter = Reporter(host, terminal=False)
        while True:
            look = self._look(arguments, variables)
            if look.get("failed") or look["watched"]["ready"]:
                return look
            now = time.monotonic()
            watched = look["watched"]
            if watched["progress"] != progress:
                progress, moved = watched["progress"], now
            text = reporter.show(Progress(watched["phase"], 0, 0, 0.0))
            if text:
                _display.display(f"{text.rstrip()} ({now - begun:.0f} s)")
            if now - moved > stall:
                reason = f"it makes no progress for {stall:.0f} s"
                return self._look({**arguments, "give_up": reason}, variables)
            if limit and now - begun > limit:
                reason = f"it is not ready after {limit:.0f} s, and there is no more time for it"
                return self._look({**arguments, "give_up": reason}, variables)

    def _look(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Look once. One lost connection in a start of 45 minutes is not the end of it."""
        lost = time.monotonic()
        while True:
            try:
                seconds = 0.0 if arguments.get("give_up") else _LOOK_S
                return self.module(
                    "vllm_probe", {**arguments, "mode": "watch", "seconds": seconds}, variables
                )
            except AnsibleConnectionFailure:
                if time.monotonic() - lost > _PATIENCE_S:
                    raise
                time.sleep(5)
