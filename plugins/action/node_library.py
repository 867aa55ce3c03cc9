# SPDX-License-Identifier: Apache-2.0
"""Gives the module of this name the files that units on a node need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import PACKAGE, FleetAction
from glm_fleet.core.closure import ENTRY_POINTS, closure


class ActionModule(FleetAction):
    """Returns what the module returns."""

    _VALID_ARGS = frozenset({"dest"})

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Run the module with the files beside its arguments."""
        files = closure(ENTRY_POINTS, PACKAGE)
        return self.module("node_library", {**arguments, "files": files}, variables)
