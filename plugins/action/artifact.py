# SPDX-License-Identifier: Apache-2.0
"""Shows how far the hashing of an artifact has come."""

from __future__ import annotations

from typing import Any

from ansible.plugins.loader import action_loader


class ActionModule(action_loader.get("hub_snapshot", class_only=True)):  # type: ignore[misc]
    """Runs the module; one that reads a whole artifact is watched."""

    MODULE = "artifact"

    def is_long(self, args: dict[str, Any]) -> bool:
        """Tell whether these arguments ask for something long."""
        return args.get("state") == "verified" and bool(args.get("deep"))
