# SPDX-License-Identifier: Apache-2.0
"""Shows how far the hashing of an artifact has come: see library/artifact.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_background import WatchedAction


class ActionModule(WatchedAction):
    """Runs the module; one that reads a whole artifact is watched."""

    MODULE = "artifact"

    def is_long(self, arguments: dict[str, Any]) -> bool:
        """Tell whether these arguments ask for something long."""
        deep = arguments.get("state") == "verified" and bool(arguments.get("deep"))
        return deep or arguments.get("state") == "proven"
