# SPDX-License-Identifier: Apache-2.0
"""The findings about one node: hardware, service, system, artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..core.causes import why_no_answer
from ..core.errors import split_remedy
from ..core.format import human_bytes
from ..node.answer import Facts
from ..serving.graphs import price_of
from ..serving.rehearsals import for_a_report
from .hardware import ERROR, Expectations, Problem
from .verdict import BROKEN, DEGRADED, HEALTHY, UNKNOWN, Finding, Limits, Verdict

_DEGRADING = ("throttling",)
# More faults of an acceptance than this say no more.
_MOST_FAULTS = 6
SITE_STEP = "run site.yml: it drains, restarts and attests the node"
UNDRAIN_STEP = "playbooks/undrain.yml lets it back when that is over"


def no_answer(name: str, message: str) -> Finding:
    said = " ".join(message.split())[:200].rstrip(".") or "nothing was said"
    known = why_no_answer(message, host=name)
    if known:
        return Finding("connection", UNKNOWN, f"no answer: {known.cause} ({said})", known.remedy)
    return Finding(
        "connection",
        UNKNOWN,
        f"no answer: {said}",
        f"check power and network, then try: ansible -i INVENTORY -b -m ping {name}",
    )


def count_restarts(unit: Mapping[str, Any], before: Mapping[str, Any]) -> int:
    """How often systemd restarted the service since the last check, or since its start."""
    now = int(unit.get("n_restarts") or 0)
    earlier = int(before.get("n_restarts") or 0)
    # Somebody's own restart sets systemd's count back.
    return now - earlier if now >= earlier else now


def without_old_xids(facts: Facts, before: Mapping[str, Any]) -> Facts:
    seen_until = before.get("epoch_s") or 0.0
    return {**facts, "xids": [xid for xid in facts.get("xids", ()) if xid["time_s"] > seen_until]}


def ecc_counts(facts: Facts) -> dict[str, int]:
    return {
        gpu["uuid"]: gpu["volatile_uncorrectable"]
        for gpu in facts.get("gpu", {}).get("gpus", ())
        if gpu["volatile_uncorrectable"]
    }


def missing_gpus(facts: Facts, before: Mapping[str, Any]) -> list[str]:
    """Return the bus ids of GPUs that an earlier check saw and that are gone now."""
    present = {gpu["bus_id"] for gpu in facts.get("gpu", {}).get("gpus", ())}
    return [bus for bus in before.get("gpus") or () if bus not in present]


def gpu_slots(facts: Facts, before: Mapping[str, Any], expected: int) -> list[str]:
    """Return the bus ids of the GPUs, the lost ones included: the driver numbers the rest anew."""
    present = [gpu["bus_id"] for gpu in facts.get("gpu", {}).get("gpus", ())]
    return present if len(present) >= expected else sorted({*present, *missing_gpus(facts, before)})


def hardware_findings(
    problems: Sequence[Problem],
    facts: Facts,
    limits: Limits,
    before: Mapping[str, Any],
) -> Iterator[Finding]:
    new_errors = sum(
        max(0, count - (before.get("ecc") or {}).get(uuid, 0))
        for uuid, count in ecc_counts(facts).items()
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


def rehearsal_findings(facts: Facts) -> Iterator[Finding]:
    """Tell, as a note, of a release that did not get through its last rehearsal here."""
    last = facts.get("rehearsal")
    if last and not last["passed"]:
        cause = f"the last rehearsal here: {for_a_report(last)}"
        step = "mend it or name another release; playbooks/rehearse.yml tries again"
        yield Finding("rehearsal", HEALTHY, cause, step)


def acceptance_findings(facts: Facts) -> Iterator[Finding]:
    """Boards that did not prove themselves; that nobody tried them yet is a note."""
    known = facts.get("acceptance") or {}
    needed = known.get("needed") or ()
    faults = known.get("faults") or ()
    if known.get("passed") is False and faults:
        for fault in faults[:_MOST_FAULTS]:
            cause = f"acceptance: {fault['where']}: {fault['check']}: {fault['found']}"
            yield Finding("acceptance", DEGRADED, cause, fault["remedy"])
    elif needed:
        cause = f"its GPUs are not accepted: {'; '.join(needed)}"
        step = "its next turn does it; playbooks/accept.yml does it now, after a drain"
        yield Finding("acceptance", HEALTHY, cause, step)


def service_findings(facts: Facts, name: str, restarts: int) -> Iterator[Finding]:
    unit, probe = facts.get("unit", {}), facts.get("attestation") or {}
    state, sub = unit.get("active_state", ""), unit.get("sub_state", "")
    engine = probe.get("engine") or {}
    log = f"journalctl -u {name}"
    times = f"{restarts} time{'' if restarts == 1 else 's'} since the last check"
    said = probe.get("diagnosis") or next(iter(reversed(probe.get("journal") or [])), "")
    # A line of the journal may end as a sentence; ours ends after it.
    died = f"; {said.rstrip('.')}" if said else ""

    def finding(verdict: Verdict, cause: str, step: str) -> Finding:
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
        reason = str(facts.get("attestation_error") or "the attestation gave no result")
        yield finding(BROKEN, *split_remedy(reason, f"drain it, read {log}, then run site.yml"))
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
        cause = "the server does not answer although its process runs, also not when asked twice"
        step = (
            "wait for the watch (glm-watch): when nothing moves it takes the node out and has the "
            f"engine started anew; read {log}"
        )
        yield Finding("engine", BROKEN, cause, step)
        return
    if state == "hung":
        cause = (
            f"the engine hangs: no answer and no step in {waited}, nothing else moves, "
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
    graphs = probe.get("cuda_graphs") or {}
    mode, asked = graphs.get("runs", ""), graphs.get("wanted", "")
    if mode != asked:
        price = price_of(mode)
        cause = f"CUDA graphs stepped down from {asked} to {mode}"
        cause += f", {price}" if price else ""
        cause += f": {graphs['reason']}" if graphs.get("reason") else ""
        step = (
            "do away with the cause, then run site.yml with -e serve_retry=true; or accept it with "
            f"serving_cuda_graphs: {mode}, which restarts nothing"
        )
        yield Finding("CUDA graphs", DEGRADED, cause, step)
    for check in probe.get("checks", ()):
        if check["passed"] or (state in ("hung", "busy") and check["name"] in ignored):
            continue
        runs, _, wanted = check["detail"].partition(", wanted ")
        if check["name"] in ("release that runs", "model that runs"):
            what = check["name"].split()[0]
            cause = f"an old {what} still runs: {runs}, and {wanted} is active on disk"
            yield Finding(what, BROKEN, cause, SITE_STEP)
        else:
            step = probe.get("diagnosis") or f"drain it, read {log}, then run site.yml"
            yield Finding("attestation", BROKEN, f"{check['name']}: {check['detail']}", step)


def system_findings(facts: Facts, expect: Expectations, limits: Limits) -> Iterator[Finding]:
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
    left, memory = facts.get("memory_available_bytes"), facts.get("memory_total_bytes")
    if left is not None and memory and left * 100 < limits.memory_free_percent * memory:
        cause = f"memory is nearly used up: {human_bytes(left)} of {human_bytes(memory)} left"
        yield Finding("memory", DEGRADED, cause, "see what uses it: ps -e --sort=-rss")
    for error in facts.get("errors", ()):
        cause, step = split_remedy(f"not read: {error}", "look at this tool on the host")
        known = why_no_answer(cause)
        yield Finding("facts", HEALTHY, cause, known.remedy if known else step)


def artifact_findings(facts: Facts) -> Iterator[Finding]:
    active = {link_target(facts, "current"), link_target(facts, "model")}
    for artifact in facts.get("artifacts", ()):
        names = artifact["damage"]
        if not names:
            continue
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield Finding(
            "artifact",
            DEGRADED if artifact["id"] in active else HEALTHY,
            f"{artifact['kind']} {artifact['id']} is damaged: {', '.join(names[:3])}{more}",
            "run site.yml: it fetches only these files again; until then a restart may fail",
        )
    yield from _link_findings(facts)
    environment = facts.get("environment") or {}
    broken = environment.get("damage") or ()
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        yield Finding(
            "environment",
            DEGRADED,
            f"the environment of {environment.get('release')} is damaged: "
            f"{', '.join(broken[:3])}{more}",
            "run site.yml: it builds it again in the node's turn; until then a restart may fail",
        )
    for each in facts.get("verified") or ():
        damage = [f"{file['path']} {file['reason']} ({file['found']})" for file in each["damage"]]
        if damage:
            more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
            yield Finding(
                "artifact",
                BROKEN,
                f"{each['kind']} {each['id']} has other bytes: {', '.join(damage[:3])}{more}",
                "run site.yml: it builds it again in the node's turn; find out who changed it"
                if each["kind"] == "environment"
                else "run site.yml: it fetches only these files again; have the disk looked at",
            )
    if facts.get("verified_error"):
        reason = f"what is active cannot be verified: {facts['verified_error']}"
        yield Finding("artifact", DEGRADED, *split_remedy(reason, "look at the disk of the node"))


def _link_findings(facts: Facts) -> Iterator[Finding]:
    """Say so where the next start would not find its release or its model."""
    step = "run site.yml: it leads to what runs again, without a restart"
    for name in ("current", "model"):
        link = facts.get("links", {}).get(name)
        # A node on which nothing is deployed has no links.
        if not link or facts.get("unit", {}).get("load_state") != "loaded":
            continue
        where, target, exists = link.get("path", name), link.get("target"), link.get("exists", True)
        if target and exists:
            continue
        if target:
            cause = f"the link {where} leads to {target}, which is not there"
        elif exists:
            cause = f"{where} is no link to what runs, but something else"
        else:
            cause = f"the link {where} is missing"
        yield Finding("link", DEGRADED, f"{cause}: the next start fails", step)


def link_target(facts: Facts, link: str) -> str:
    target = (facts.get("links", {}).get(link) or {}).get("target")
    return PurePosixPath(target).name if target else ""
