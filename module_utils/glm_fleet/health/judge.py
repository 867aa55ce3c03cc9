# SPDX-License-Identifier: Apache-2.0
"""The verdict on each node and gateway: healthy, degraded, broken or unknown.

A node that answers as attested is at worst degraded; one that does not is broken, and the
faults of its hardware stand first because they are the likely cause. What happened "since
the last check" is told by the report of that check: each host's entry holds a ``baseline``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..core.systemd import UnitState
from ..fleet.inventory import GATEWAYS, NODES
from ..gateway.answer import GatewayAnswer
from ..node.answer import Facts, GpuFactsReport
from ..serving.engine import interval
from ..serving.probe import Probe
from .compare import compare_nodes
from .gateway import gateway_step, judge_gateway, states_of
from .hardware import Expectations, hardware_problems
from .records import LEFT, HostRecord, read_records, wrong_finding
from .rules import (
    UNDRAIN_STEP,
    acceptance_findings,
    artifact_findings,
    count_restarts,
    ecc_counts,
    gpu_slots,
    hardware_findings,
    link_target,
    no_answer,
    rehearsal_findings,
    service_findings,
    system_findings,
    without_old_xids,
)
from .verdict import (
    BROKEN,
    DEGRADED,
    HEALTHY,
    UNKNOWN,
    Finding,
    GatewayHealth,
    Limits,
    NodeHealth,
    worst,
)


def judge_fleet(
    records: Mapping[str, Mapping[str, Any]],
    *,
    limits: Limits,
    previous: Mapping[str, Any],
    time: str,
) -> tuple[list[NodeHealth], list[GatewayHealth]]:
    """Judge every host, and then the nodes against each other.

    ``records`` is what the role gathered of each host, see `read_records`; ``previous`` the
    report of the last check, {} when there was none.
    """
    hosts = read_records(records)
    earlier = {
        kind: {each["name"]: each.get("baseline") or {} for each in previous.get(kind, ())}
        for kind in ("nodes", "gateways")
    }
    answers: dict[str, GatewayAnswer] = {
        host: record.facts.get("gateway") or {}
        for host, record in hosts.items()
        if GATEWAYS in record.groups
    }
    held = {
        node: f"held out of service by {each['by']}: {each['reason']}"
        for answer in answers.values()
        for node, each in (answer.get("held") or {}).items()
    }
    gateways = [
        _judge_gateway_host(host, hosts[host], limits, earlier["gateways"].get(host, {}))
        for host in answers
    ]
    nodes = []
    for host, record in hosts.items():
        if NODES not in record.groups:
            continue
        states, before = states_of(host, answers), earlier["nodes"].get(host, {})
        if not record.answered:
            finding = _unread(states) if record.message == LEFT else _unknown(host, record)
            nodes.append(NodeHealth(host, [finding], gateway=states, baseline=before))
            continue
        expect = next(part["expect"] for part in record.expect if part["gpu_node"])
        nodes.append(
            judge_node(
                host,
                facts=record.facts,
                expect=Expectations.from_dict(expect),
                gateway=states,
                limits=limits,
                before=before,
                time=time,
                held=held.get(host, ""),
            )
        )
    return compare_nodes(nodes, limits, earlier["nodes"]), gateways


def _judge_gateway_host(
    host: str, record: HostRecord, limits: Limits, before: Mapping[str, Any]
) -> GatewayHealth:
    answer: GatewayAnswer = record.facts.get("gateway") or {}
    if not answer:
        return GatewayHealth(host, [_unknown(host, record)], baseline=before)
    now = float((record.facts.get("clock") or {}).get("epoch_s") or 0.0)
    judged = judge_gateway(host, gateway=answer, before=before, now=now)
    # A gateway that is a node too is judged as a host there.
    if NODES in record.groups:
        return judged
    (part,) = record.expect
    more = system_findings(record.facts, Expectations.from_dict(part["expect"]), limits)
    return replace(judged, findings=[*judged.findings, *more])


def _unread(states: Mapping[str, str]) -> Finding:
    """Judge a node that an earlier phase lost by what the gateways say: they check it always."""
    step = "mend what stopped it, see the errors above; then playbooks/health.yml reads it"
    known = [state for state in states.values() if state != "?"]
    if known and all(state == "UP" for state in known):
        cause = "it serves, as the gateways see it; an earlier phase of this run lost it"
        return Finding("run", DEGRADED, cause, step)
    told = ", ".join(f"{state} at {where}" for where, state in states.items()) or "no gateway"
    return Finding("run", UNKNOWN, f"an earlier phase of this run lost it ({told})", step)


def _unknown(host: str, record: HostRecord) -> Finding:
    """Say why nothing is known of a host."""
    if record.message == LEFT:
        return _unread({})
    if record.wrong:
        return wrong_finding(record.wrong)
    return no_answer(host, record.message or "; ".join(record.facts.get("errors", ())))


def judge_node(
    name: str,
    *,
    facts: Facts,
    expect: Expectations,
    gateway: Mapping[str, str],
    limits: Limits | None = None,
    before: Mapping[str, Any] | None = None,
    time: str = "",
    held: str = "",
) -> NodeHealth:
    """Judge one node from its ``facts``, of which ``attestation`` is `engine.look`'s.

    ``gateway`` is the node's state at each gateway, ``before`` its baseline from the last
    check that reached it, ``held`` says who keeps it out of service and why.
    """
    limits, before = limits or Limits(), before or {}
    probe: Probe = facts.get("attestation") or {}
    unit: UnitState = facts.get("unit") or {}
    restarts = count_restarts(unit, before)
    problems = hardware_problems(name, without_old_xids(facts, before), expect)
    findings = [
        *acceptance_findings(facts),
        *hardware_findings(problems, facts, limits, before),
        *rehearsal_findings(facts),
        *service_findings(facts, expect.unit, restarts),
        *system_findings(facts, expect, limits),
        *artifact_findings(facts),
    ]
    findings += _gateway_findings(gateway, held, broken=worst(findings) == BROKEN)
    engine = probe.get("engine") or {}
    after = engine.get("after") or {}
    same_start = before.get("invocation_id") == unit.get("invocation_id")
    speed = (probe.get("canary") or {}).get("tokens_per_second")
    return NodeHealth(
        name=name,
        findings=findings,
        gpus=_gpus(facts.get("gpu", {}), expect.gpu_count),
        release=str(probe.get("release_id") or link_target(facts, "current")),
        model=str(probe.get("model_id") or link_target(facts, "model")),
        unit=_unit(unit),
        attestation=_attestation(probe),
        tokens_per_second=speed if engine.get("state", "serving") == "serving" else None,
        gateway=gateway,
        engine=_engine_row(engine, (before.get("engine") or {}) if same_start else {}, restarts),
        problems=problems,
        facts=facts,
        probe=probe,
        baseline={
            "time": time,
            "epoch_s": facts.get("clock", {}).get("epoch_s"),
            "invocation_id": unit.get("invocation_id", ""),
            "n_restarts": unit.get("n_restarts", 0),
            "ecc": ecc_counts(facts),
            "gpus": gpu_slots(facts, before, expect.gpu_count),
            "engine": after,
        },
    )


def _engine_row(
    engine: Mapping[str, Any], before: Mapping[str, Any], restarts: int
) -> dict[str, Any]:
    after = engine.get("after") or {}
    return {
        "state": engine.get("state", ""),
        "phase": engine.get("phase", ""),
        "running": after.get("running"),
        "waiting": after.get("waiting"),
        "kv_cache_usage": after.get("kv_cache_usage"),
        "since": interval(before, after),
        "restarts": restarts,
    }


def _gateway_findings(gateway: Mapping[str, str], held: str, *, broken: bool) -> Iterator[Finding]:
    # A node that an operator took out is no fault, however long it stays out.
    if held:
        yield Finding("gateway", HEALTHY, held, UNDRAIN_STEP)
    for where, state in gateway.items():
        # A server that is down is what a broken node looks like from the gateway.
        if (
            state in ("UP", "?")
            or (broken and state == "DOWN")
            or (held and state in ("DRAIN", "MAINT"))
        ):
            continue
        by_whom = ", which is not by drain.yml" if state in ("DRAIN", "MAINT") else ""
        yield Finding("gateway", DEGRADED, f"{state} at {where}{by_whom}", gateway_step(state))


def _gpus(report: GpuFactsReport, expected: int) -> str:
    gpus = report.get("gpus", ())
    names = sorted({re.sub(r"^NVIDIA ", "", gpu["name"]) for gpu in gpus})
    return f"{len(gpus)}/{expected} {' + '.join(names)}".strip()


def _unit(unit: UnitState) -> str:
    if unit.get("load_state") != "loaded":
        return ""
    state, sub = unit.get("active_state", ""), unit.get("sub_state", "")
    return state if sub == "running" else f"{state} ({sub})"


def _attestation(probe: Probe) -> str:
    checks = probe.get("checks", ())
    if not checks:
        return ""
    passed = sum(bool(check["passed"]) for check in checks)
    return f"{'passed' if probe.get('passed') else 'failed'} {passed}/{len(checks)}"
