# SPDX-License-Identifier: Apache-2.0
"""The plan and the end of a rollout as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.format import duration
from ..core.table import Line, render_table
from ..serving.pages import pages_in_words
from ..serving.phases import phases_in_words
from .outcome import SERVES, UNTOUCHED, State
from .rollout import JOIN, RESTART, NodeState, Plan, foresee


def render_plan(nodes: Sequence[NodeState], plan: Plan, width: int, remark: str = "") -> list[Line]:
    """Return the table of what will be done to each node, in order, and a remark below it."""
    by_name = {each.name: each for each in nodes}
    rows: list[tuple[str, str, str, str]] = []
    tones: list[str] = []
    restarts = [turn for turn in plan.turns if turn.kind == RESTART]
    below = [Line(remark, "warning")] if remark else []
    for turn in plan.turns:
        node = by_name[turn.node]
        what = "drain, switch, attest, join"
        if turn.kind == JOIN:
            what = "drain, attest, join" if node.ready else "attest, join"
        elif node.held:
            what = "switch, attest"
        elif not node.ready:
            what = "switch, attest, join"
        if restarts and turn == restarts[0]:
            what += " (canary)"
        moved = [f"reached at {node.moved}"] if node.moved else []
        why = [*node.changes, *moved, *node.notes, *([f"held: {node.held}"] if node.held else [])]
        rows.append((str(turn.batch), turn.node, what, "; ".join(why) or "is not ready"))
        tones.append("warning")
    turned = {turn.node for turn in plan.turns}
    for node in nodes:
        if node.name not in turned:
            stays = f"held: {node.held}" if node.held else "runs what it should"
            rows.append(("-", node.name, "stays", "; ".join([stays, *node.notes])))
            tones.append("")
    if not plan.turns:
        return [
            Line(f"Roll: nothing to do, {len(nodes)} of {len(nodes)} run what they should."),
            *(Line(f"  {each.name} stays out, held: {each.held}") for each in nodes if each.held),
            *below,
        ]
    return [
        Line(
            f"Roll: {len(restarts)} of {len(nodes)} nodes are restarted, "
            f"{len(plan.turns) - len(restarts)} only joined."
        ),
        *([Line(f"By the load, {plan.pace}.")] if plan.pace else []),
        *_forecast(nodes, plan),
        *_outage(nodes, plan),
        *render_table(("batch", "node", "what", "why"), rows, width, tones),
        *below,
    ]


def _forecast(nodes: Sequence[NodeState], plan: Plan) -> list[Line]:
    """Say how long it takes and what is left to serve, where a start was recorded."""
    found = foresee(nodes, plan)
    if not found.seconds:
        return []
    text = (
        f"By the starts that were recorded here it takes {duration(found.seconds)} and the drains; "
        f"at least {found.fewest} of {len(nodes)} nodes take requests meanwhile."
    )
    return [Line(text)]


def _outage(nodes: Sequence[NodeState], plan: Plan) -> list[Line]:
    """Say so when a batch leaves nobody who takes requests."""
    ready = {each.name for each in nodes if each.ready}
    for number in range(1, len(plan.batches) + 1):
        batch = {turn.node for turn in plan.turns if turn.batch == number}
        if batch & ready and not ready - batch:
            names = ", ".join(sorted(batch & ready))
            text = (
                f"Outage: while {names} {'is' if len(batch) == 1 else 'are'} restarted (batch "
                f"{number}, a cold start long) no node takes requests, as serve_min_ready allows."
            )
            return [Line(text, "bad")]
        ready |= batch
    return []


@dataclass(frozen=True)
class Ending:
    """A row of the end table: what a node runs, how its turn ended, and why."""

    node: str
    state: State
    good: bool
    runs: Mapping[str, str]
    why: str
    journal: Sequence[str] = ()
    start: Mapping[str, float] = field(default_factory=dict)
    pages: Mapping[str, Any] = field(default_factory=dict)


def render_end(endings: Sequence[Ending], width: int) -> list[Line]:
    """Return the end table, where the time of each start went, and the journal of what failed."""
    rows = [
        (each.node, each.state, each.runs.get("release") or "-", each.runs.get("model") or "-",
         each.why)
        for each in endings
    ]  # fmt: skip
    tones = [("good" if each.state == SERVES else "") if each.good else "bad" for each in endings]
    lines = render_table(("node", "outcome", "release", "model", "why"), rows, width, tones)
    for each in endings:
        if each.start:
            ahead = pages_in_words(each.pages)
            text = f"{each.node} started in {phases_in_words(each.start)}"
            lines.append(Line(f"{text}. {ahead}" if ahead else text))
    for each in endings:
        if each.journal and not each.good:
            lines += [Line(""), Line(f"The journal of {each.node} said:")]
            lines += [Line(f"  {line}", "bad") for line in each.journal]
    return lines


def end_sentence(endings: Sequence[Ending]) -> str:
    """Sum up a roll that stopped: who failed, how it stands, and what to do."""
    failed = [each for each in endings if not each.good]
    named = ", ".join(f"{each.node} ({each.state})" for each in failed)
    untouched = sum(each.state == UNTOUCHED for each in endings)
    return (
        f"The roll stopped at {named}; {untouched} nodes were not touched. "
        "Mend what the table names, then run again."
    )
