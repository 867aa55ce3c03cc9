# SPDX-License-Identifier: Apache-2.0
"""Filters of the gateway role."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ansible puts module_utils on the path of modules only, not of plugins.
sys.path.append(str(Path(__file__).resolve().parents[2] / "module_utils"))

from glm_fleet.haproxy import node_endpoints


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them by name."""
        return {"node_endpoints": node_endpoints}
