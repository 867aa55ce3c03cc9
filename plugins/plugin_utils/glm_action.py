# SPDX-License-Identifier: Apache-2.0
"""What every action plugin of glm-fleet stands on.

A plugin runs on the controller: it adds what only the controller knows (the inventory, this run,
a terminal), and lets the module of its name do the work on the host. It needs one line before it
can import this, because Ansible puts no folder of ours on the path of plugins:

    sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "module_utils/glm_fleet"

if str(PACKAGE.parent) not in sys.path:
    sys.path.insert(0, str(PACKAGE.parent))

from glm_fleet.core.errors import FleetError


class FleetAction(ActionBase):
    """Gives `act` the arguments and variables of the task; its `FleetError` fails the task."""

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what `act` returns, or its error in the words of a module."""
        begun: dict[str, Any] = super().run(tmp, task_vars)
        try:
            return {**begun, **self.act(dict(self._task.args), task_vars or {})}
        except FleetError as error:
            return {**begun, "failed": True, **error.as_fail()}

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Do the task; ``variables`` are those of its host."""
        raise NotImplementedError

    def module(
        self, name: str, arguments: dict[str, Any], variables: dict[str, Any], **options: Any
    ) -> dict[str, Any]:
        """Run a module on the task's host, or where the task is delegated to."""
        result: dict[str, Any] = self._execute_module(
            module_name=name, module_args=arguments, task_vars=variables, **options
        )
        return result


class ControllerAction(FleetAction):
    """A task that touches no host: it reads what others gathered, prints, writes reports."""

    TRANSFERS_FILES = False
    _requires_connection = False
