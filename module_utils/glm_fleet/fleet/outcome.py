# SPDX-License-Identifier: Apache-2.0
"""How one node's turn ended, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..serving.graphs import price_of
from .turn import Answer, Attempt, Turn

State = Literal["serves", "held", "rolled back", "drained", "unreachable", "untouched"]
SERVES: State = "serves"
HELD: State = "held"
ROLLED_BACK: State = "rolled back"
DRAINED: State = "drained"
LOST: State = "unreachable"
UNTOUCHED: State = "untouched"


@dataclass(frozen=True)
class Outcome:
    """How a turn ended.

    ``good`` says whether the roll may go on. ``runs`` is what was attested on the node, {id,
    release, model, cuda_graphs}, empty if nothing was. ``why`` is in words, ``journal`` what
    the journal said of what failed, ``seconds``, ``canary`` and ``start`` (seconds by phase) the
    figures of the last start, ``pages`` what was read into memory before the drain.
    """

    state: State
    good: bool
    why: str = ""
    runs: Mapping[str, str] = field(default_factory=dict)
    journal: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    canary: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)
    pages: Mapping[str, Any] = field(default_factory=dict)


def outcome(turn: Turn) -> Outcome:
    """Say how a turn ended that has no next step."""
    if turn.order.purpose != "switch":
        return _outcome_of_single(turn)
    if refused := _refusals([*turn.answers("drain"), *turn.answers("score before")]):
        not_back = _refusals(turn.answers("let back"))
        return Outcome(UNTOUCHED, False, _sentence(dict.fromkeys([*refused, *not_back])))
    if any(not each.ok for each in turn.answers("rehearse")):
        return _outcome_of_rehearsal(turn)
    made = turn.attempts("switch")
    if not made:
        gone = _refusals(turn.answers("read ahead"))
        return Outcome(UNTOUCHED, False, _sentence(gone or ["its turn did not begin"]))
    ended = _outcome_of_switch(turn, made)
    pages = [each.pages for each in turn.answers("read ahead")]
    return replace(ended, pages=dict(pages[0])) if pages else ended


def _outcome_of_switch(turn: Turn, made: Sequence[Attempt]) -> Outcome:
    last, why = made[-1], []
    if busy := sum(each.sessions for each in turn.answers("drain")):
        why.append(f"{busy} requests were still running when it was stopped")
    for each in turn.answers("rehearse"):
        if stepped_down := each.rehearsal.get("stepped_down"):
            why.append(f"stepped down to {each.rehearsal.get('cuda_graphs')}: {stepped_down}")
        why.append(each.rehearsal.get("words", ""))
    if not last.passed:
        return _outcome_of_failure(turn, last)
    for failed in made[:-1]:
        graphs = last.switched.runs.get("cuda_graphs", "a lower mode")
        price = price_of(graphs)
        cost = f" ({price})" if price else ""
        why.append(f"stepped down to {graphs}{cost}: {failed.reason}")
    if refused := _refusals(turn.answers("join")):
        return _ended(DRAINED, False, [*why, *refused], last)
    if turn.order.held:
        return _ended(HELD, True, [*why, f"held: {turn.order.held}"], last)
    return _ended(SERVES, True, why, last)


def _outcome_of_rehearsal(turn: Turn) -> Outcome:
    """Say how a turn ended whose rehearsal failed: nothing new was put in place."""
    (answer,) = turn.answers("rehearse")
    if answer.diagnosis:
        answer = replace(answer, diagnosis=f"the rehearsal failed: {answer.diagnosis}")
    failed = Attempt("", answer)
    if turn.order.back or answer.lost:
        return _outcome_of_failure(turn, failed)
    why = [answer.reason, "nothing new was put in place"]
    return _ended(DRAINED, False, why, failed)


def _outcome_of_failure(turn: Turn, failed: Attempt) -> Outcome:
    reason, made = failed.reason, turn.attempts("go back")
    if failed.last.lost:
        return _ended(LOST, False, [f"no answer: {reason}", "it stays drained"], failed)
    if not made:
        stays = (
            "it stays drained"
            if failed.unfit
            else "nothing was attested here before that it could go back to; it stays drained"
        )
        not_back = _refusals(each for each in turn.answers("keep out") if not each.lost) or [stays]
        return _ended(DRAINED, False, [reason, *not_back], failed)
    back = made[-1]
    if back.passed:
        held = [f"held: {turn.order.held}"] if turn.order.held else []
        if refused := _refusals(turn.answers("join")):
            return _ended(DRAINED, False, [reason, "rolled back", *refused], back, failed)
        return _ended(ROLLED_BACK, False, [reason, *held], back, failed)
    if back.last.lost:
        return _ended(LOST, False, [reason, "then no answer; it stays drained"], back, failed)
    again = f"going back failed too: {back.reason}"
    return _ended(DRAINED, False, [reason, again], back, failed)


def _outcome_of_single(turn: Turn) -> Outcome:
    """Say how a turn ended that only takes a node out of service, or lets it back."""
    step, answers = turn.done[-1]
    failed = [
        refusal
        for action in ("drain", "hold", step.action)
        for refusal in _refusals(turn.answers(action))
    ]
    journal = [line for each in answers for line in each.journal]
    leaves = turn.order.purpose == "leave"
    if not failed:
        return Outcome(HELD, True, f"held: {turn.order.held}") if leaves else Outcome(SERVES, True)
    untouched = step.action in ("drain", "hold", "let back")
    state = UNTOUCHED if untouched else HELD if step.action in ("empty", "attest") else DRAINED
    return Outcome(state, False, _sentence(dict.fromkeys(failed)), journal=journal)


def _ended(
    state: State, good: bool, why: Sequence[str], last: Attempt, failed: Attempt | None = None
) -> Outcome:
    """Put the words together; the journal is that of the start that failed."""
    attested = last.attested or Answer("")
    return Outcome(
        state,
        good,
        _sentence(why),
        dict(last.switched.runs) if last.passed else {},
        list((failed or last).last.journal),
        {**last.switched.seconds, **attested.seconds},
        dict(attested.canary),
        # A node that was not stopped only proved itself: it was started some other time.
        dict(attested.start) if last.switched.seconds else {},
    )


def _refusals(answers: Iterable[Answer]) -> list[str]:
    """Say which hosts refused, and in which words."""
    return [f"{each.host}: {each.message}" for each in answers if not each.ok]


def _sentence(parts: Iterable[str]) -> str:
    return "; ".join(each for each in parts if each)
