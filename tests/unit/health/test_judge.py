# SPDX-License-Identifier: Apache-2.0
"""Verdicts: each fault is named with its node, its cause and the next step, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.health.gateway import judge_gateway, states_of
from glm_fleet.health.html import view
from glm_fleet.health.judge import judge_fleet
from glm_fleet.health.records import LEFT
from glm_fleet.health.tables import health_json
from glm_fleet.health.verdict import GatewayHealth, Limits, NodeHealth
from test_preflight import EXPECT, make_facts

TIME = "2026-11-22T10:00:00+00:00"
CHECKED_AT = 1_795_000_000.0
RELEASE = "vllm-0.23.0-abc"


def make_sample(time_s: float, steps: float, running: float = 0) -> dict[str, Any]:
    """Return what the engine's metrics say after so many steps."""
    histogram = {"count": steps, "sum": steps * 0.02, "buckets": [[0.01, 0.0], [0.05, steps]]}
    return {
        "time_s": time_s,
        "running": running,
        "waiting": 1.0 if running else 0.0,
        "kv_cache_usage": 0.3 if running else 0.0,
        "steps": steps,
        "generated_tokens": steps * 10,
        "prompt_tokens": steps,
        "requests": steps / 10,
        "preemptions": 0.0,
        "first_token": histogram,
        "between_tokens": histogram,
    }


def serving_facts() -> dict[str, Any]:
    """Return the facts of a node that serves as it should."""
    facts = make_facts()
    facts["os"]["kernel"] = "6.1.0"
    facts["clock"]["epoch_s"] = CHECKED_AT
    facts["memory_available_bytes"] = facts["memory_total_bytes"] // 2
    facts["unit"] = {
        "name": "glm-serving.service",
        "load_state": "loaded",
        "active_state": "active",
        "sub_state": "running",
        "n_restarts": 0,
        "invocation_id": "first",
    }
    facts["links"] = {
        "current": {"target": f"/opt/glm-fleet/releases/{RELEASE}"},
        "model": {"target": "/srv/glm-fleet/artifacts/model/glm-123"},
    }
    facts["artifacts"] = [{"kind": "model", "id": "glm-123", "bytes": 7, "damage": []}]
    facts["vllm_processes"] = [
        {
            "pid": 41,
            "unit": "glm-serving.service",
            "user": "glm",
            "command": "/opt/x/python /opt/x/vllm serve /srv/m --tensor-parallel-size 8",
        }
    ]
    facts["attestation"] = {
        "passed": True,
        "checks": [
            {"name": "release that runs", "passed": True, "detail": f"{RELEASE}, wanted {RELEASE}"},
            {"name": "canary answers", "passed": True, "detail": "24 tokens"},
            {"name": "tokens advance in the metrics", "passed": True, "detail": "24 tokens"},
        ],
        "release_id": RELEASE,
        "model_id": "glm-123",
        "diagnosis": "",
        "journal": [],
        "canary": {"tokens_per_second": 56.04},
        "engine": {
            "state": "serving",
            "phase": "ready",
            "before": make_sample(CHECKED_AT - 1, 90),
            "after": make_sample(CHECKED_AT, 100, 2),
            "steps": 10,
            "tokens": 24,
            "seconds": 0.6,
        },
    }
    facts["attestation_error"] = ""
    return facts


def gateway_answer(nodes: int) -> dict[str, Any]:
    """Return what a gateway says whose servers are all up."""
    return {
        "valid": True,
        "version": "2.6",
        "errors": [],
        "config_error": "",
        "client": {"status": 200, "seconds": 0.01, "node": "gpu01", "error": ""},
        "servers": [
            {"name": f"gpu0{number}", "status": "UP", "check": "L7OK", "sessions_total": 40}
            for number in range(1, nodes + 1)
        ],
    }


def fleet_records(nodes: int = 3) -> dict[str, dict[str, Any]]:
    """Return what was gathered of a healthy fleet."""
    records: dict[str, dict[str, Any]] = {
        f"gpu0{number}": {
            "message": "",
            "groups": ["gpu_nodes"],
            "node": serving_facts(),
            "expect": [{"gpu_node": True, "expect": EXPECT}],
        }
        for number in range(1, nodes + 1)
    }
    facts = {**make_facts(), "gateway": gateway_answer(nodes)}
    records["gw01"] = {
        "message": "",
        "groups": ["gateways"],
        "node": facts,
        "expect": [{"gpu_node": False, "expect": EXPECT}],
    }
    return records


