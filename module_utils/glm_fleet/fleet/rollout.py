# SPDX-License-Identifier: Apache-2.0
"""Rolling: in which order nodes are taken out, how a turn went, and what runs in the end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..core.errors import FleetError
from ..serving.graphs import price_of

RESTART = "restart"
JOIN = "join"
ROLL_BACK = "rollback"
# How a turn ended.
SERVES = "serves"
HELD = "held"
ROLLED_BACK = "rolled back"
DRAINED = "drained"
LOST = "unreachable"
UNTOUCHED = "untouched"


@dataclass(frozen=True)
class NodeState:
    """A node before the roll.

    ``changes`` says in words what a restart would change, ``ready`` whether every gateway
    sends it requests, ``held`` why an operator keeps it out of service, if one does. ``moved``
    says how the endpoint changes at which the gateways reach it, if it does.
    ``wanted`` and ``current`` are {release, model, cuda_graphs}. ``starts`` are the seconds that
    its last starts took.
    """

    name: str
    changes: Sequence[str]
    ready: bool
    wanted: Mapping[str, str] = field(default_factory=dict)
    current: Mapping[str, str] = field(default_factory=dict)
    held: str = ""
    notes: Sequence[str] = ()
    moved: str = ""
    starts: Sequence[float] = ()


@dataclass(frozen=True)
class Forecast:
    """How long a roll takes without its drains, in seconds; 0.0 where nobody recorded a start.

    ``fewest`` is how many nodes take requests at the worst moment.
    """

    seconds: float
    fewest: int


@dataclass(frozen=True)
class Turn:
    """One node's part in the roll: RESTART or JOIN, and in which batch, from 1."""

    node: str
    kind: str
    batch: int


@dataclass(frozen=True)
class Plan:
    """The order of the roll; ``batches`` are sizes, as Ansible's ``serial`` takes them."""

    turns: Sequence[Turn]
    batches: Sequence[int]


