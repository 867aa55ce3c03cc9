# SPDX-License-Identifier: Apache-2.0
"""Says for the module of this name who asks, and whether the holder of the lock still lives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import FleetAction
from glm_fleet.fleet.claim import claim_of, is_dead

_display = Display()


class ActionModule(FleetAction):
    """Runs the module on the gateway, with the identity of this run."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result."""
        claim = claim_of(str(arguments.get("operation", "")))
        arguments["claim"] = claim
        if arguments.get("state") in ("free", "taken"):
            known = self.module("fleet_lock", {"state": "info"}, variables)
            if known.get("failed") or known.get("unreachable"):
                return known
            holder = known["roll"]
            running = holder.get("state") == "running" and holder.get("run") != claim["run"]
            takeover = str(arguments.get("takeover", False)).lower() in ("true", "yes", "1")
            if running and (takeover or is_dead(holder, claim)):
                arguments["replace"] = holder["run"]
                _display.display(
                    f"  The lock of {holder.get('operation')} by {holder.get('owner')} is taken "
                    f"over: {'on purpose' if takeover else 'its process is gone'}."
                )
        return self.module("fleet_lock", arguments, variables)
