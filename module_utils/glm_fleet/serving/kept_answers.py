# SPDX-License-Identifier: Apache-2.0
"""The answers of one start beside those that are kept: of this node before, and of other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Callable, Protocol

from ..core.check import Check
from ..core.http import Http
from .answers import (
    ALONE_AND_IN_A_CROWD,
    ASKED,
    Answers,
    Apart,
    Difference,
    ask_all,
    difference,
    name_of,
    prompts,
    rounding,
)
from .needles import check_needles
from .policy import AnswerLimits

AS_NEIGHBOURS = "same answers as the neighbours"
AS_BEFORE = "same answers as before"
# The checks whose figures tell how far right answers are apart.
COMPARED = (ALONE_AND_IN_A_CROWD, AS_NEIGHBOURS, AS_BEFORE)


class Store(Protocol):
    """Where a node keeps the answers of what passed."""

    def answers_before(self, model: str) -> Answers | None:
        """Return the newest answers of these weights, of this deployment or an earlier one."""

    def note_answers(self, answers: Answers) -> None:
        """Keep the answers of what runs."""


@dataclass(frozen=True)
class Known:
    """How the answers of a start are judged, and with whose they are compared.

    ``neighbours`` are the answers of other nodes by name. With ``again`` a start that was proven
    is asked once more. ``say`` is told what is being done.
    """

    limits: AnswerLimits
    store: Store
    neighbours: Mapping[str, Answers] = field(default_factory=dict)
    again: bool = False
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Start:
    """What runs: ids of release and model, systemd's id of the start, its context in tokens."""

    release: str
    model: str
    invocation: str
    context: int


@dataclass(frozen=True)
class Proof:
    """What known answers gave: checks, and the answers to keep if all passes."""

    checks: Sequence[Check] = ()
    answers: Answers | None = None


def prove(http: Http, model_name: str, start: Start, known: Known) -> Proof:
    """Ask for the known answers and judge them.

    A start is asked once, before it takes requests: the prompts would slow down those of others.
    """
    before = known.store.answers_before(start.model)
    asked = name_of(prompts(start.context))
    proven = before and (before["invocation"], before["prompts"]) == (start.invocation, asked)
    if proven and not known.again:
        return Proof([Check(ASKED, True, "asked and right when this start was attested")])
    limits = known.limits
    found = ask_all(http, model_name, start.context, tolerance=limits["tolerance"], say=known.say)
    checks = list(found.checks)
    if limits["needles"]:
        known.say("known answers: code words in long texts")
        checks += check_needles(http, model_name, start.context)
    if not found.said:
        return Proof(checks)
    answers = Answers(
        prompts=asked,
        release=start.release,
        model=start.model,
        invocation=start.invocation,
        said=found.said,
        crowd=found.crowd,
    )
    if found.own:
        answers["own"] = found.own
    more, answers["apart"] = judge(answers, before, known.neighbours, limits["drift"])
    return Proof([*checks, *more], answers)


def compare(mine: Answers, whom: str, theirs: Answers, drift: float) -> Apart | None:
    """Compare all answers; None where they are of other weights or other prompts.

    A prompt moved if its log probabilities differ on average by more than ``drift``, or than
    either engine differs from itself: see `answers.rounding`.
    """
    if (mine["model"], mine["prompts"]) != (theirs["model"], theirs["prompts"]):
        return None
    drift = _rounding(mine, theirs, drift)
    known = {each["prompt"]: each for each in theirs["said"]}
    found: list[Difference] = [
        difference(each, known[each["prompt"]]) for each in mine["said"] if each["prompt"] in known
    ]
    if not found:
        return None
    return {
        "whom": whom,
        "release": theirs["release"],
        "mean": round(fmean(each.mean for each in found), 4),
        "rounding": round(drift, 4),
        "moved": [each.prompt for each in found if each.mean > drift],
        "prompts": len(found),
    }


def judge(
    mine: Answers, kept: Answers | None, others: Mapping[str, Answers], drift: float
) -> tuple[list[Check], list[Apart]]:
    """Check the answers against those ``kept`` of this node and of ``others``, with the figures.

    They differ where the mean over all prompts is more than rounding (see `compare`). From the
    neighbours' answers they may differ as long as at least half of the neighbours agree: then it is
    another one that is wrong. From those before they may differ where a neighbour with this very
    release agrees: then this node was wrong before, or the change is one that the fleet took.
    """
    checks: list[Check] = []
    neighbours = [
        found
        for name, theirs in sorted(others.items())
        if (found := compare(mine, name, theirs, drift))
    ]
    agreeing = [each for each in neighbours if each["mean"] <= each["rounding"]]
    if neighbours:
        passed = 2 * len(agreeing) >= len(neighbours)
        checks.append(Check(AS_NEIGHBOURS, passed, _say(neighbours)))
    before = compare(mine, "this node before", kept, drift) if kept else None
    if before:
        backed = any(each["release"] == mine["release"] for each in agreeing)
        passed = before["mean"] <= before["rounding"] or backed
        checks.append(Check(AS_BEFORE, passed, _say([before])))
    return checks, [*([before] if before else []), *neighbours]


def _rounding(mine: Answers, theirs: Answers, drift: float) -> float:
    own = [each["own"]["mean"] if "own" in each else 0.0 for each in (mine, theirs)]
    return rounding(drift, max(own))


def _say(found: Sequence[Apart]) -> str:
    told = []
    for each in found:
        text = f"{each['whom']} ({each['release']}) {each['mean']:.3f}"
        if each["mean"] > each["rounding"] and each["moved"]:
            text += f", {len(each['moved'])} of {each['prompts']} prompts moved"
        told.append(f"{text} ({each['rounding']:g} is taken as rounding)")
    return f"log probabilities differ on average by: {'; '.join(told)}"
