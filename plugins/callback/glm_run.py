# SPDX-License-Identifier: Apache-2.0
"""What a run shows: see fleet/run_view.py for its course, and fleet/summary.py for its end."""

from __future__ import annotations

DOCUMENTATION = r"""
name: glm_run
type: stdout
short_description: Phases, changes and failures of a run, and its end in ten lines
description:
  - Shows a line for each phase, what changes and on which hosts, and what fails. Tasks that change
    nothing are not shown. With C(-v) everything is shown as by the callback V(default).
  - Says at the end of every run how long it took and on how many hosts something changed. Where
    hosts failed it names each cause once, with the hosts that share it and what to do.
author: glm-fleet contributors (@glm-fleet)
extends_documentation_fragment:
  - default_callback
  - result_format_callback
"""

import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible import context
from ansible.playbook.block import Block
from ansible.playbook.task_include import TaskInclude
from ansible.plugins.callback.default import CallbackModule as Default
from ansible.utils.color import ANSIBLE_COLOR

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

import glm_action as glm_action  # makes the logic importable
from glm_fleet.core.causes import why_no_answer, why_no_sudo
from glm_fleet.core.errors import FleetError
from glm_fleet.core.table import Line
from glm_fleet.fleet.run_view import LONG_S, RunView, has_no_room
from glm_fleet.fleet.summary import MOST_CAUSES, EndedRun, Failure, summarize
from glm_terminal import plain, print_lines, width

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_UNTOLD = "non-zero return code"
_ANSIBLES = {"changed", "failed", "_ansible_verbose_always", "_ansible_no_log"}


def words_of(result: Any) -> str:
    """Return what a failed task says; of a loop, what its first failed item says."""
    items = result.get("results")
    for each in items if isinstance(items, list) else ():
        if isinstance(each, Mapping) and (each.get("failed") or each.get("unreachable")):
            return words_of(each)
    words = str(result.get("msg") or "")
    if words == _UNTOLD:
        last = str(result.get("stderr") or result.get("stdout") or "").strip().rpartition("\n")[2]
        words = f"{words}: {last}" if last else words
    return words


def explained(words: str, host: str, *, unreachable: bool) -> str:
    """Return the words of ssh or sudo as a cause and a next step, and others as they are."""
    if "What to do: " in words or "Expected: " in words:
        # Errors of ours have their cause.
        return words
    user = "the user"
    why = why_no_answer(words, host=host, user=user) if unreachable else None
    why = why or why_no_sudo(words, user=user)
    if why is None:
        return words
    return str(FleetError(f"{host}: {why.cause}", remedy=why.remedy))


def is_rescued(task: Any) -> bool:
    """Tell whether a block catches the failure of this task."""
    child, parent = task, task._parent
    while parent is not None:
        if isinstance(parent, Block) and parent.rescue:
            inside = {each._uuid for each in parent.block}
            if child._uuid in inside:
                return True
        child, parent = parent, parent._parent
    return False


def ends_all(task: Any) -> bool:
    """Tell whether the run of every host ends when this task fails."""
    return bool(task.run_once or task.any_errors_fatal is True) and not is_rescued(task)


