# SPDX-License-Identifier: Apache-2.0
"""Modules that run on in the background of a host, and are watched from the controller."""

from __future__ import annotations

import shlex
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.utils.color import ANSIBLE_COLOR
from ansible.utils.display import Display
from glm_action import FleetAction
from glm_fleet.core.progress import Progress, Reporter, from_json

_LOOK_S = (0.3, 0.5, 1.0, 2.0)
_STATUS_EVERY_S = 15.0
_UNREACHABLE_S = 300.0
# The module gives a sign of life each second.
_SILENT_S = 120.0
_DAYS_S = 172_800
# What the background adds to the result of the module.
_ASYNC_KEYS = ("ansible_job_id", "results_file", "started", "finished", "stdout", "stderr",
               "stdout_lines", "stderr_lines", "erased")  # fmt: skip


@dataclass
class Work:
    """A module at work: where it says how far it is, and what it said last."""

    path: str
    limit: int
    job: dict[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    result: dict[str, Any] | None = None
    looks: int = 0
    begun: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.monotonic)
    alive: float = field(default_factory=time.monotonic)

    @property
    def pause(self) -> float:
        """Seconds until the next look: short at first, for what is over at once."""
        return _LOOK_S[min(self.looks, len(_LOOK_S) - 1)]


class BackgroundAction(FleetAction):
    """Starts modules that take the option ``progress_file``, and looks after them."""

    def start_work(
        self, module: str, args: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> Work:
        """Start a module; what ends at once has its result already."""
        path = f"/run/glm-fleet/progress-{uuid.uuid4().hex}.json"
        work = Work(path, int(args.get("time_limit") or _DAYS_S))
        # Only for this call: Ansible would wait in its own way for a task that says async.
        self._task.async_val = work.limit
        try:
            started: dict[str, Any] = self._execute_module(
                module_name=module,
                module_args={**args, "progress_file": path},
                task_vars=task_vars,
                wrap_async=True,
            )
        finally:
            self._task.async_val = 0
        if "ansible_job_id" not in started:
            work.result = started
            return work
        work.job = {
            "jid": started["ansible_job_id"],
            "_async_dir": self._remote_expand_user(
                self.get_shell_option("async_dir", default="~/.ansible_async")
            ),
        }
        return work

    def watch(
        self, module: str, arguments: dict[str, Any], variables: dict[str, Any]
    ) -> dict[str, Any]:
        """Run a module in the background, show how far it is, and return its result."""
        alone = len(variables.get("ansible_play_hosts", [])) == 1
        reporter = Reporter(
            str(variables.get("inventory_hostname", "")), terminal=bool(ANSIBLE_COLOR) and alone
        )
        work = self.start_work(module, arguments, variables)
        try:
            while work.result is None:
                time.sleep(work.pause)
                if self.look_at(work, variables) is None and work.progress:
                    _say(reporter.show(work.progress))
        finally:
            _say(reporter.end())
        return work.result

    def look_at(self, work: Work, task_vars: dict[str, Any] | None) -> dict[str, Any] | None:
        """Look once: None while it works, then the module's result."""
        if work.result is None:
            work.looks += 1
            status = self._status(work, task_vars)
            if status is not None:
                self._async_status({**work.job, "mode": "cleanup"}, task_vars)
                work.result = {key: each for key, each in status.items() if key not in _ASYNC_KEYS}
        return work.result

    def _status(self, work: Work, task_vars: dict[str, Any] | None) -> dict[str, Any] | None:
        now = time.monotonic()
        try:
            progress, age = self._read_progress(work.path)
            if progress and age < _SILENT_S:
                work.progress, work.alive = progress, now
            if progress is None or now - work.asked > _STATUS_EVERY_S:
                work.asked = now
                status = self._async_status(work.job, task_vars)
                if status.get("finished") or status.get("failed"):
                    return status
            work.seen = now
        except AnsibleConnectionFailure:
            # The work goes on without us.
            if now - work.seen > _UNREACHABLE_S:
                raise
            return None
        if now - work.alive > _SILENT_S:
            return {
                "failed": True,
                "msg": (
                    "The work on the host ended without a word. Expected: a sign of life "
                    f"within {_SILENT_S:.0f} s. Found: none. What to do: look for a kill "
                    "in `journalctl -k` of the host, then run again: it continues."
                ),
            }
        if now - work.begun > work.limit:
            return {
                "failed": True,
                "msg": (
                    f"The time is up. Expected: an end within {work.limit} s. Found: still at "
                    "work. What to do: run again, it continues."
                ),
            }
        return None

    def _async_status(
        self, args: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        result: dict[str, Any] = self._execute_module(
            module_name="ansible.legacy.async_status", module_args=args, task_vars=task_vars
        )
        return result

    def _read_progress(self, path: str) -> tuple[Progress | None, float]:
        """Return what the progress file says, and its age in seconds."""
        name = shlex.quote(path)
        look = f"cat {name} && echo && echo $(( $(date +%s) - $(stat -c %Y {name}) ))"
        answer = self._low_level_execute_command(f"{{ {look}; }} 2>/dev/null || true")
        text, _, age = answer.get("stdout", "").strip().rpartition("\n")
        return from_json(text), float(age) if age.lstrip("-").isdigit() else 0.0


class WatchedAction(BackgroundAction):
    """Runs the module ``MODULE``; a call of it that takes long is watched and shown."""

    MODULE = ""

    def is_long(self, arguments: dict[str, Any]) -> bool:
        """Tell whether these arguments ask for something long."""
        raise NotImplementedError

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result."""
        if self._task.check_mode or not self.is_long(arguments):
            return self.module(self.MODULE, arguments, variables)
        return self.watch(self.MODULE, arguments, variables)


def _say(text: str) -> None:
    if text:
        Display().display(text, newline=False)