def judge(
    records: Mapping[str, Mapping[str, Any]], previous: Mapping[str, Any] | None = None
) -> tuple[list[NodeHealth], list[GatewayHealth]]:
    return judge_fleet(records, limits=Limits(), previous=previous or {}, time=TIME)


def report_of(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    nodes, gateways = judge(records)
    return {
        "time": TIME,
        "nodes": [each.as_dict() for each in nodes],
        "gateways": [each.as_dict() for each in gateways],
    }


def test_a_healthy_fleet_names_nothing() -> None:
    nodes, gateways = judge(fleet_records())
    assert [each.verdict for each in (*nodes, *gateways)] == ["healthy"] * 4
    assert [list(each.findings) for each in (*nodes, *gateways)] == [[]] * 4
    assert nodes[0].gpus == "8/8 A100-SXM4-80GB"
    assert (nodes[0].release, nodes[0].model) == (RELEASE, "glm-123")
    assert (nodes[0].unit, nodes[0].attestation) == ("active", "passed 3/3")
    again, _ = judge(fleet_records(), report_of(fleet_records()))
    assert [list(each.findings) for each in again] == [[]] * 3


def hang(facts: dict[str, Any]) -> None:
    probe = facts["attestation"]
    probe["passed"] = False
    probe["checks"][1].update(passed=False, detail="error: the stream broke off: TimeoutError")
    probe["checks"][2].update(passed=False, detail="0 tokens")
    probe["engine"].update(state="hung", steps=0, tokens=0, seconds=20.2)


def die(facts: dict[str, Any]) -> None:
    facts["unit"].update(n_restarts=1, invocation_id="second")
    facts["attestation"] = {
        "passed": False,
        "checks": [],
        "diagnosis": "",
        "journal": ["EngineCore died: SIGKILL"],
        "engine": {"state": "starting", "phase": "loading shard 3/83"},
    }


def run_old_release(facts: dict[str, Any]) -> None:
    probe = facts["attestation"]
    probe.update(passed=False, release_id="vllm-0.22.0-old")
    probe["checks"][0].update(passed=False, detail=f"vllm-0.22.0-old, wanted {RELEASE}")


def step_down(facts: dict[str, Any]) -> None:
    facts["attestation"]["cuda_graphs"] = {
        "runs": "piecewise",
        "wanted": "full_and_piecewise",
        "reason": "an illegal memory access was encountered",
    }


def fill_disk(facts: dict[str, Any]) -> None:
    for disk in facts["disks"]:
        disk["free_bytes"] = disk["total_bytes"] // 50


def throw_xid(facts: dict[str, Any]) -> None:
    facts["xids"].append(
        {"kind": "Xid", "code": 79, "device": "0", "time_s": CHECKED_AT - 5, "message": "Xid: 79"}
    )


def use_driver(facts: dict[str, Any], version: str) -> None:
    facts["gpu"]["driver_version"] = facts["fabric_manager"]["version"] = version


def set_gpu(index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts["gpu"]["gpus"][index].update(values)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str, str]] = {
    "GPU lost": (lambda facts: facts["gpu"]["gpus"].pop(3), "degraded", "GPU count: 7", "dmesg"),
    "Xid": (throw_xid, "degraded", "Xid 79: 1 x", "NVIDIA's list"),
    "ECC": (set_gpu(1, volatile_uncorrectable=2), "degraded", "2 uncorrectable on GPU 1", "reset"),
    "row remap": (set_gpu(5, remap_pending=True), "degraded", "pending on GPU 5", "reset"),
    "hung": (hang, "broken", "the engine hangs: no answer and no step in 20 s", "restart"),
    "dead": (die, "broken", "the engine died and was restarted 1 time", "journalctl"),
    "old release": (run_old_release, "broken", "an old release still runs: vllm-0.22", "site.yml"),
    "truncated": (
        lambda facts: facts["artifacts"][0]["damage"].append(
            "m.safetensors: truncated (1 of 7 bytes)"
        ),
        "degraded",
        "m.safetensors: truncated",
        "site.yml",
    ),
    "changed bytes": (
        lambda facts: facts.update(
            verified=[
                {
                    "kind": "model",
                    "id": "m",
                    "damage": [{"path": "a", "reason": "changed", "found": "SHA-256 0123"}],
                }
            ]
        ),
        "broken",
        "model m has other bytes: a changed (SHA-256 0123)",
        "site.yml",
    ),
    "graphs": (
        step_down,
        "degraded",
        "CUDA graphs stepped down from full_and_piecewise to piecewise, about a fifth of the speed",
        "serve_retry=true",
    ),
    "disk": (fill_disk, "degraded", "the disk at / is nearly full: 18.0 GB", "du"),
    "clock": (lambda facts: facts["clock"].update(skew_s=-95.0), "degraded", "95 s behind", "chro"),
    "hot": (set_gpu(2, temperature_c=91), "degraded", "91 °C on GPU 2", "cooling"),
    "memory": (
        lambda facts: facts.update(memory_available_bytes=10**9),
        "degraded",
        "memory is nearly used up: 1.0 GB",
        "ps",
    ),
    "driver": (
        lambda facts: use_driver(facts, "590.1"),
        "degraded",
        "its driver is 590.1, that of gpu01, gpu03 is 580.159.04",
        "driver",
    ),
    "flags": (
        lambda facts: facts["vllm_processes"][0].update(command="vllm serve /srv/m --eager"),
        "degraded",
        "its command line is /srv/m --eager",
        "site.yml",
    ),
    "stopped": (
        lambda facts: facts["unit"].update(active_state="inactive", sub_state="dead"),
        "broken",
        "the service is inactive (dead)",
        "site.yml",
    ),
    "bare": (
        lambda facts: facts["unit"].update(load_state="not-found"),
        "broken",
        "nothing is deployed",
        "site.yml",
    ),
    "a board that did not pass": (
        lambda facts: facts.update(
            acceptance={
                "needed": ["it did not pass"],
                "passed": False,
                "faults": [
                    {
                        "check": "SM clock",
                        "where": "GPU 3 (serial 1650421000003)",
                        "gpu": 3,
                        "expected": "705 MHz",
                        "found": "345 MHz",
                        "remedy": "check cooling",
                        "of_release": False,
                    }
                ],
            }
        ),
        "degraded",
        "acceptance: GPU 3 (serial 1650421000003): SM clock: 345 MHz",
        "check cooling",
    ),
    "no policy": (
        lambda facts: facts.update(attestation={}, attestation_error="This node has no policy."),
        "broken",
        "no policy",
        "site.yml",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_node_and_the_next_step(fault: str) -> None:
    break_it, verdict, cause, step = FAULTS[fault]
    records = fleet_records()
    before = report_of(records)
    # The fault came after the last check.
    for node in before["nodes"]:
        node["baseline"]["epoch_s"] -= 60
    break_it(records["gpu02"]["node"])
    nodes, gateways = judge(records, before)
    assert [each.verdict for each in nodes] == ["healthy", verdict, "healthy"]
    assert gateways[0].verdict == "healthy"
    assert any(cause in each for each in nodes[1].reasons), nodes[1].reasons
    assert step in nodes[1].next_step


def test_gpus_that_nobody_accepted_yet_are_a_note() -> None:
    records = fleet_records()
    records["gpu02"]["node"]["acceptance"] = {"needed": ["it was never accepted"], "passed": None}
    nodes, _ = judge(records, {})
    assert nodes[1].verdict == "healthy"
    (note,) = [each for each in nodes[1].findings if each.check == "acceptance"]
    assert note.cause == "its GPUs are not accepted: it was never accepted"
    assert "accept.yml" in note.next_step


def test_a_server_in_maintenance_is_named_at_its_node() -> None:
    records = fleet_records()
    records["gw01"]["node"]["gateway"]["servers"][1]["status"] = "MAINT"
    nodes, gateways = judge(records)
    assert [each.verdict for each in nodes] == ["healthy", "degraded", "healthy"]
    assert nodes[1].reasons == ["MAINT at gw01, which is not by drain.yml"]
    assert "site.yml" in nodes[1].next_step
    assert gateways[0].verdict == "healthy"
    # Who was held on purpose is named, and is no fault.
    held = {nodes[1].name: {"by": "root@ctl", "at": "", "reason": "new fans"}}
    records["gw01"]["node"]["gateway"]["held"] = held
    nodes, _ = judge_fleet(records, limits=Limits(), previous={}, time="")
    assert nodes[1].verdict == "healthy"
    assert "held out of service by root@ctl: new fans" in [each.cause for each in nodes[1].findings]


def test_an_unreachable_node_is_unknown_and_keeps_its_baseline() -> None:
    records = fleet_records()
    before = report_of(records)
    records["gpu02"] = {"message": "timed out", "groups": ["gpu_nodes"]}
    nodes, _ = judge(records, before)
    assert nodes[1].verdict == "unknown"
    assert nodes[1].reasons == ["no answer: timed out"]
    assert "ping gpu02" in nodes[1].next_step
    assert nodes[1].baseline == before["nodes"][1]["baseline"]


def test_a_node_that_a_stopped_run_did_not_read_is_what_the_gateways_see() -> None:
    records = fleet_records()
    for node in ("gpu01", "gpu02"):
        records[node] = {"message": LEFT, "groups": ["gpu_nodes"]}
    servers = records["gw01"]["node"]["gateway"]["servers"]
    next(each for each in servers if each["name"] == "gpu02")["status"] = "DOWN"
    nodes, _ = judge(records)
    assert nodes[0].verdict == "degraded"
    assert nodes[0].reasons == [
        "it serves, as the gateways see it; an earlier phase of this run lost it"
    ]
    assert nodes[1].verdict == "unknown"
    assert nodes[1].reasons == ["an earlier phase of this run lost it (DOWN at gw01)"]
    for node in nodes[:2]:
        assert "power and network" not in node.next_step
    records["gw01"] = {"message": LEFT, "groups": ["gateways"]}
    _, gateways = judge(records)
    assert (gateways[0].verdict, "power" in gateways[0].next_step) == ("unknown", False)


@pytest.mark.parametrize(
    ("days", "verdict", "words"),
    [(60, "healthy", ""), (10, "degraded", "expires in 10 days"), (-1, "broken", "has expired")],
)
def test_a_certificate_is_told_before_it_expires(days: int, verdict: str, words: str) -> None:
    records = fleet_records()
    facts = records["gw01"]["node"]
    facts["clock"] = {"skew_s": 0.0, "epoch_s": 1_700_000_000.0}
    expires = 1_700_000_000.0 + days * 86400
    facts["gateway"]["certificates"] = [{"path": "/etc/x.pem", "expires_s": expires}]
    _, (gateway,) = judge(records)
    assert gateway.verdict == verdict
    assert words in " ".join(gateway.reasons)


def test_a_configuration_that_was_changed_by_hand_is_a_finding() -> None:
    records = fleet_records()
    records["gw01"]["node"]["gateway"]["config_edited"] = True
    _, (gateway,) = judge(records)
    assert (gateway.verdict, gateway.reasons) == (
        "degraded",
        ["haproxy.cfg was changed by hand since it was written"],
    )


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ({"path": "/m", "target": "/gone/m1", "exists": False}, "the link /m leads to /gone/m1"),
        ({"path": "/m", "target": None, "exists": True}, "/m is no link to what runs"),
        ({"path": "/m", "target": None, "exists": False}, "the link /m is missing"),
    ],
)
def test_a_link_that_the_next_start_would_stumble_over_is_a_finding(
    link: dict[str, Any], words: str
) -> None:
    records = fleet_records()
    records["gpu02"]["node"]["links"]["model"] = link
    nodes, _ = judge(records)
    (finding,) = [each for each in nodes[1].findings if each.check == "link"]
    assert finding.cause.startswith(words)
    assert "site.yml" in finding.next_step


