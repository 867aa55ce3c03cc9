# SPDX-License-Identifier: Apache-2.0
"""How a node differs from the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from .rules import SITE_STEP
from .verdict import DEGRADED, HEALTHY, Finding, Limits, NodeHealth, Verdict


def compare_nodes(
    nodes: Sequence[NodeHealth], limits: Limits, earlier: Mapping[str, Mapping[str, Any]]
) -> list[NodeHealth]:
    """Add to each node how it differs from the others: what it runs, and how fast."""
    added: dict[str, list[Finding]] = {node.name: [] for node in nodes}
    slow: set[str] = set()
    for what, verdict, step, values in _traits(nodes):
        counts = {value: list(values.values()).count(value) for value in values.values()}
        most = max(counts.values(), default=0)
        usual = [value for value, count in counts.items() if count == most]
        for name, value in values.items():
            if len(counts) == 1 or (len(usual) == 1 and value == usual[0]):
                continue
            others = sorted(other for other in values if values[other] != value)
            listed = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
            cause = f"its {what} is {value}, that of {listed} is {values[others[0]]}"
            added[name].append(Finding(f"{what} drift", verdict, cause, step))
    speeds = {
        node.name: node.tokens_per_second
        for node in nodes
        # A canary among other requests measures them.
        if node.tokens_per_second and not _others_running(node)
    }
    started = {node.name: node.baseline.get("invocation_id") for node in nodes}
    if len(speeds) > 1:
        usual_speed = median(speeds.values())
        for name, speed in speeds.items():
            if speed >= limits.slow_ratio * usual_speed:
                continue
            slow.add(name)
            # Once may be chance: the second time in a row of one start is a fault.
            before = earlier.get(name) or {}
            again = before.get("slow") and before.get("invocation_id") == started[name]
            cause = (
                f"its canary ran at {speed:.1f} tok/s, the fleet's median is {usual_speed:.1f}"
                f"{', again' if again else ''}"
            )
            added[name].append(
                Finding(
                    "speed",
                    DEGRADED if again else HEALTHY,
                    cause,
                    "compare clocks, temperature and links of its GPUs: nvidia-smi -q; topo -m",
                )
            )
    return [
        replace(
            node,
            findings=[*node.findings, *added[node.name]],
            baseline={**node.baseline, "slow": node.name in slow} if node.facts else node.baseline,
        )
        for node in nodes
    ]


def _traits(
    nodes: Sequence[NodeHealth],
) -> Iterator[tuple[str, Verdict, str, dict[str, str]]]:
    """What should be the same on every node: (name, verdict on the odd one, step, values)."""
    seen = [node for node in nodes if node.facts]

    def values(read: Any) -> dict[str, str]:
        return {node.name: value for node in seen if (value := str(read(node) or ""))}

    yield "release", DEGRADED, SITE_STEP, values(lambda node: node.release)
    yield "model", DEGRADED, SITE_STEP, values(lambda node: node.model)
    yield "command line", DEGRADED, SITE_STEP, values(_flags)
    step = "install the same driver on every node, one drained node at a time"
    yield (
        "driver",
        DEGRADED,
        step,
        values(lambda node: node.facts.get("gpu", {}).get("driver_version")),
    )
    step = "reboot into the same kernel when the node is next drained"
    yield "kernel", HEALTHY, step, values(lambda node: node.facts.get("os", {}).get("kernel"))


def _flags(node: NodeHealth) -> str:
    """The arguments of the server that runs, without where its programs lie."""
    for process in node.facts.get("vllm_processes", ()):
        _, found, arguments = process.get("command", "").partition(" serve ")
        if found and process["unit"] == node.facts.get("unit", {}).get("name"):
            return arguments
    return ""


def _others_running(node: NodeHealth) -> bool:
    before = ((node.probe.get("engine") or {}).get("before")) or {}
    return bool(before.get("running") or before.get("waiting"))
