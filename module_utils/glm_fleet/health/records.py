# SPDX-License-Identifier: Apache-2.0
"""What was gathered of each host, checked before anybody judges by it.

One host that answers wrongly must not end the report of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import FleetError
from ..node.answer import Clock, Facts, decode_facts
from .hardware import Problem
from .verdict import UNKNOWN, Finding

# The message of a host that an earlier phase of the run lost, so that nobody asked it now.
LEFT = "it failed, or was lost, earlier in this run, and was not read"


@dataclass(frozen=True)
class HostRecord:
    """One host: its facts, or the ``message`` that came instead, or why they are ``wrong``.

    ``expect`` is what `preflight.expectations` gives for it.
    """

    message: str = ""
    groups: Sequence[str] = ()
    facts: Facts = field(default_factory=Facts)
    expect: Sequence[Mapping[str, Any]] = ()
    wrong: FleetError | None = None

    @property
    def answered(self) -> bool:
        """Tell whether there are facts to judge by."""
        return not self.message and self.wrong is None


def read_records(records: Mapping[str, Mapping[str, Any]]) -> dict[str, HostRecord]:
    """Check the facts of every host.

    ``records`` are what the action plugin of node_info keeps: {answered, message, groups, node,
    expect}, and ``wrong``, a failure, when the facts were refused there.
    """
    return {host: _read(host, record) for host, record in records.items()}


def wrong_finding(error: FleetError) -> Finding:
    """Return the finding about a host whose answer cannot be used."""
    cause = f"its answer cannot be used: expected {error.expected}, found {error.found}"
    return Finding("facts", UNKNOWN, cause, error.remedy)


def wrong_problem(host: str, error: FleetError) -> Problem:
    """Return the problem of a host whose answer cannot be used."""
    return Problem(host, "facts", error.expected, error.found, error.remedy)


def sure_skew(clock: Clock, answered: float) -> float:
    """Return the least that a clock is off, in seconds.

    On a busy controller a question is long under way, and that is no fault of the host's clock.
    ``clock`` is node_info's; ``answered`` is the controller's clock when the answer was there.
    """
    return min(clock["skew_s"], 0.0) or max(clock["epoch_s"] - answered, 0.0)


def _read(host: str, record: Mapping[str, Any]) -> HostRecord:
    message = str(record.get("message") or "")
    groups, expect = list(record.get("groups") or ()), list(record.get("expect") or ())
    if message:
        return HostRecord(message, groups, expect=expect)
    known = record.get("wrong")
    if known:
        expected, found, remedy = (str(known[key]) for key in ("expected", "found", "remedy"))
        error = FleetError(str(known["msg"]), expected=expected, found=found, remedy=remedy)
        return HostRecord(groups=groups, expect=expect, wrong=error)
    try:
        facts = decode_facts(host, record.get("node") or {})
    except FleetError as error:
        return HostRecord(groups=groups, expect=expect, wrong=error)
    clock: Clock = facts.get("clock") or {}
    if "skew_s" in clock and "epoch_s" in clock and "answered" in record:
        sure = sure_skew(clock, float(record["answered"]))
        facts["clock"] = {**clock, "skew_s": round(sure, 3)}
    return HostRecord(groups=groups, facts=facts, expect=expect)