def test_an_environment_that_is_damaged_is_a_finding() -> None:
    records = fleet_records()
    damage = ["lib/vllm/envs.py: missing (no such file)"]
    records["gpu02"]["node"]["environment"] = {"release": "r1", "damage": damage}
    nodes, _ = judge(records)
    assert nodes[1].verdict == "degraded"
    assert nodes[1].reasons == [f"the environment of r1 is damaged: {damage[0]}"]
    assert nodes[0].verdict == "healthy"


def test_an_error_that_brings_its_advice_gets_no_other() -> None:
    records = fleet_records()
    facts = records["gpu02"]["node"]
    facts["attestation"] = {}
    facts["attestation_error"] = "This node has no policy. Found: none. What to do: run site.yml."
    facts["errors"] = ["journal: [Errno 28] No space left on device: '/var/log/x'"]
    nodes, _ = judge(records)
    (finding,) = [each for each in nodes[1].findings if each.check == "service"]
    assert (finding.cause, finding.next_step) == (
        "This node has no policy. Found: none",
        "run site.yml",
    )
    (note,) = [each for each in nodes[1].findings if each.check == "facts"]
    assert "df -h" in note.next_step


def test_faulty_hardware_stands_before_what_it_causes() -> None:
    records = fleet_records()
    facts = records["gpu02"]["node"]
    facts["gpu"]["gpus"].pop()
    hang(facts)
    nodes, _ = judge(records)
    assert nodes[1].verdict == "broken"
    assert nodes[1].reasons[0].startswith("GPU count: 7")
    assert "the engine hangs" in nodes[1].reasons[1]


