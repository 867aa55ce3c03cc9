# SPDX-License-Identifier: Apache-2.0
"""The last lines of a run: how it ended, what failed for which cause, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import split_remedy
from ..core.format import duration
from ..core.table import Line

MOST_LINES = 10
# Each cause takes two lines, beside the first line and one for those that have no room.
_MOST_CAUSES = (MOST_LINES - 2) // 2
_LONGEST = 400
_OTHERWISE = "run it again when this is mended: what is complete stays, and it goes on from there"


@dataclass(frozen=True)
class Failure:
    """A task that failed on a host, or a host that could not be reached, in its own words."""

    host: str
    task: str
    words: str


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
    lines = [Line(f"{head}, and it stopped: {_named(run.failed)} failed.", "bad")]
    for (cause, step), names in list(causes.items())[:_MOST_CAUSES]:
        lines.append(Line(f"  {_named(names)}: {cause}"[:_LONGEST], "bad"))
        lines.append(Line(f"    What to do: {step}"[:_LONGEST]))
    if len(causes) > _MOST_CAUSES:
        lines.append(Line(f"  {len(causes) - _MOST_CAUSES} more causes stand above."))
    return lines


def _causes(run: EndedRun) -> dict[tuple[str, str], list[str]]:
    """Return {(cause, what to do): hosts}, of each host the failure that ended its run."""
    last = {each.host: each for each in run.failures}
    found: dict[tuple[str, str], list[str]] = {}
    for host in run.failed:
        failure = last.get(host, Failure(host, "", "it failed"))
        cause, step = split_remedy(failure.words or "it failed", _OTHERWISE)
        found.setdefault((f"{cause} ({failure.task})" if failure.task else cause, step), []).append(
            host
        )
    return found


def _named(hosts: Sequence[str]) -> str:
    if len(hosts) > 3:
        return f"{', '.join(hosts[:2])} and {len(hosts) - 2} others"
    return " and ".join([", ".join(hosts[:-1]), hosts[-1]] if len(hosts) > 1 else hosts)
