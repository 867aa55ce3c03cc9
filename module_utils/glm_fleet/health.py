# SPDX-License-Identifier: Apache-2.0
"""The verdict on each node and gateway: healthy, degraded, broken or unknown.

A node that answers as attested is at worst degraded; one that does not is broken, and the
faults of its hardware stand first because they are the likely cause. What happened "since
the last check" is told by the report of that check: each host's entry holds a ``baseline``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import PurePosixPath
from statistics import median
from typing import Any

from .engine import interval
from .errors import FleetError
from .preflight import ERROR, Expectations, Problem, hardware_problems
from .progress import human_bytes

HEALTHY = "healthy"
DEGRADED = "degraded"
BROKEN = "broken"
UNKNOWN = "unknown"
VERDICTS = (HEALTHY, DEGRADED, BROKEN, UNKNOWN)

_DEGRADING = ("throttling",)
_SITE = "run site.yml: it drains, restarts and attests the node"
_UNDRAIN = "playbooks/undrain.yml lets it back when that is over"


@dataclass(frozen=True)
class Limits:
    """From where on a figure is a fault; the ``health_*`` variables of these names.

    ``slow_ratio`` is the share of the fleet's median canary speed below which a node is slow.
    """

    disk_free_percent: float = 5.0
    memory_free_percent: float = 3.0
    gpu_temperature_c: float = 88.0
    slow_ratio: float = 0.6

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limits:
        """Read plain data. Raises `FleetError` for what is not a limit or not a number."""
        known = {each.name for each in fields(cls)}
        try:
            if not set(data) <= known:
                raise ValueError(f"unknown: {', '.join(sorted(set(data) - known))}")  # noqa: TRY301
            return cls(**{name: float(value) for name, value in data.items()})
        except (TypeError, ValueError) as error:
            raise FleetError(
                "The limits of the health check are not right",
                expected=f"numbers for {', '.join(sorted(known))}",
                found=str(error),
            ) from error


@dataclass(frozen=True)
class Finding:
    """One thing about a host: a ``healthy`` one is a note, which fails nothing."""

    check: str
    verdict: str
    cause: str
    next_step: str = ""


class Judged:
    """What follows from the findings about a host."""

    findings: Sequence[Finding]

    @property
    def verdict(self) -> str:
        """Return the worst verdict of the findings."""
        return worst(self.findings)

    @property
    def reasons(self) -> list[str]:
        """Return what is wrong, a sentence each."""
        return [each.cause for each in faults(self.findings)]

    @property
    def next_step(self) -> str:
        """Return what to do about the first fault."""
        return next((each.next_step for each in faults(self.findings)), "")

    def _summed_up(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": self.reasons, "next_step": self.next_step}


@dataclass(frozen=True)
class NodeHealth(Judged):
    """One row of the fleet's table; ``gateway`` is {gateway: UP|DOWN|DRAIN|MAINT|absent|?}."""

    name: str
    findings: Sequence[Finding] = ()
    gpus: str = "-"
    release: str = ""
    model: str = ""
    unit: str = ""
    attestation: str = ""
    tokens_per_second: float | None = None
    gateway: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] = field(default_factory=dict)
    baseline: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gateway_cell(self) -> str:
        """Return the one state at all gateways, or each by name when they differ."""
        states = set(self.gateway.values())
        if len(states) <= 1:
            return "".join(states)
        return ", ".join(f"{name} {state}" for name, state in self.gateway.items())

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: the row, and the facts and checks that it was made from."""
        return {**asdict(self), **self._summed_up()}


@dataclass(frozen=True)
class GatewayHealth(Judged):
    """One gateway; ``up`` counts the servers that take requests.

    Each of ``servers`` has ``sent``: the requests it got since the last check.
    """

    name: str
    findings: Sequence[Finding] = ()
    version: str = ""
    up: int = 0
    servers: Sequence[Mapping[str, Any]] = ()
    client: Mapping[str, Any] = field(default_factory=dict)
    baseline: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), **self._summed_up()}


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst verdict; healthy when there is none."""
    return max((each.verdict for each in findings), key=VERDICTS.index, default=HEALTHY)


