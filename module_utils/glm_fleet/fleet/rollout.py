# SPDX-License-Identifier: Apache-2.0
"""Rolling: in which order nodes are taken out, and what a roll-back goes back to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..core.errors import FleetError

RESTART = "restart"
JOIN = "join"
ROLL_BACK = "rollback"
# Batches as large as the load allows, and never more than this share of the nodes at once: what
# is wrong with a release shows in the first batches.
AUTO = "auto"
_MOST = 4


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
class Load:
    """What the fleet has to do when the roll is planned.

    ``requests`` run or wait at the gateways, a node runs ``slots`` at once (0: nobody knows), and
    the nodes that stay may become ``full``, a share of their slots.
    """

    requests: int = 0
    slots: int = 0
    full: float = 0.7

    @property
    def needed(self) -> int:
        """Return how many nodes it takes."""
        return math.ceil(self.requests / (self.slots * self.full)) if self.slots else 0


@dataclass(frozen=True)
class Forecast:
    """How long a roll takes without its drains, in seconds; 0.0 where nobody recorded a start.

    ``fewest`` is how many nodes take requests at the worst moment.
    """

    seconds: float
    fewest: int


@dataclass(frozen=True)
class Planned:
    """One node's part in the roll: RESTART or JOIN, and in which batch, from 1."""

    node: str
    kind: str
    batch: int


@dataclass(frozen=True)
class Plan:
    """The order of the roll; ``batches`` are sizes, as Ansible's ``serial`` takes them.

    ``pace`` says why batches are as large as they are, '' where an operator said so.
    """

    turns: Sequence[Planned]
    batches: Sequence[int]
    pace: str = ""


def batch_size(text: Any, nodes: int) -> int:
    """Return the nodes in a batch: a count, or a percentage of the fleet, at least 1.

    `AUTO` is the most that a batch may have then; see `paced`.
    """
    if str(text).strip() == AUTO:
        return max(1, nodes // _MOST)
    found = re.fullmatch(r"(\d+)(%?)", str(text).strip())
    number = int(found.group(1)) if found else 0
    if found is None or number < 1 or (found.group(2) and number > 100):
        raise FleetError(
            "The size of a batch cannot be read",
            expected="serve_batch to be a number of nodes from 1, a percentage up to 100%, or auto",
            found=repr(text),
        )
    return max(1, nodes * number // 100) if found.group(2) else number


def paced(most: int, ready: int, load: Load) -> tuple[int, str]:
    """Return how many of ``ready`` nodes the load spares at once, up to ``most``, and why."""
    if not load.slots:
        return 1, "one at a time: without serving_max_num_seqs nobody knows what a node can take"
    told = (
        f"{load.requests} requests run or wait, which takes {load.needed} of {ready} nodes at "
        f"{load.full:.0%} of {load.slots} requests each"
    )
    spare = ready - load.needed
    if spare < 1:
        return 1, f"one at a time: {told}; better when less is asked"
    return min(most, spare), f"batches of {min(most, spare)}: {told}"


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
    nodes: Sequence[NodeState],
    *,
    batch: Any,
    min_ready: Any,
    canary: str = "",
    ready: int,
    load: Load = Load(),
) -> Plan:
    """Put the nodes in order: those that cost nothing first, one canary, then batch by batch.

    Nodes that are down and get what ran there before are mended together: one that cannot be mended
    keeps no other from it, and they try nothing new.
    A node that takes no requests anyway is the best canary, unless it is held: that one may be
    broken, and comes last. With ``batch`` `AUTO` the ``load`` says how many are spared at once.
    ``ready`` counts the nodes of the whole fleet that take requests
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
    if serving:
        _require_room(later, least)
    pace = ""
    if serving and str(batch).strip() == AUTO:
        size, pace = paced(size, later, load)
    size = max(1, min(size, later - least))
    groups = [joining, mending, idle[:1], idle[1:]]
    if serving and not idle:
        groups.append(serving[:1])
        serving = serving[1:]
    groups += [serving[begin : begin + size] for begin in range(0, len(serving), size)]
    groups.append(held)
    groups = [group for group in groups if group]
    turns = [
        Planned(each.name, RESTART if each.changes else JOIN, number)
        for number, group in enumerate(groups, 1)
        for each in group
    ]
    return Plan(turns, [len(group) for group in groups], pace)


def _require_room(ready: int, least: int) -> None:
    if ready <= least:
        raise FleetError(
            "No node can be taken out of service",
            expected=f"more than serve_min_ready={least} nodes that take requests",
            found=f"{ready}",
            remedy="mend or add nodes, or allow an outage with a lower serve_min_ready",
        )


def first_to_try(nodes: Sequence[NodeState], plan: Plan) -> str:
    """Name the node that is the first to run what it gets, '' if one of them runs it already."""
    by_name = {each.name: each for each in nodes}
    proven = {each.wanted.get("id") for each in nodes if each.ready and not each.changes}
    for turn in plan.turns:
        node = by_name[turn.node]
        if turn.kind == RESTART and not _gets_the_same(node):
            return "" if node.wanted.get("id") in proven else node.name
    return ""


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
