# SPDX-License-Identifier: Apache-2.0
"""Shows how far a rehearsal has come: see library/rehearsal.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_background import WatchedAction


class ActionModule(WatchedAction):
    """Runs the module, watched from its beginning."""

    MODULE = "rehearsal"

    def is_long(self, arguments: dict[str, Any]) -> bool:
        """Tell whether these arguments ask for something long: a rehearsal does."""
        return True
