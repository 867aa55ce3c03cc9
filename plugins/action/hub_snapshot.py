# SPDX-License-Identifier: Apache-2.0
"""Shows how far a long module has come: it runs in the background of the host meanwhile."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ansible.utils.color import ANSIBLE_COLOR
from ansible.utils.display import Display

# Ansible puts module_utils on the path of modules only, not of plugins.
_ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(_ROOT / "module_utils"), str(_ROOT / "plugins/plugin_utils")]

from glm_background import BackgroundAction
from glm_fleet.core.progress import Reporter

_display = Display()


class ActionModule(BackgroundAction):
    """Runs the module of its name; one that takes long is watched."""

    MODULE = "hub_snapshot"

    def is_long(self, args: dict[str, Any]) -> bool:
        """Tell whether these arguments ask for something long."""
        return bool(args.get("state", "present") != "found")

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the module's result."""
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        if self._task.check_mode or not self.is_long(args):
            at_once: dict[str, Any] = self._execute_module(
                module_name=self.MODULE, module_args=args, task_vars=task_vars
            )
            return at_once
        variables = task_vars or {}
        alone = len(variables.get("ansible_play_hosts", [])) == 1
        reporter = Reporter(
            str(variables.get("inventory_hostname", "")), terminal=bool(ANSIBLE_COLOR) and alone
        )
        work = self.start_work(self.MODULE, args, task_vars)
        try:
            while work.result is None:
                time.sleep(work.pause)
                if self.look_at(work, task_vars) is None and work.progress:
                    _say(reporter.show(work.progress))
        finally:
            _say(reporter.end())
        return work.result


def _say(text: str) -> None:
    if text:
        _display.display(text, newline=False)