class CallbackModule(Default):
    """Shows a run as `RunView` and `summarize` tell it, and with -v as Ansible does."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "glm_run"

    def __init__(self) -> None:
        super().__init__()
        self._begun = time.monotonic()
        self._playbook = ""
        self._failures: list[Failure] = []
        self._timer: threading.Timer | None = None
        self._view: RunView | None = None

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Begin a playbook."""
        self._begun, self._failures = time.monotonic(), []
        self._playbook = Path(str(playbook._file_name)).name
        if not self._display.verbosity:
            check = bool(context.CLIARGS.get("check"))
            self._view = RunView(width(), clock=time.monotonic, check_mode=check)
        else:
            super().v2_playbook_on_start(playbook)

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Begin a phase."""
        if self._view is None:
            super().v2_playbook_on_play_start(play)
            return
        self._play = play
        self._say(self._view.begin_phase(play.get_name().strip()))

    def v2_playbook_on_no_hosts_matched(self) -> None:
        """Leave out a phase that concerns nobody."""
        if self._view is None:
            super().v2_playbook_on_no_hosts_matched()

    def v2_playbook_on_no_hosts_remaining(self) -> None:
        """Leave it to the end, which names every host that failed."""
        if self._view is None:
            super().v2_playbook_on_no_hosts_remaining()

    def v2_playbook_on_include(self, included_file: Any) -> None:
        """Leave out which file comes next."""
        if self._view is None:
            super().v2_playbook_on_include(included_file)

    def v2_runner_retry(self, result: Any) -> None:
        """Leave out the tries of a task: the last one counts."""
        if self._view is None:
            super().v2_runner_retry(result)

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Begin a task."""
        if self._view is None:
            super().v2_playbook_on_task_start(task, is_conditional)
        else:
            self._begin(task)

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """Begin a handler."""
        if self._view is None:
            super().v2_playbook_on_handler_task_start(task)
        else:
            self._begin(task)

    def v2_on_file_diff(self, result: Any) -> None:
        """Note a difference."""
        if self._view is None:
            super().v2_on_file_diff(result)
            return
        items = result.result.get("results") if result.task.loop else None
        for each in items if isinstance(items, list) else [result.result]:
            if each.get("diff") and each.get("changed"):
                text = _COLOR.sub("", self._get_diff(each["diff"]))
                if text.strip():
                    self._view.differs(_host(result), text)

    def v2_runner_on_ok(self, result: Any) -> None:
        """Note a change, and what a task has to say."""
        if self._view is None:
            super().v2_runner_on_ok(result)
            return
        if isinstance(result.task, TaskInclude):
            return
        self._handle_warnings(result.result)
        if result.result.get("_ansible_verbose_always"):
            host = "" if result.task.run_once else _host(result)
            self._view.says(host, _said(result.result))
        if result.result.get("changed"):
            self._view.changes(_host(result))

    def v2_runner_on_skipped(self, result: Any) -> None:
        """Leave out what was skipped."""
        if self._view is None:
            super().v2_runner_on_skipped(result)

    def v2_runner_item_on_ok(self, result: Any) -> None:
        """Leave it to the whole task."""
        if self._view is None:
            super().v2_runner_item_on_ok(result)
        elif result.result.get("_ansible_verbose_always"):
            self._view.says(_host(result), _said(result.result))

    def v2_runner_item_on_failed(self, result: Any) -> None:
        """Leave it to the whole task."""
        if self._view is None:
            super().v2_runner_item_on_failed(result)

    def v2_runner_item_on_skipped(self, result: Any) -> None:
        """Leave out what was skipped."""
        if self._view is None:
            super().v2_runner_item_on_skipped(result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Name a failure. Whether it was rescued is known at the end."""
        if self._view is None:
            super().v2_runner_on_failed(result, ignore_errors)
        else:
            self._handle_warnings(result.result)
        self._failed(result, unreachable=False, ignored=ignore_errors)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Name a host that was not reached."""
        if self._view is None:
            super().v2_runner_on_unreachable(result)
        self._failed(result, unreachable=True, ignored=bool(result.task.ignore_unreachable))

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Show Ansible's recap, and below it the end."""
        self._stop_timer()
        if self._view is not None:
            self._say(self._view.end())
        super().v2_playbook_on_stats(stats)
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
            print_lines(summarize(run))

    def _begin(self, task: Any) -> None:
        if self._view is None:
            return
        self._stop_timer()
        self._say(self._view.begin_task(_title(task)))
        if not isinstance(task, TaskInclude):
            self._timer = threading.Timer(LONG_S, self._still_runs, [self._view])
            self._timer.daemon = True
            self._timer.start()

    def _still_runs(self, view: RunView) -> None:
        # A bar may be drawn on the line of the cursor.
        self._display.display("\r\033[K" if ANSIBLE_COLOR else "", newline=False)
        self._say([view.still_runs()])

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _failed(self, result: Any, *, unreachable: bool, ignored: bool) -> None:
        host = result.host.get_name()
        words = explained(words_of(result.result), host, unreachable=unreachable)
        rescued = ignored or is_rescued(result.task)
        once = bool(result.task.run_once)
        if not ignored:
            self._failures.append(Failure(host, _title(result.task), words, once))
        if self._view is None:
            return
        told = {each.words for each in self._failures}
        whole = has_no_room(words) or (not rescued and len(told) > MOST_CAUSES)
        # Where the run ends with it, the end of the run tells it in the next line.
        if whole or not ends_all(result.task):
            self._say(self._view.fails("" if once else host, words, whole=whole))

    def _say(self, lines: Iterable[Line]) -> None:
        print_lines(lines)


def _title(task: Any) -> str:
    """Return the name of a task, without that of its role."""
    name: str = task.get_name().strip()
    return name.rpartition(" : ")[2]


def _host(result: Any) -> str:
    """Return a host, and where its task was done for it."""
    host: str = result.host.get_name()
    other = result.task.delegate_to
    return f"{host} -> {other}" if other and other != host else host


def _said(result: Mapping[str, Any]) -> str:
    """Return what a task of `debug` shows: its message, or a variable as YAML."""
    shown = plain(result)
    value = shown.get("msg", {key: shown[key] for key in shown.keys() - _ANSIBLES})
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=width())
    return text
