# SPDX-License-Identifier: Apache-2.0
"""The last lines of a run: how it ended, what failed for which cause, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import split_remedy
from ..core.format import duration
from ..core.table import Line
from .run_view import has_no_room, named, title

MOST_LINES = 10
# Each cause takes two lines, beside the first line and one for those that have no room.
MOST_CAUSES = (MOST_LINES - 2) // 2
_LONGEST_STEP = 400
_MOST_NAMES = 3
_OTHERWISE = "run it again when this is mended: what is complete stays, and it goes on from there"


@dataclass(frozen=True)
class Failure:
    """A task that failed on a host, or a host that could not be reached, in its own words.

    ``once`` tells that the host only stood for all: it ran a task that runs once.
    """

    host: str
    task: str
    words: str
    once: bool = False


@dataclass(frozen=True)
class EndedRun:
    """What Ansible counted: ``changed`` is {host: tasks}; ``failed`` hosts took no further part."""

    playbook: str
    seconds: float
    changed: Mapping[str, int]
    failed: Sequence[str]
    failures: Sequence[Failure]
    check_mode: bool = False


def summarize(run: EndedRun) -> list[Line]:
    """Return at most ten lines. A cause that several hosts share is told once."""
    hosts = sum(1 for count in run.changed.values() if count)
    tasks = sum(run.changed.values())
    verb = "would change" if run.check_mode else "changed"
    noun = "task" if tasks == 1 else "tasks"
    did = f"{tasks} {noun} {verb} something on {hosts} of {len(run.changed)} hosts"
    if not tasks:
        did = "nothing would change" if run.check_mode else "nothing changed"
    head = f"{run.playbook} took {duration(run.seconds)}: {did}"
    if not run.failed:
        return [Line(f"{head}.", "good")]
    causes = _causes(run)
    failed = sorted(host for told in causes.values() for host in told)
    who = f": {named(failed, _MOST_NAMES)} failed" if failed else ""
    lines = [Line(f"{head}, and it stopped{who}.", "bad")]
    for (cause, step), told in list(causes.items())[:MOST_CAUSES]:
        text = f"{named(sorted(told), _MOST_NAMES)}: {cause}" if told else cause
        lines.append(Line(f"  {text}", "bad"))
        lines.append(Line(f"    What to do: {step}"))
    if len(causes) > MOST_CAUSES:
        lines.append(Line(f"  {len(causes) - MOST_CAUSES} more causes stand above."))
    return lines


def _causes(run: EndedRun) -> dict[tuple[str, str], list[str]]:
    """Return {(cause, what to do): hosts}, of each host the failure that ended its run.

    In the order in which they came, without the hosts that only stood for all.
    """
    last = {each.host: each for each in run.failures if each.host in run.failed}
    ended = [each for each in run.failures if last.get(each.host) is each]
    ended += [Failure(host, "", "it failed") for host in run.failed if host not in last]
    found: dict[tuple[str, str], list[str]] = {}
    for failure in ended:
        cause, step = split_remedy(failure.words or "it failed", _OTHERWISE)
        if has_no_room(failure.words):
            cause, step = f"{title(failure.words)}, as told above", step[:_LONGEST_STEP]
        cause = f"{cause} ({failure.task})" if failure.task else cause
        hosts = found.setdefault((cause, step), [])
        hosts += [] if failure.once else [failure.host]
    return found
