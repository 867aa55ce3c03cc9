# SPDX-License-Identifier: Apache-2.0
"""Shows how far the acceptance of a node is, and its table: see library/acceptance.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_background import WatchedAction
from glm_fleet.core.decode import decode
from glm_fleet.node.acceptance.record import Record
from glm_fleet.node.acceptance.table import in_brief, render
from glm_terminal import plain, print_lines, show, width


class ActionModule(WatchedAction):
    """Runs the module, and shows what it found when it has run the trials."""

    MODULE = "acceptance"

    def is_long(self, arguments: dict[str, Any]) -> bool:
        """Three minutes, where they are needed."""
        return True

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result, and the arguments as ``asked``, for another time."""
        node = str(variables.get("inventory_hostname", ""))
        asked = dict(arguments)
        # Nearly always there is nothing to do, and that is known at once.
        found = self.module(self.MODULE, {**arguments, "look": True}, variables)
        needed = found.get("needed") and not found.get("busy")
        if needed and not found.get("failed") and not self._task.check_mode:
            found = super().act(arguments, variables)
        if found.get("ran"):
            record = decode(Record, plain(found["record"]), what=f"The acceptance of {node}")
            asks = str(arguments.get("force")).lower() in ("true", "yes", "1")
            if asks or record.get("faults") or record.get("notes"):
                show(render(record, node=node, width=width()))
            else:
                print_lines([in_brief(record, node=node)])
        # The figures stay on the node: a result that fails is printed as a whole.
        found.pop("record", None)
        return {**found, "asked": asked}