def batch_size(text: Any, nodes: int) -> int:
    """Return the nodes in a batch: a count, or a percentage of the fleet, at least 1."""
    found = re.fullmatch(r"(\d+)(%?)", str(text).strip())
    number = int(found.group(1)) if found else 0
    if found is None or number < 1 or (found.group(2) and number > 100):
        raise FleetError(
            "The size of a batch cannot be read",
            expected="serve_batch to be a number of nodes from 1, or a percentage up to 100%",
            found=repr(text),
        )
    return max(1, nodes * number // 100) if found.group(2) else number


def min_ready_nodes(text: Any) -> int:
    """Return how many nodes have to go on taking requests."""
    if not re.fullmatch(r"\d+", str(text).strip()):
        raise FleetError(
            "The number of nodes that stay ready cannot be read",
            expected="serve_min_ready to be 0 or more",
            found=repr(text),
        )
    return int(str(text))


def plan_roll(
    nodes: Sequence[NodeState], *, batch: Any, min_ready: Any, canary: str = "", ready: int
) -> Plan:
    """Put the nodes in order: those that cost nothing first, one canary, then batch by batch.

    Nodes that are down and get what ran there before are mended together: one that cannot be mended
    keeps no other from it, and they try nothing new.
    A node that takes no requests anyway is the best canary, unless it is held: that one may be
    broken, and comes last. ``ready`` counts the nodes of the whole fleet that take requests
    now, also those outside this run. Raises `FleetError` when nodes that serve could only be
    taken out below ``min_ready``.
    """
    size, least = batch_size(batch, len(nodes)), min_ready_nodes(min_ready)
    if canary and canary not in {each.name for each in nodes}:
        raise FleetError(
            "The canary is not a node of this run",
            expected=f"serve_canary to be one of {', '.join(each.name for each in nodes)}",
            found=canary,
        )
    joining = [each for each in nodes if not each.changes and not each.ready and not each.held]
    moving = [each for each in nodes if not each.changes and each.ready and each.moved]
    down = [each for each in nodes if each.changes and not each.ready and not each.held]
    mending = [each for each in down if _gets_the_same(each)]
    idle = [each for each in down if not _gets_the_same(each)]
    held = [each for each in nodes if each.changes and not each.ready and each.held]
    serving = [each for each in nodes if each.changes and each.ready] + moving
    for group in (idle, serving):
        group.sort(key=lambda each: each.name != canary)
    later = ready + len(joining) + len(down)
    room = later - least
    if serving and room < 1:
        raise FleetError(
            "No node can be taken out of service",
            expected=f"more than serve_min_ready={least} nodes that take requests",
            found=f"{later}",
            remedy="mend or add nodes, or allow an outage with a lower serve_min_ready",
        )
    size = max(1, min(size, room))
    groups = [joining, mending, idle[:1], idle[1:]]
    if serving and not idle:
        groups.append(serving[:1])
        serving = serving[1:]
    groups += [serving[begin : begin + size] for begin in range(0, len(serving), size)]
    groups.append(held)
    groups = [group for group in groups if group]
    turns = [
        Turn(each.name, RESTART if each.changes else JOIN, number)
        for number, group in enumerate(groups, 1)
        for each in group
    ]
    return Plan(turns, [len(group) for group in groups])


def _gets_the_same(node: NodeState) -> bool:
    wanted = node.wanted.get("id")
    return bool(wanted) and wanted == node.current.get("id")


def foresee(nodes: Sequence[NodeState], plan: Plan) -> Forecast:
    """Say how long a roll takes, from the starts that the nodes recorded, and what is left to
    serve meanwhile. A batch takes as long as its slowest node; a node that recorded none is
    taken for a middling one."""
    by_name = {each.name: each for each in nodes}
    own = {each.name: median(each.starts) for each in nodes if each.starts}
    usual = median(own.values()) if own else 0.0
    ready = {each.name for each in nodes if each.ready}
    seconds, fewest = 0.0, len(ready)
    for number in range(1, len(plan.batches) + 1):
        batch = [turn for turn in plan.turns if turn.batch == number]
        starting = [own.get(turn.node, usual) for turn in batch if turn.kind == RESTART]
        seconds += max(starting, default=0.0)
        names = {turn.node for turn in batch}
        fewest = min(fewest, len(ready - names))
        ready |= {name for name in names if not by_name[name].held}
    return Forecast(seconds, fewest)


def attempt(
    identifier: str, activated: Mapping[str, Any], attested: Mapping[str, Any]
) -> dict[str, Any]:
    """Judge one attempt to run a deployment, from what its two tasks returned.

    Returns {id, runs, passed, lost, step_down, message, diagnosis, journal, seconds, start};
    ``start`` is where the time of the start went, by phase.
    """
    found: dict[str, Any] = {
        "id": identifier,
        "runs": activated.get("deployment") or {},
        "passed": False,
        "lost": False,
        "step_down": False,
        "message": "",
        "diagnosis": "",
        "journal": [],
        "seconds": {**(activated.get("seconds") or {}), **(attested.get("seconds") or {})},
        "start": attested.get("start") or {},
        "canary": (attested.get("attestation") or {}).get("canary") or {},
    }
    for result in (activated, attested):
        if result.get("unreachable") or result.get("failed"):
            found["lost"] = bool(result.get("unreachable"))
            found["message"] = " ".join(str(result.get("msg", "")).split())
            found["step_down"] = bool(result.get("step_down"))
            found["diagnosis"] = str(result.get("diagnosis") or "")
            found["journal"] = list(result.get("journal") or [])
            return found
    found["passed"] = bool((attested.get("attestation") or {}).get("passed"))
    if not found["passed"]:
        found["message"] = "the turn was cut off before the attestation"
    return found


def next_rung(ladder: Sequence[str], attempts: Sequence[Mapping[str, Any]]) -> str:
    """Return the deployment to try next, '' when trying is over.

    After a failure only a crash that a lower mode of CUDA graphs avoids is a reason to try
    the next one.
    """
    if not attempts:
        return ladder[0] if ladder else ""
    last = attempts[-1]
    if last["passed"] or last["lost"] or not last["step_down"] or len(attempts) >= len(ladder):
        return ""
    return ladder[len(attempts)]


def rollback_target(roll: Mapping[str, Any], node: str, wanted: str) -> str:
    """Return what `deployment` is asked to go back to on a node.

    ``roll`` is the record of the last roll. A roll-back that did not get to its end goes on to
    the targets it began with: for a node that is back already, one more step back is wrong.
    Any other roll is taken back to where it began: a node that it did not reach, or that went
    back by itself, stays as it is.
    """
    if wanted:
        return wanted
    if roll.get("operation") != ROLL_BACK:
        return str((roll.get("backs") or {}).get(node) or "before")
    if roll.get("state") in ("running", "stopped"):
        return str((roll.get("targets") or {}).get(node) or "before")
    return "before"


def outcome(
    attempts: Sequence[Mapping[str, Any]],
    back: Mapping[str, Any],
    drained: Sequence[Mapping[str, Any]],
    joined: Sequence[Mapping[str, Any]],
    held: str,
) -> dict[str, Any]:
    """Say how a turn ended.

    ``back`` is the attempt to go back, {} if there was none; ``drained`` and ``joined`` are
    the results of the gateways. Returns {state, good, runs, why, journal, seconds, start}: ``good``
    says whether the roll may go on, ``runs`` is {release, model, cuda_graphs} on the node.
    """
    last = attempts[-1] if attempts else {}
    why: list[str] = []
    busy = sum(int(each.get("sessions") or 0) for each in drained)
    if busy:
        why.append(f"{busy} requests were still running when it was stopped")
    if refused := _refusals(drained):
        return ended_words(UNTOUCHED, False, last, refused)
    if not last:
        return ended_words(UNTOUCHED, False, last, ["its turn did not begin"])
    not_joined = _refusals(joined)
    if last["passed"]:
        for failed in attempts[:-1]:
            graphs = last["runs"].get("cuda_graphs", "a lower mode")
            price = price_of(graphs)
            cost = f" ({price})" if price else ""
            reason = failed["diagnosis"] or failed["message"]
            why.append(f"stepped down to {graphs}{cost}: {reason}")
        if not_joined:
            return ended_words(DRAINED, False, last, [*why, *not_joined])
        if held:
            return ended_words(HELD, True, last, [*why, f"held: {held}"])
        return ended_words(SERVES, True, last, why)
    reason = last["diagnosis"] or last["message"]
    if last["lost"]:
        return ended_words(LOST, False, last, [f"no answer: {reason}", "it stays drained"])
    if back and back.get("passed"):
        if not_joined:
            return ended_words(DRAINED, False, back, [reason, "rolled back", *not_joined], last)
        if held:
            return ended_words(ROLLED_BACK, False, back, [reason, f"held: {held}"], last)
        return ended_words(ROLLED_BACK, False, back, [reason], last)
    if back and back.get("lost"):
        return ended_words(LOST, False, back, [reason, "then no answer; it stays drained"], last)
    if back:
        again = back["diagnosis"] or back["message"]
        return ended_words(DRAINED, False, back, [reason, f"going back failed too: {again}"], last)
    nothing = "nothing was attested here before that it could go back to; it stays drained"
    return ended_words(DRAINED, False, last, [reason, nothing])


def _refusals(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which gateways refused, and in which words."""
    return [
        f"{each.get('item', 'gateway')}: {' '.join(str(each.get('msg', '')).split())}"
        for each in results
        if each.get("failed") or each.get("unreachable")
    ]


def ended_words(
    state: str,
    good: bool,
    last: Mapping[str, Any],
    why: Sequence[str],
    failed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "state": state,
        "good": good,
        "runs": dict(last.get("runs") or {}) if last.get("passed") else {},
        "why": "; ".join(each for each in why if each),
        "journal": list((failed or last).get("journal") or []),
        "seconds": dict(last.get("seconds") or {}),
        "start": dict(last.get("start") or {}),
        "canary": dict(last.get("canary") or {}),
    }
