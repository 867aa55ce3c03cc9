# SPDX-License-Identifier: Apache-2.0
"""Shows how far a fetch has come: see library/hub_snapshot.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_background import WatchedAction


class ActionModule(WatchedAction):
    """Runs the module; everything but a look is watched."""

    MODULE = "hub_snapshot"

    def is_long(self, arguments: dict[str, Any]) -> bool:
        """Tell whether these arguments ask for something long."""
        return bool(arguments.get("state", "present") != "found")
