# SPDX-License-Identifier: Apache-2.0
"""Gives the module of this name the files that units on a node need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import PACKAGE, FleetAction
from glm_fleet.core.closure import ENTRY_POINTS, closure
from glm_fleet.core.files import hashes_of


class ActionModule(FleetAction):
    """Returns what the module returns."""

    _VALID_ARGS = frozenset({"dest"})

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Send the files, but only where the module says that some differ."""
        files = closure(ENTRY_POINTS, PACKAGE)
        arguments = {**arguments, "hashes": hashes_of(files)}
        found = self.module("node_library", arguments, variables)
        if self._task.check_mode or not found.get("changed"):
            return found
        return self.module("node_library", {**arguments, "files": files}, variables)
