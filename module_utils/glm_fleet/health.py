# SPDX-License-Identifier: Apache-2.0
"""The verdict on each node and gateway: healthy, degraded, broken or unknown.

A node that answers as attested is at worst degraded; one that does not is broken, and the
faults of its hardware stand first because they are the likely cause.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from .preflight import ERROR, Expectations, Problem, hardware_problems

HEALTHY = "healthy"
DEGRADED = "degraded"
BROKEN = "broken"
UNKNOWN = "unknown"
VERDICTS = (HEALTHY, DEGRADED, BROKEN, UNKNOWN)

# A disk that lost a folder would fill the table.
_DAMAGE_SHOWN = 5


@dataclass(frozen=True)
class NodeHealth:
    """One row of the fleet's table; ``gateway`` is {gateway: UP|DOWN|DRAIN|MAINT|absent|?}."""

    name: str
    verdict: str
    reasons: Sequence[str] = ()
    next_step: str = ""
    gpus: str = "-"
    release: str = ""
    model: str = ""
    unit: str = ""
    attestation: str = ""
    tokens_per_second: float | None = None
    gateway: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gateway_cell(self) -> str:
        """Return the one state at all gateways, or each by name when they differ."""
        states = set(self.gateway.values())
        if len(states) <= 1:
            return "".join(states)
        return ", ".join(f"{name} {state}" for name, state in self.gateway.items())

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: the row, and the facts and checks that it was made from."""
        return asdict(self)


@dataclass(frozen=True)
class GatewayHealth:
    """One gateway; ``up`` counts the servers that take requests."""

    name: str
    verdict: str
    reasons: Sequence[str] = ()
    next_step: str = ""
    version: str = ""
    up: int = 0
    servers: Sequence[Mapping[str, Any]] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def unknown_node(name: str, message: str, gateway: Mapping[str, str]) -> NodeHealth:
    """Return the row of a node that gave no facts; ``message`` says why."""
    return NodeHealth(
        name,
        UNKNOWN,
        (f"no answer: {' '.join(message.split())[:200].rstrip('.')}",),
        f"check power and network, then try: ansible -i INVENTORY -b -m ping {name}",
        gateway=gateway,
    )


def judge_node(
    name: str,
    *,
    facts: Mapping[str, Any],
    probe: Mapping[str, Any],
    expect: Expectations,
    gateway: Mapping[str, str],
    probe_error: str = "",
    artifacts: Sequence[Mapping[str, Any]] = (),
    artifacts_error: str = "",
) -> NodeHealth:
    """Judge one node.

    ``probe`` is the attestation of vllm_probe ({} when it was not asked or ended with
    ``probe_error``), ``gateway`` the node's state at each gateway, ``artifacts`` what the
    module artifact found wrong with the active ones (kind, id, damage), unless it ended with
    ``artifacts_error``.
    """
    unit = facts.get("unit", {})
    problems = hardware_problems(name, facts, expect)
    verdict, reasons, next_step = _service(unit, probe, probe_error, expect.unit)
    damage = [
        f"{artifact['kind']} {artifact['id']}: {each['path']} {each['reason']} ({each['found']})"
        for artifact in artifacts
        for each in artifact["damage"]
    ]
    if damage:
        verdict, reasons = BROKEN, [*damage[:_DAMAGE_SHOWN], *reasons]
        next_step = "run site.yml: it fetches only these files again; have the disk looked at"
    elif artifacts_error:
        verdict = DEGRADED if verdict == HEALTHY else verdict
        reasons = [f"its artifacts cannot be verified: {artifacts_error}", *reasons]
        next_step = next_step or "look at the disk of the node"
    hardware = [f"{each.check}: {each.found}" for each in problems if each.severity == ERROR]
    if hardware:
        reasons = [*hardware, *reasons]
        verdict = DEGRADED if verdict == HEALTHY else verdict
        first = next(each for each in problems if each.severity == ERROR)
        next_step = first.remedy
    away = [f"{state} at {where}" for where, state in gateway.items() if state != "UP"]
    if verdict == HEALTHY and away:
        verdict, reasons = DEGRADED, away
        next_step = "run site.yml when it should take requests: it attests and joins the node"
    return NodeHealth(
        name=name,
        verdict=verdict,
        reasons=reasons,
        next_step=next_step,
        gpus=_gpus(facts.get("gpu", {}), expect.gpu_count),
        release=_target(facts, "current"),
        model=_target(facts, "model"),
        unit=_unit(unit),
        attestation=_attestation(probe),
        tokens_per_second=(probe.get("canary") or {}).get("tokens_per_second"),
        gateway=gateway,
        problems=problems,
        facts=facts,
        probe=probe,
    )


def judge_gateway(name: str, *, message: str, gateway: Mapping[str, Any]) -> GatewayHealth:
    """Judge one gateway from ``gateway`` of haproxy_info ({} when it ended with ``message``)."""
    servers = list(gateway.get("servers", ()))
    up = sum(server["status"] == "UP" for server in servers)
    version = str(gateway.get("version") or "")
    if message and not gateway:
        return GatewayHealth(
            name,
            UNKNOWN,
            (f"no answer: {' '.join(message.split())[:200].rstrip('.')}",),
            f"check power and network, then try: ansible -i INVENTORY -b -m ping {name}",
        )
    errors = [str(error) for error in gateway.get("errors", ())]
    if not gateway.get("valid"):
        errors.insert(0, "its configuration is not valid, or HAProxy is not installed")
    if not up:
        errors.append("no server is UP")
    if errors:
        verdict = BROKEN if not up else DEGRADED
        step = "on the gateway: haproxy -c -f /etc/haproxy/haproxy.cfg; journalctl -u haproxy"
        return GatewayHealth(name, verdict, errors, step, version, up, servers)
    return GatewayHealth(name, HEALTHY, (), "", version, up, servers)


def states_of(node: str, gateways: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the state of a node at each gateway; "?" where the gateway gave no answer."""
    states = {}
    for name, gateway in gateways.items():
        servers = {server["name"]: server["status"] for server in gateway.get("servers", ())}
        states[name] = str(servers.get(node, "absent")) if gateway else "?"
    return states