def test_an_xid_is_a_fault_once_and_then_history() -> None:
    records = fleet_records()
    throw_xid(records["gpu02"]["node"])
    first, _ = judge(records)
    assert first[1].verdict == "degraded"
    second, _ = judge(records, report_of(records))
    assert second[1].verdict == "healthy"
    assert [each.check for each in second[1].findings] == ["Xid history"]


def test_restarts_count_since_the_last_check() -> None:
    records = fleet_records()
    unit = records["gpu02"]["node"]["unit"]
    unit["n_restarts"] = 3
    assert "restarted it 3 times" in judge(records)[0][1].reasons[0]
    before = report_of(records)
    assert judge(records, before)[0][1].verdict == "healthy"
    unit["n_restarts"] = 5
    assert "restarted it 2 times" in judge(records, before)[0][1].reasons[0]
    unit["n_restarts"] = 0
    assert judge(records, before)[0][1].verdict == "healthy"


def test_a_start_that_is_under_way_is_not_a_death() -> None:
    records = fleet_records()
    facts = records["gpu02"]["node"]
    die(facts)
    facts["unit"]["n_restarts"] = 0
    node = judge(records)[0][1]
    assert (node.verdict, node.reasons) == (
        "degraded",
        ["the service is starting: loading shard 3/83"],
    )
    assert node.engine["state"] == "starting"