def faults(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that are more than a note."""
    return [each for each in findings if each.verdict != HEALTHY]


def judge_fleet(
    records: Mapping[str, Mapping[str, Any]],
    *,
    limits: Limits,
    previous: Mapping[str, Any],
    time: str,
) -> tuple[list[NodeHealth], list[GatewayHealth]]:
    """Judge every host, and then the nodes against each other.

    ``records`` is what the role gathered of each host: {message, groups, node, expect};
    ``previous`` the report of the last check, {} when there was none.
    """
    earlier = {
        kind: {each["name"]: each.get("baseline") or {} for each in previous.get(kind, ())}
        for kind in ("nodes", "gateways")
    }
    answers = {
        host: (record.get("node") or {}).get("gateway") or {}
        for host, record in records.items()
        if "gateways" in record["groups"]
    }
    held = {
        node: f"held out of service by {each['by']}: {each['reason']}"
        for answer in answers.values()
        for node, each in (answer.get("held") or {}).items()
    }
    gateways = []
    for host, answer in answers.items():
        judged = judge_gateway(
            host,
            message=str(records[host]["message"]),
            gateway=answer,
            before=earlier["gateways"].get(host, {}),
        )
        # A gateway that is a node too is judged as a host there.
        if answer and "gpu_nodes" not in records[host]["groups"]:
            (part,) = records[host]["expect"]
            expect = Expectations.from_dict(part["expect"])
            more = _system(records[host]["node"], expect, limits)
            judged = replace(judged, findings=[*judged.findings, *more])
        gateways.append(judged)
    nodes = []
    for host, record in records.items():
        if "gpu_nodes" not in record["groups"]:
            continue
        states, before = states_of(host, answers), earlier["nodes"].get(host, {})
        if record["message"]:
            nodes.append(unknown_node(host, str(record["message"]), states, before))
            continue
        expect = next(part["expect"] for part in record["expect"] if part["gpu_node"])
        nodes.append(
            judge_node(
                host,
                facts=record["node"],
                expect=Expectations.from_dict(expect),
                gateway=states,
                limits=limits,
                before=before,
                time=time,
                held=held.get(host, ""),
            )
        )
    return compare_nodes(nodes, limits, earlier["nodes"]), gateways


def unknown_node(
    name: str, message: str, gateway: Mapping[str, str], before: Mapping[str, Any] | None = None
) -> NodeHealth:
    """Return the row of a node that gave no facts; ``message`` says why."""
    return NodeHealth(name, [_no_answer(name, message)], gateway=gateway, baseline=before or {})


def judge_node(
    name: str,
    *,
    facts: Mapping[str, Any],
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
    probe: Mapping[str, Any] = facts.get("attestation") or {}
    unit = facts.get("unit", {})
    restarts = _restarts(unit, before)
    problems = hardware_problems(name, _without_old_xids(facts, before), expect)
    findings = [
        *_hardware(problems, facts, limits, before),
        *_service(facts, expect.unit, restarts),
        *_system(facts, expect, limits),
        *_artifacts(facts),
    ]
    broken = worst(findings) == BROKEN
    # On purpose is no fault, however long it lasts.
    findings += [Finding("gateway", HEALTHY, held, _UNDRAIN)] if held else []
    findings += [
        Finding("gateway", DEGRADED, f"{state} at {where}", _gateway_step(state))
        for where, state in gateway.items()
        # A server that is down is what a broken node looks like from the gateway.
        if state not in ("UP", "?")
        and not (broken and state == "DOWN")
        and not (held and state in ("DRAIN", "MAINT"))
    ]
    engine = probe.get("engine") or {}
    after = engine.get("after") or {}
    same_start = before.get("invocation_id") == unit.get("invocation_id")
    speed = (probe.get("canary") or {}).get("tokens_per_second")
    return NodeHealth(
        name=name,
        findings=findings,
        gpus=_gpus(facts.get("gpu", {}), expect.gpu_count),
        release=str(probe.get("release_id") or _target(facts, "current")),
        model=str(probe.get("model_id") or _target(facts, "model")),
        unit=_unit(unit),
        attestation=_attestation(probe),
        tokens_per_second=speed if engine.get("state", "serving") == "serving" else None,
        gateway=gateway,
        engine={
            "state": engine.get("state", ""),
            "phase": engine.get("phase", ""),
            "running": after.get("running"),
            "waiting": after.get("waiting"),
            "kv_cache_usage": after.get("kv_cache_usage"),
            "since": interval((before.get("engine") or {}) if same_start else {}, after),
            "restarts": restarts,
        },
        problems=problems,
        facts=facts,
        probe=probe,
        baseline={
            "time": time,
            "epoch_s": facts.get("clock", {}).get("epoch_s"),
            "invocation_id": unit.get("invocation_id", ""),
            "n_restarts": unit.get("n_restarts", 0),
            "ecc": _ecc(facts),
            "gpus": _slots(facts, before, expect.gpu_count),
            "engine": after,
        },
    )


def judge_gateway(
    name: str, *, message: str, gateway: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> GatewayHealth:
    """Judge one gateway from ``gateway`` of node_info ({} when it ended with ``message``)."""
    before = before or {}
    if not gateway:
        return GatewayHealth(name, [_no_answer(name, message)], baseline=before)
    sent_before: Mapping[str, int] = before.get("sent") or {}
    servers = []
    for server in gateway.get("servers", ()):
        total, earlier = server.get("sessions_total", 0), sent_before.get(server["name"], 0)
        # A reload counts anew.
        servers.append({**server, "sent": total - earlier if total >= earlier else total})
    up = sum(server["status"] == "UP" for server in servers)
    findings = []
    for error in gateway.get("errors", ()):
        cause, _, step = str(error).partition(" What to do: ")
        step = step.rstrip(".") or "on the gateway: journalctl -u haproxy"
        findings.append(Finding("HAProxy", BROKEN, cause.rstrip("."), step))
    if not gateway.get("valid") and not findings:
        findings.append(
            Finding("HAProxy", BROKEN, "HAProxy does not answer", "run playbooks/gateway.yml")
        )
    if gateway.get("config_error"):
        findings.append(
            Finding(
                "configuration",
                DEGRADED,
                f"the configuration on disk is not valid: {gateway['config_error']}",
                "run playbooks/gateway.yml before HAProxy is restarted",
            )
        )
    if not up and gateway.get("valid"):
        step = "mend the nodes, then run site.yml: it attests and joins them"
        findings.append(Finding("servers", BROKEN, "no server is UP", step))
    client = gateway.get("client") or {}
    if up and client and client.get("status") != 200:
        found = client.get("error") or f"HTTP {client.get('status')}"
        findings.append(
            Finding(
                "clients' path",
                BROKEN,
                f"a request through the front door failed: {found}",
                "on the gateway: journalctl -u haproxy; check certificate, port and firewall",
            )
        )
    return GatewayHealth(
        name,
        findings,
        str(gateway.get("version") or ""),
        up,
        servers,
        client,
        {"sent": {server["name"]: server.get("sessions_total", 0) for server in servers}},
    )


def states_of(node: str, gateways: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the state of a node at each gateway; "?" where the gateway gave no answer."""
    states = {}
    for name, gateway in gateways.items():
        servers = {server["name"]: server["status"] for server in gateway.get("servers", ())}
        states[name] = str(servers.get(node, "absent")) if gateway.get("valid") else "?"
    return states


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
) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """What should be the same on every node: (name, verdict on the odd one, step, values)."""
    seen = [node for node in nodes if node.facts]

    def values(read: Any) -> dict[str, str]:
        return {node.name: value for node in seen if (value := str(read(node) or ""))}

    yield "release", DEGRADED, _SITE, values(lambda node: node.release)
    yield "model", DEGRADED, _SITE, values(lambda node: node.model)
    yield "command line", DEGRADED, _SITE, values(_flags)
    step = "install the same driver on every node, one drained node at a time"
    yield "driver", DEGRADED, step, values(lambda node: node.facts["gpu"]["driver_version"])
    step = "reboot into the same kernel when the node is next drained"
    yield "kernel", HEALTHY, step, values(lambda node: node.facts["os"].get("kernel"))