def _service(
    unit: Mapping[str, Any], probe: Mapping[str, Any], probe_error: str, name: str
) -> tuple[str, list[str], str]:
    state, sub = unit.get("active_state", ""), unit.get("sub_state", "")
    log = f"journalctl -u {name}"
    if unit.get("load_state") != "loaded":
        return BROKEN, ["nothing is deployed"], "run site.yml"
    if state == "activating" and sub != "auto-restart":
        return DEGRADED, ["the service is starting"], f"wait; follow it with {log} -f"
    if state != "active":
        return BROKEN, [f"the service is {state} ({sub})"], f"read {log}, then run site.yml"
    if not probe.get("passed"):
        failed = [
            f"{check['name']}: {check['detail']}"
            for check in probe.get("checks", ())
            if not check["passed"]
        ]
        reasons = failed or [probe_error or "the attestation gave no result"]
        return BROKEN, reasons, f"drain it, read {log}, then run site.yml"
    if unit.get("n_restarts"):
        return DEGRADED, [f"systemd restarted it {unit['n_restarts']} times"], f"read {log}"
    return HEALTHY, [], ""


def _gpus(report: Mapping[str, Any], expected: int) -> str:
    gpus = report.get("gpus", ())
    names = sorted({re.sub(r"^NVIDIA ", "", gpu["name"]) for gpu in gpus})
    return f"{len(gpus)}/{expected} {' + '.join(names)}".strip()


def _target(facts: Mapping[str, Any], link: str) -> str:
    target = (facts.get("links", {}).get(link) or {}).get("target")
    return PurePosixPath(target).name if target else ""


def _unit(unit: Mapping[str, Any]) -> str:
    if unit.get("load_state") != "loaded":
        return ""
    state, sub = unit["active_state"], unit["sub_state"]
    return str(state) if sub == "running" else f"{state} ({sub})"


def _attestation(probe: Mapping[str, Any]) -> str:
    checks = probe.get("checks", ())
    if not probe:
        return ""
    passed = sum(bool(check["passed"]) for check in checks)
    return f"{'passed' if probe.get('passed') else 'failed'} {passed}/{len(checks)}"