def test_a_busy_node_is_not_taken_for_a_hung_one() -> None:
    records = fleet_records()
    facts = records["gpu02"]["node"]
    hang(facts)
    facts["attestation"]["engine"].update(state="busy", steps=900, tokens=9000)
    node = judge(records)[0][1]
    assert node.verdict == "degraded"
    assert node.reasons[0].startswith("busy: the canary waited 20 s behind 2 running and 1 wait")
    assert node.tokens_per_second is None


def test_the_slow_node_is_noted_once_and_degraded_when_it_stays_slow() -> None:
    records = fleet_records()
    records["gpu02"]["node"]["attestation"]["canary"]["tokens_per_second"] = 21.0
    first, _ = judge(records)
    assert first[1].verdict == "healthy"
    assert "21.0 tok/s, the fleet's median is 56.0" in first[1].findings[0].cause
    second, _ = judge(records, report_of(records))
    assert [each.verdict for each in second] == ["healthy", "degraded", "healthy"]
    # Among other requests a canary measures them, not the node.
    records["gpu02"]["node"]["attestation"]["engine"]["before"]["running"] = 30
    assert judge(records)[0][1].findings == []


def test_two_nodes_that_differ_are_both_named() -> None:
    records = fleet_records(2)
    use_driver(records["gpu02"]["node"], "590.1")
    nodes, _ = judge(records)
    assert nodes[0].reasons == ["its driver is 580.159.04, that of gpu02 is 590.1"]
    assert nodes[1].reasons == ["its driver is 590.1, that of gpu01 is 580.159.04"]


def test_figures_since_the_last_check() -> None:
    records = fleet_records()
    before = report_of(records)
    later = copy.deepcopy(records)
    for record in later.values():
        if "attestation" in record["node"]:
            record["node"]["attestation"]["engine"]["after"] = make_sample(CHECKED_AT + 100, 600)
    since = judge(later, before)[0][0].engine["since"]
    assert since["tokens_per_second"] == 50.0
    assert since["first_token_p50_s"] == 0.03
    later["gpu01"]["node"]["unit"]["invocation_id"] = "second"
    assert judge(later, before)[0][0].engine["since"]["tokens_per_second"] is None


