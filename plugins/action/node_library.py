# SPDX-License-Identifier: Apache-2.0
"""Gives the module of this name the files that units on a node need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "module_utils"))

from glm_fleet.core.closure import ENTRY_POINTS, closure


class ActionModule(ActionBase):
    """Returns what the module returns."""

    _VALID_ARGS = frozenset({"dest"})

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run the module with the files beside its arguments."""
        super().run(tmp, task_vars)
        files = closure(ENTRY_POINTS, ROOT / "module_utils/glm_fleet")
        return dict(
            self._execute_module(
                module_args={**self._task.args, "files": files}, task_vars=task_vars
            )
        )
