# SPDX-License-Identifier: Apache-2.0
"""From what nodes and gateways answered to the plan of a rollout, and to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.net import join_endpoint
from .endpoints import reached_at
from .outcome import UNTOUCHED
from .rollout import Load, NodeState, Plan, plan_roll
from .rollout_table import Ending


@dataclass(frozen=True)
class NodeAnswers:
    """What this run knows of a node.

    ``info`` is what the module `deployment` found or staged there, {} where it was not asked;
    ``variables`` are those that say where gateways reach the node; ``outcome`` is how its turn
    ended, as `outcome.Outcome`, {} where it had none.
    """

    name: str
    info: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    outcome: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FleetPlan:
    """The order of a rollout and what it is made of.

    ``moved`` are the nodes whose endpoint changes; ``targets`` and ``backs`` are {node: id of a
    deployment}: where it goes, and where it would go back to.
    """

    nodes: Sequence[NodeState]
    plan: Plan
    moved: Sequence[str]
    targets: Mapping[str, str]
    backs: Mapping[str, str]


class _Gateways:
    """Which nodes every gateway sends requests to, and at which endpoints."""

    def __init__(self, answers: Sequence[Mapping[str, Any]]) -> None:
        servers = [answer.get("servers") or [] for answer in answers]
        up = [{each["name"] for each in known if each["status"] == "UP"} for known in servers]
        ready = [
            {each["name"] for each in known if each["admin_state"] == "ready"} for known in servers
        ]
        # A node that is joined but down takes no requests: it is mended first, and never counts
        # as one that could not be spared.
        self.serving: set[str] = set.intersection(*up, *ready) if servers else set()
        self._endpoints = [
            {
                each["name"]: join_endpoint(str(each["address"]), int(each["port"]))
                for each in known
                if each.get("port")
            }
            for known in servers
        ]

        every = [each for known in servers for each in known]
        running = sum(int(each.get("sessions_current") or 0) for each in every)
        waiting = sum(int(answer.get("waiting") or 0) for answer in answers)
        self.requests = running + waiting

    def moved(self, node: NodeAnswers) -> str:
        """Say how the endpoint of a node changes; '' when it does not.

        A gateway that does not know the node yet gets it with its configuration.
        """
        port = (node.info.get("wanted") or {}).get("port")
        if not port:
            return ""
        new = reached_at({node.name: node.variables}, node.name, port)
        known = (each.get(node.name, new) for each in self._endpoints)
        old = sorted({each for each in known if each != new})
        return f"{' and '.join(old)} -> {new}" if old else ""


def found_or_staged(info: Mapping[str, Any], staged: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a node's deployment: what check mode did not stage is not on it."""
    results = staged.get("results")
    return dict(info if info.get("wanted") or not results else results[0])


def plan_fleet(
    nodes: Sequence[NodeAnswers],
    gateways: Sequence[Mapping[str, Any]],
    *,
    held: Mapping[str, Mapping[str, Any]],
    batch: Any,
    min_ready: Any,
    canary: str = "",
    slots: int = 0,
    full: float = 0.7,
) -> FleetPlan:
    """Plan a rollout of ``nodes`` from the answers of every gateway.

    ``held`` is {node: {reason}}; ``slots`` and ``full`` are those of `rollout.Load`.
    Raises `FleetError` as `plan_roll` does.
    """
    at = _Gateways(gateways)
    states = [
        _state(each, at, str((held.get(each.name) or {}).get("reason", ""))) for each in nodes
    ]
    plan = plan_roll(
        states,
        batch=batch,
        min_ready=min_ready,
        canary=canary,
        ready=len(at.serving),
        load=Load(at.requests, slots, full),
    )
    known = [each for each in nodes if each.info.get("wanted")]
    return FleetPlan(
        states,
        plan,
        sorted(each.name for each in states if each.moved),
        {each.name: each.info["wanted"]["id"] for each in known},
        {each.name: each.info.get("back") or "" for each in known},
    )


def _state(node: NodeAnswers, at: _Gateways, held: str) -> NodeState:
    info = node.info
    return NodeState(
        name=node.name,
        changes=(info.get("differences") or []) if info.get("wanted") else ["first start"],
        ready=node.name in at.serving,
        wanted=info.get("wanted") or {},
        current=info.get("current") or {},
        held=held,
        notes=[
            f"CUDA graphs {each['cuda_graphs']} are known to fail here: {each['reason']}"
            for each in info.get("skipped_rungs") or []
        ],
        moved=at.moved(node),
        starts=tuple(float(each) for each in info.get("starts") or ()),
    )


def endings(nodes: Sequence[NodeAnswers]) -> list[Ending]:
    """Return how the rollout ended for each node, also for those that had no turn."""
    return [_ended(each) if each.outcome else _had_no_turn(each) for each in nodes]


def _ended(node: NodeAnswers) -> Ending:
    told = node.outcome
    return Ending(node.name, told["state"], told["good"], told["runs"], told["why"],
                  told["journal"], told["start"], told["pages"])  # fmt: skip


def _had_no_turn(node: NodeAnswers) -> Ending:
    runs = (node.info.get("running") or {}).get("record") or {}
    why = "its turn did not come" if node.info.get("differences") else "runs what it should"
    return Ending(node.name, UNTOUCHED, True, runs, why)