def test_gateways() -> None:
    answer = gateway_answer(2)
    assert judge_gateway("gw01", gateway=answer).verdict == "healthy"
    drained = copy.deepcopy(answer)
    for server in drained["servers"]:
        server["status"] = "DRAIN"
    assert judge_gateway("gw01", gateway=drained).reasons == ["no server is UP"]
    lost = "The file held.json cannot be used. Found: 1. What to do: remove it."
    held = judge_gateway("gw01", gateway={**answer, "held_error": lost})
    assert (held.verdict, held.next_step) == ("broken", "remove it")
    assert "which nodes are held: The file held.json" in held.reasons[0]
    bad = judge_gateway("gw01", gateway={**answer, "config_error": "[ALERT] line 3"})
    assert bad.verdict == "degraded"
    assert "line 3" in bad.reasons[0]
    error = "The socket is silent. Found: no file. What to do: look there."
    down = judge_gateway("gw01", gateway={"valid": False, "errors": [error]})
    assert (down.verdict, down.next_step) == ("broken", "look there")
    deaf = {**answer, "client": {"status": 503, "error": ""}}
    assert "HTTP 503" in judge_gateway("gw01", gateway=deaf).reasons[0]
    records = fleet_records()
    records["gw01"].update(message="timed out", node={})
    _, (gateway,) = judge(records)
    assert (gateway.verdict, gateway.reasons) == ("unknown", ["no answer: timed out"])
    before = {"sent": {"gpu01": 30, "gpu02": 50}}
    judged = judge_gateway("gw01", gateway=answer, before=before)
    assert [server["sent"] for server in judged.servers] == [10, 40]
    assert states_of("gpu02", {"gw01": drained, "gw02": {}}) == {"gw01": "DRAIN", "gw02": "?"}
    assert states_of("gpu09", {"gw01": answer}) == {"gw01": "absent"}


def test_limits_are_numbers_with_known_names() -> None:
    assert Limits.from_dict({"slow_ratio": "0.5"}).slow_ratio == 0.5
    for wrong in ({"slow": 1}, {"slow_ratio": "fast"}):
        with pytest.raises(FleetError, match="limits of the health check"):
            Limits.from_dict(wrong)


def test_an_answer_that_cannot_be_used_is_one_unknown_row() -> None:
    records = fleet_records()
    right, _ = judge(records)
    records["gpu02"]["node"]["gpu"]["gpus"][3]["index"] = "3"
    records["gw01"].update(node={}, wrong=FleetError("It is wrong", found="x").as_fail())

    (first, wrong, third), (gateway,) = judge(records)

    assert (wrong.verdict, wrong.facts) == ("unknown", {})
    assert wrong.reasons == [
        "its answer cannot be used: expected gpu.gpus[3].index to be a whole number, found '3'"
    ]
    assert "look at what gives this value" in wrong.next_step
    assert (first.findings, third.findings) == (right[0].findings, right[2].findings)
    assert (gateway.verdict, first.gateway) == ("unknown", {"gw01": "?"})


def test_a_rehearsal_that_failed_is_a_note_and_one_that_passed_is_on_the_page() -> None:
    records = fleet_records()
    done = {"gpus": "8 x A100", "driver": "550.54", "release": "vllm-2", "cuda_graphs": "eager",
            "command": "0a", "passed": True, "problem": "", "seconds": 90.0, "time_s": 1.7e9,
            "layers": 7, "of_layers": 78}  # fmt: skip
    records["gpu01"]["node"]["rehearsal"] = done
    records["gpu02"]["node"]["rehearsal"] = {**done, "passed": False, "problem": "it died"}
    nodes, gateways = judge(records)
    assert [each.verdict for each in nodes] == ["healthy"] * 3
    assert list(nodes[0].findings) == []
    (note,) = nodes[1].findings
    assert note.cause == ("the last rehearsal here: vllm-2, 2023-11-14 22:13 UTC: failed: it died")
    assert "rehearse.yml" in note.next_step
    page = view(health_json(nodes, gateways, TIME), [])
    rows = {row["name"]: row["value"] for row in page["nodes"][0]["rows"]}
    assert rows["Rehearsal"].endswith("rehearsed in 90 s (7 of 78 layers with random weights)")
