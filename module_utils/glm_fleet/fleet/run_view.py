# SPDX-License-Identifier: Apache-2.0
"""What an operator sees of a run while it goes: its phases, what changes, and what fails.

A task that changes nothing is not worth a line, nor is a heading above it. What several hosts
share is told once, with their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..core.errors import split_remedy
from ..core.format import duration
from ..core.table import Line, wrap

# A task that takes longer is named while it runs.
LONG_S = 10.0
_MOST_NAMES = 6
# What is longer, or has lines of its own, is told where it happens: the end has no room for it.
_LONGEST = 400
_LONGEST_TITLE = 250
_DIFF_TONES = {"+": "good", "-": "bad"}


def named(hosts: Sequence[str], most: int = _MOST_NAMES) -> str:
    """Return the names of hosts as a sentence has them, and of many the first two."""
    if len(hosts) > most:
        return f"{', '.join(hosts[:2])} and {len(hosts) - 2} others"
    return " and ".join([", ".join(hosts[:-1]), hosts[-1]] if len(hosts) > 1 else hosts)


def title(words: str) -> str:
    """Return the first sentence of an error: what went wrong, without the figures."""
    cause = split_remedy(words.strip().partition("\n")[0], "")[0]
    for mark in (" Expected: ", " Found: "):
        cause = cause.partition(mark)[0]
    cause = cause.rstrip(".:")
    return cause if len(cause) <= _LONGEST_TITLE else f"{cause[:_LONGEST_TITLE]} ..."


def has_no_room(words: str) -> bool:
    """Tell whether an error is too long for the end of a run."""
    return "\n" in words.strip() or len(words) > _LONGEST


@dataclass
class _Task:
    """What was heard of the task that runs: {text: hosts} where hosts can share a text."""

    name: str = ""
    changed: list[str] = field(default_factory=list)
    diffs: dict[str, list[str]] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)


class RunView:
    """Hears of a run's events, and returns the lines to show for each."""

    def __init__(self, width: int, *, clock: Callable[[], float], check_mode: bool = False) -> None:
        self._width = width
        self._clock = clock
        self._verb = "would change" if check_mode else "changed"
        self._begun = clock()
        self._phase = ""
        self._task = _Task()

    def begin_phase(self, name: str) -> list[Line]:
        """Begin a phase. Its heading is shown with its first task: it may have no hosts."""
        lines = self._end_task()
        self._phase = name
        return lines

    def begin_task(self, name: str) -> list[Line]:
        """Begin a task, and show what came of the one before."""
        lines = self._end_task()
        self._task = _Task(name)
        if self._phase:
            lines.append(Line(f"{duration(self._clock() - self._begun):>5}  {self._phase}"))
            self._phase = ""
        return lines

    def still_runs(self) -> Line:
        """Name the task that runs, for when it takes longer than `LONG_S`."""
        return Line(f"  {self._task.name} ...")

    def changes(self, host: str) -> None:
        """Note that the task changed something on a host."""
        self._task.changed.append(host)

    def differs(self, host: str, diff: str) -> None:
        """Note a difference that the task makes, in the words of `diff -u`."""
        self._task.diffs.setdefault(diff.strip("\n"), []).append(host)

    def says(self, host: str, text: str) -> None:
        """Note what a task has to say; ``host`` is empty where it speaks for all."""
        self._task.said.setdefault(text.rstrip(), []).append(host)

    def fails(self, host: str, words: str, *, whole: bool = False) -> list[Line]:
        """Name a failure at once: others may work for hours before the end tells its cause.

        ``host`` is empty where it only stood for all. ``whole`` tells all of it, for one that the
        end has no room for.
        """
        hosts = self._task.failed.setdefault(words, [])
        hosts.append(host)
        if len(hosts) > 1:
            return []
        head = f"fatal: [{host}]: {self._task.name}" if host else f"fatal: {self._task.name}"
        first, *others = words.strip().splitlines() if whole else [title(words)]
        return [
            *self._wrap(f"{head}: {first}", "bad"),
            *(Line(f"    {part}", "bad") for part in others),
        ]

    def end(self) -> list[Line]:
        """Show what came of the last task."""
        return self._end_task()

    def _end_task(self) -> list[Line]:
        task, self._task = self._task, _Task()
        lines = [
            line
            for hosts in task.failed.values()
            if len(hosts) > 1
            for line in self._wrap(f"as well on {named(sorted(hosts[1:]))}", "bad")
        ]
        for text, hosts in task.said.items():
            lines += self._said(text, named(sorted(filter(None, hosts))))
        if task.changed:
            # A task that did several things on a host is one change of that host.
            hosts = sorted(set(task.changed))
            lines += self._wrap(f"{self._verb}: {task.name}: {named(hosts)}", "warning")
        for diff, hosts in task.diffs.items():
            lines += [Line(f"  on {named(sorted(hosts))}:")] if len(task.diffs) > 1 else []
            lines += [Line(part, _DIFF_TONES.get(part[:1], "")) for part in diff.splitlines()]
        return lines

    def _said(self, text: str, who: str) -> list[Line]:
        first, *others = text.splitlines() or [""]
        if not others:
            return self._wrap(f"{who}: {first}" if who else first, "")
        # Several lines are a table or a list: they stay as they are.
        heading = [Line(f"  {who}:")] if who else []
        return [*heading, *(Line(f"  {part}") for part in (first, *others))]

    def _wrap(self, text: str, tone: str) -> list[Line]:
        return wrap(f"  {text}", self._width, tone)
