# SPDX-License-Identifier: Apache-2.0
"""Shows how far a long module has come: it runs in the background of the host meanwhile."""

from __future__ import annotations

import shlex
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.color import ANSIBLE_COLOR
from ansible.utils.display import Display

# Ansible puts module_utils on the path of modules only, not of plugins.
sys.path.append(str(Path(__file__).resolve().parents[2] / "module_utils"))

from glm_fleet.progress import Progress, Reporter, from_json

_display = Display()
_LOOK_S = (0.3, 0.5, 1.0, 2.0)
_STATUS_EVERY_S = 15.0
_UNREACHABLE_S = 300.0
# The module gives a sign of life each second.
_SILENT_S = 120.0
_DAYS_S = 172_800
# What the background adds to the result of the module.
_ASYNC_KEYS = ("ansible_job_id", "results_file", "started", "finished", "stdout", "stderr",
               "stdout_lines", "stderr_lines", "erased")  # fmt: skip


class ActionModule(ActionBase):
    """Runs the module of its name; one that takes long is watched."""

    MODULE = "hub_snapshot"

    def is_long(self, args: dict[str, Any]) -> bool:
        """Tell whether these arguments ask for something long."""
        return args.get("state", "present") != "found"

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the module's result."""
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        if self._task.check_mode or not self.is_long(args):
            return self._module(self.MODULE, args, task_vars)
        path = f"/run/glm-fleet/progress-{uuid.uuid4().hex}.json"
        limit = int(args.get("time_limit") or _DAYS_S)
        started = self._start({**args, "progress_file": path}, limit, task_vars)
        if "ansible_job_id" not in started:
            return started
        job = {
            "jid": started["ansible_job_id"],
            "_async_dir": self._remote_expand_user(
                self.get_shell_option("async_dir", default="~/.ansible_async")
            ),
        }
        result = self._watch(job, path, limit, task_vars)
        self._module(
            "ansible.legacy.async_status",
            {**job, "mode": "cleanup"},
            task_vars,
        )
        return {key: value for key, value in result.items() if key not in _ASYNC_KEYS}

    def _module(
        self, name: str, args: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        result: dict[str, Any] = self._execute_module(
            module_name=name, module_args=args, task_vars=task_vars
        )
        return result

    def _start(
        self, args: dict[str, Any], limit: int, task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        # Only for this call: Ansible would wait in its own way for a task that says async.
        self._task.async_val = limit
        try:
            result: dict[str, Any] = self._execute_module(
                module_name=self.MODULE, module_args=args, task_vars=task_vars, wrap_async=True
            )
        finally:
            self._task.async_val = 0
        return result

    def _watch(
        self, job: dict[str, Any], path: str, limit: int, task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        name = str((task_vars or {}).get("inventory_hostname", ""))
        alone = len((task_vars or {}).get("ansible_play_hosts", [])) == 1
        reporter = Reporter(name, terminal=bool(ANSIBLE_COLOR) and alone)
        begun = seen = asked = alive = time.monotonic()
        looks = 0
        try:
            while True:
                time.sleep(_LOOK_S[min(looks, len(_LOOK_S) - 1)])
                looks += 1
                now = time.monotonic()
                try:
                    progress, age = self._look(path)
                    if progress and age < _SILENT_S:
                        alive = now
                    if progress is None or now - asked > _STATUS_EVERY_S:
                        asked = now
                        status = self._module("ansible.legacy.async_status", job, task_vars)
                        if status.get("finished") or status.get("failed"):
                            return status
                    seen = now
                except AnsibleConnectionFailure:
                    # The work goes on without us.
                    if now - seen > _UNREACHABLE_S:
                        raise
                    continue
                if now - alive > _SILENT_S:
                    return {
                        "failed": True,
                        "msg": (
                            "The work on the host ended without a word. Expected: a sign of life "
                            f"within {_SILENT_S:.0f} s. Found: none. What to do: look for a kill "
                            "in `journalctl -k` of the host, then run again: it continues."
                        ),
                    }
                if now - begun > limit:
                    return {
                        "failed": True,
                        "msg": (
                            f"The time is up. Expected: an end within {limit} s. Found: still at "
                            "work. What to do: run again, it continues."
                        ),
                    }
                text = reporter.show(progress) if progress else ""
                if text:
                    _display.display(text, newline=False)
        finally:
            text = reporter.end()
            if text:
                _display.display(text, newline=False)

    def _look(self, path: str) -> tuple[Progress | None, float]:
        """Return what the progress file says, and its age in seconds."""
        name = shlex.quote(path)
        look = f"cat {name} && echo && echo $(( $(date +%s) - $(stat -c %Y {name}) ))"
        answer = self._low_level_execute_command(f"{{ {look}; }} 2>/dev/null || true")
        text, _, age = answer.get("stdout", "").strip().rpartition("\n")
        return from_json(text), float(age) if age.lstrip("-").isdigit() else 0.0
