# SPDX-License-Identifier: Apache-2.0
"""Says at the end of a run how it ended, in ten lines at most: see fleet/summary.py."""

from __future__ import annotations

DOCUMENTATION = r"""
name: glm_summary
type: notification
short_description: The end of a run in ten lines
description:
  - Says at the end of every run how long it took and on how many hosts something changed. Where
    hosts failed it names each cause once, with the hosts that share it and what to do.
author: glm-fleet contributors (@glm-fleet)
"""

import sys
import time
from pathlib import Path
from typing import Any

from ansible import context
from ansible.plugins.callback import CallbackBase

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

import glm_action as glm_action  # makes the logic importable
from glm_fleet.fleet.summary import EndedRun, Failure, summarize
from glm_terminal import show


def words_of(result: Any) -> str:
    """Return what a failed task says; of a loop, what its first failed item says."""
    items = result.get("results")
    for each in items if isinstance(items, list) else ():
        if isinstance(each, dict) and (each.get("failed") or each.get("unreachable")):
            return str(each.get("msg") or "")
    return str(result.get("msg") or "")


class CallbackModule(CallbackBase):
    """Collects what failed, and shows the end beside what other callbacks show."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "glm_summary"

    def __init__(self) -> None:
        super().__init__()
        self._begun = time.monotonic()
        self._playbook = ""
        self._failures: list[Failure] = []

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Begin a playbook."""
        self._begun, self._failures = time.monotonic(), []
        self._playbook = Path(str(playbook._file_name)).name

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Note a failure. Whether it was rescued is known at the end."""
        if not ignore_errors:
            self._note(result)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Note a host that was not reached."""
        self._note(result)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Show the end."""
        counted = {host: stats.summarize(host) for host in sorted(stats.processed)}
        run = EndedRun(
            self._playbook,
            time.monotonic() - self._begun,
            {host: int(counts["changed"]) for host, counts in counted.items()},
            [host for host, each in counted.items() if each["failures"] or each["unreachable"]],
            self._failures,
            bool(context.CLIARGS.get("check")),
        )
        if counted:
            show(summarize(run))

    def _note(self, result: Any) -> None:
        self._failures.append(
            Failure(result.host.get_name(), result.task.get_name(), words_of(result.result))
        )