def _flags(node: NodeHealth) -> str:
    """The arguments of the server that runs, without where its programs lie."""
    for process in node.facts.get("vllm_processes", ()):
        _, found, arguments = process["command"].partition(" serve ")
        if found and process["unit"] == node.facts.get("unit", {}).get("name"):
            return str(arguments)
    return ""


def _others_running(node: NodeHealth) -> bool:
    before = ((node.probe.get("engine") or {}).get("before")) or {}
    return bool(before.get("running") or before.get("waiting"))


def _no_answer(name: str, message: str) -> Finding:
    return Finding(
        "connection",
        UNKNOWN,
        f"no answer: {' '.join(message.split())[:200].rstrip('.') or 'nothing was said'}",
        f"check power and network, then try: ansible -i INVENTORY -b -m ping {name}",
    )


def _restarts(unit: Mapping[str, Any], before: Mapping[str, Any]) -> int:
    """How often systemd restarted the service since the last check, or since its start."""
    now = int(unit.get("n_restarts") or 0)
    earlier = int(before.get("n_restarts") or 0)
    # Somebody's own restart sets systemd's count back.
    return now - earlier if now >= earlier else now


def _without_old_xids(facts: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    seen_until = before.get("epoch_s") or 0.0
    return {**facts, "xids": [xid for xid in facts.get("xids", ()) if xid["time_s"] > seen_until]}


def _ecc(facts: Mapping[str, Any]) -> dict[str, int]:
    return {
        gpu["uuid"]: gpu["volatile_uncorrectable"]
        for gpu in facts.get("gpu", {}).get("gpus", ())
        if gpu["volatile_uncorrectable"]
    }


def missing_gpus(facts: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return the bus ids of GPUs that an earlier check saw and that are gone now."""
    present = {gpu["bus_id"] for gpu in facts.get("gpu", {}).get("gpus", ())}
    return [bus for bus in before.get("gpus") or () if bus not in present]


def _slots(facts: Mapping[str, Any], before: Mapping[str, Any], expected: int) -> list[str]:
    """Return the bus ids of the GPUs, the lost ones included: the driver numbers the rest anew."""
    present = [gpu["bus_id"] for gpu in facts.get("gpu", {}).get("gpus", ())]
    return present if len(present) >= expected else sorted({*present, *missing_gpus(facts, before)})


def _hardware(
    problems: Sequence[Problem],
    facts: Mapping[str, Any],
    limits: Limits,
    before: Mapping[str, Any],
) -> Iterator[Finding]:
    new_errors = sum(
        max(0, count - (before.get("ecc") or {}).get(uuid, 0))
        for uuid, count in _ecc(facts).items()
    )
    for each in problems:
        faulty = each.severity == ERROR or each.check in _DEGRADING
        cause = f"{each.check}: {each.found}"
        lost = missing_gpus(facts, before)
        if each.check == "GPU count" and lost:
            cause += f", missing {', '.join(lost)}"
        if each.check == "ECC errors" and before:
            cause += f", {new_errors or 'none'} of them since the last check"
        yield Finding(each.check, DEGRADED if faulty else HEALTHY, cause, each.remedy)
    hot = [
        f"{gpu['temperature_c']} °C on GPU {gpu['index']}"
        for gpu in facts.get("gpu", {}).get("gpus", ())
        if (gpu.get("temperature_c") or 0) >= limits.gpu_temperature_c
    ]
    if hot:
        cause = f"temperature: {', '.join(hot)}"
        yield Finding("temperature", DEGRADED, cause, "check cooling and air flow of the node")
    seen_until = before.get("epoch_s") or 0.0
    old = sorted(
        {
            f"{xid['kind']} {xid['code']}"
            for xid in facts.get("xids", ())
            if xid["time_s"] <= seen_until
        }
    )
    if old:
        cause = f"in the kernel log from before the last check: {', '.join(old)}"
        yield Finding("Xid history", HEALTHY, cause, "nothing, unless it comes again")


def _service(facts: Mapping[str, Any], name: str, restarts: int) -> Iterator[Finding]:
    unit, probe = facts.get("unit", {}), facts.get("attestation") or {}
    state, sub = unit.get("active_state", ""), unit.get("sub_state", "")
    engine = probe.get("engine") or {}
    log = f"journalctl -u {name}"
    times = f"{restarts} time{'' if restarts == 1 else 's'} since the last check"
    said = probe.get("diagnosis") or next(iter(reversed(probe.get("journal") or [])), "")
    died = f"{'; ' + said if said else ''}"

    def finding(verdict: str, cause: str, step: str) -> Finding:
        return Finding("service", verdict, cause, step)

    if unit.get("load_state") != "loaded":
        yield finding(BROKEN, "nothing is deployed", "run site.yml")
    elif state != "active" and not (state == "activating" and sub != "auto-restart"):
        cause = f"the engine is down: the service is {state} ({sub}){died}"
        yield finding(BROKEN, cause, f"read {log}, then run site.yml")
    elif state == "activating" or engine.get("state") == "starting":
        phase = engine.get("phase") or sub
        if restarts:
            cause = f"the engine died and was restarted {times}; now: {phase}{died}"
            yield finding(BROKEN, cause, f"read {log}; follow the start with {log} -f")
        else:
            cause = f"the service is starting: {phase}"
            yield finding(DEGRADED, cause, f"wait; follow it with {log} -f")
    elif facts.get("attestation_error") or not probe:
        reason = facts.get("attestation_error") or "the attestation gave no result"
        yield finding(BROKEN, str(reason), f"drain it, read {log}, then run site.yml")
    else:
        yield from _running(probe, engine, log)
        if restarts:
            yield finding(
                DEGRADED,
                f"the engine died: systemd restarted it {times}{died}",
                f"read {log}: the last lines before the restart say why",
            )


def _running(probe: Mapping[str, Any], engine: Mapping[str, Any], log: str) -> Iterator[Finding]:
    """What is wrong with a service that is active and was ready."""
    after = engine.get("after") or {}
    waited = f"{engine.get('seconds', 0):.0f} s"
    state = engine.get("state")
    if state == "silent":
        cause = "the server does not answer although its process runs"
        yield Finding("engine", BROKEN, cause, f"restart it: systemctl restart; read {log}")
        return
    if state == "hung":
        cause = (
            f"the engine hangs: no answer and no step in {waited}, "
            f"{after.get('running', 0):.0f} requests running"
        )
        yield Finding(
            "engine",
            BROKEN,
            cause,
            "drain it and restart the service; stacks that the watch saved are in "
            "/var/lib/glm-fleet/incidents",
        )
    ignored = {"canary answers", "tokens advance in the metrics"}
    if state == "busy":
        cause = (
            f"busy: the canary waited {waited} behind {after.get('running', 0):.0f} running and "
            f"{after.get('waiting', 0):.0f} waiting requests"
        )
        yield Finding("load", DEGRADED, cause, "send it fewer requests, or add a node")
    for check in probe.get("checks", ()):
        if check["passed"] or (state in ("hung", "busy") and check["name"] in ignored):
            continue
        runs, _, wanted = check["detail"].partition(", wanted ")
        if check["name"] in ("release that runs", "model that runs"):
            what = check["name"].split()[0]
            cause = f"an old {what} still runs: {runs}, and {wanted} is active on disk"
            yield Finding(what, BROKEN, cause, _SITE)
        else:
            step = probe.get("diagnosis") or f"drain it, read {log}, then run site.yml"
            yield Finding("attestation", BROKEN, f"{check['name']}: {check['detail']}", step)


def _system(facts: Mapping[str, Any], expect: Expectations, limits: Limits) -> Iterator[Finding]:
    skew = facts.get("clock", {}).get("skew_s")
    if skew is not None and abs(skew) > expect.clock_skew_s:
        cause = f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} ours"
        step = "start a time service (chrony) on the host, or on the controller"
        yield Finding("clock", DEGRADED, cause, step)
    for disk in {disk["device"]: disk for disk in facts.get("disks", ())}.values():
        free, total = disk["free_bytes"], disk["total_bytes"]
        if total and free * 100 < limits.disk_free_percent * total:
            cause = (
                f"the disk at {disk['mount']} is nearly full: {human_bytes(free)} of "
                f"{human_bytes(total)} free"
            )
            step = "remove what does not belong there, old artifacts or logs; see du -xh"
            yield Finding("disk", DEGRADED, cause, step)
    free, total = facts.get("memory_available_bytes"), facts.get("memory_total_bytes")
    if free is not None and total and free * 100 < limits.memory_free_percent * total:
        cause = f"memory is nearly used up: {human_bytes(free)} of {human_bytes(total)} left"
        yield Finding("memory", DEGRADED, cause, "see what uses it: ps -e --sort=-rss")
    for error in facts.get("errors", ()):
        yield Finding("facts", HEALTHY, f"not read: {error}", "look at this tool on the host")


def _artifacts(facts: Mapping[str, Any]) -> Iterator[Finding]:
    active = {_target(facts, "current"), _target(facts, "model")}
    for each in facts.get("artifacts", ()):
        damage = each.get("damage") or ()
        if not damage:
            continue
        more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
        yield Finding(
            "artifact",
            DEGRADED if each["id"] in active else HEALTHY,
            f"{each['kind']} {each['id']} is damaged: {', '.join(damage[:3])}{more}",
            "run site.yml: it fetches only these files again; until then a restart may fail",
        )
    for each in facts.get("verified") or ():
        damage = [
            f"{file['path']} {file['reason']} ({file['found']})"
            for file in each.get("damage") or ()
        ]
        if damage:
            more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
            yield Finding(
                "artifact",
                BROKEN,
                f"{each['kind']} {each['id']} has other bytes: {', '.join(damage[:3])}{more}",
                "run site.yml: it fetches only these files again; have the disk looked at",
            )
    if facts.get("verified_error"):
        yield Finding(
            "artifact",
            DEGRADED,
            f"what is active cannot be verified: {facts['verified_error']}",
            "look at the disk of the node",
        )


def _gateway_step(state: str) -> str:
    return {
        "MAINT": "run site.yml when it should take requests: it attests and joins the node",
        "DRAIN": "run site.yml when it should take requests: it attests and joins the node",
        "DOWN": "from the gateway, ask the node for /health: firewall, address and port",
    }.get(state, "run playbooks/gateway.yml: the gateway does not know this node")


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
    if not checks:
        return ""
    passed = sum(bool(check["passed"]) for check in checks)
    return f"{'passed' if probe.get('passed') else 'failed'} {passed}/{len(checks)}"
