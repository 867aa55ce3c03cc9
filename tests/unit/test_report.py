# SPDX-License-Identifier: Apache-2.0
"""Tables fit, verdicts hold, JSON keeps its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.health import NodeHealth, judge_gateway, judge_node, states_of, unknown_node
from glm_fleet.preflight import WARNING, Expectations, Problem
from glm_fleet.report import (
    health_json,
    preflight_json,
    render_health,
    render_preflight,
    render_table,
    write_json,
)
from test_preflight import EXPECT, make_facts

TIME = "2026-11-22T10:00:00+00:00"
PROBE: dict[str, Any] = {
    "passed": True,
    "checks": [{"name": "backend", "passed": True, "detail": "TRITON_MLA_SPARSE"}],
    "canary": {"tokens_per_second": 56.04},
}


def serving_facts() -> dict[str, Any]:
    facts = make_facts()
    facts["unit"] = {
        "name": "glm-serving.service",
        "load_state": "loaded",
        "active_state": "active",
        "sub_state": "running",
        "n_restarts": 0,
    }
    facts["links"] = {
        "current": {"target": "/opt/glm-fleet/releases/vllm-0.23.0-abc"},
        "model": {"target": "/srv/glm-fleet/artifacts/model/glm-123"},
    }
    return facts


def judge(
    facts: dict[str, Any], probe: dict[str, Any], state: str = "UP", **artifacts: Any
) -> NodeHealth:
    return judge_node(
        "gpu01",
        facts=facts,
        probe=probe,
        expect=Expectations.from_dict(EXPECT),
        gateway={"gw01": state},
        **artifacts,
    )


def test_damaged_artifacts_break_a_node_and_are_named() -> None:
    damage = [{"path": "a.safetensors", "reason": "changed", "found": "SHA-256 0123"}]
    artifacts = [
        {"kind": "release", "id": "r", "damage": []},
        {"kind": "model", "id": "m", "damage": damage},
    ]
    node = judge(serving_facts(), PROBE, artifacts=artifacts)
    assert node.verdict == "broken"
    assert node.reasons[0] == "model m: a.safetensors changed (SHA-256 0123)"
    assert "site.yml" in node.next_step
    assert judge(serving_facts(), PROBE, artifacts=artifacts[:1]).verdict == "healthy"
    unread = judge(serving_facts(), PROBE, artifacts_error="Input/output error")
    assert unread.verdict == "degraded"
    assert "Input/output error" in unread.reasons[0]


def test_table_is_aligned_and_wrapped_to_the_width() -> None:
    rows = [("gpu01", "GPU count", "8", "7: one of them fell off the bus during the night")]
    lines = [line.text for line in render_table(("host", "check", "want", "found"), rows, 44)]
    assert max(len(line) for line in lines) <= 44
    assert lines[0].split() == ["host", "check", "want", "found"]
    assert lines[1].startswith("-----  ---------  ----  ---")
    assert "7: one of them" in lines[2]
    assert " ".join(line[24:].strip() for line in lines[2:]) == rows[0][3]


def test_preflight_table_names_all_and_sums_up() -> None:
    problems = [
        Problem("gpu02", "ECC history", "none", "2", "watch it", WARNING),
        Problem("gpu02", "GPU count", "8", "7", "power-cycle"),
        Problem("gpu01", "MIG", "off", "on", "nvidia-smi -mig 0"),
    ]
    lines = render_preflight(["gpu01", "gpu02", "gw01"], problems, 100)
    assert [line.text.split()[0] for line in lines[2:5]] == ["gpu01", "gpu02", "gpu02"]
    assert [line.tone for line in lines[2:5]] == ["bad", "bad", "warning"]
    assert lines[-1].text == (
        "Preflight: 2 problems on 2 of 3 hosts, 1 warning. Nothing was changed."
    )
    data = preflight_json(["gpu01", "gpu02", "gw01"], problems, TIME)
    assert data["summary"] == {"errors": 2, "warnings": 1}
    assert render_preflight(["gpu01"], [], 100)[0].tone == "good"


def test_healthy_node() -> None:
    node = judge(serving_facts(), PROBE)
    assert (node.verdict, node.reasons) == ("healthy", [])
    assert node.gpus == "8/8 A100-SXM4-80GB"
    assert (node.release, node.model) == ("vllm-0.23.0-abc", "glm-123")
    assert (node.unit, node.attestation) == ("active", "passed 1/1")


@pytest.mark.parametrize(
    ("unit", "verdict", "words"),
    [
        ({"load_state": "not-found"}, "broken", "nothing is deployed"),
        ({"active_state": "failed", "sub_state": "failed"}, "broken", "is failed"),
        ({"active_state": "activating", "sub_state": "start"}, "degraded", "starting"),
        ({"active_state": "activating", "sub_state": "auto-restart"}, "broken", "auto-restart"),
        ({"n_restarts": 3}, "degraded", "restarted it 3 times"),
    ],
)
def test_state_of_the_unit(unit: dict[str, Any], verdict: str, words: str) -> None:
    facts = serving_facts()
    facts["unit"].update(unit)
    node = judge(facts, PROBE)
    assert node.verdict == verdict
    assert words in node.reasons[0]
    assert node.next_step


def test_failed_attestation_is_broken_and_says_which_check() -> None:
    probe = {"passed": False, "checks": [{"name": "canary", "passed": False, "detail": "silent"}]}
    node = judge(serving_facts(), probe)
    assert (node.verdict, node.reasons) == ("broken", ["canary: silent"])
    silent = judge(serving_facts(), {})
    assert (silent.verdict, silent.reasons) == ("broken", ["the attestation gave no result"])


def test_faulty_hardware_degrades_and_stands_first() -> None:
    facts = serving_facts()
    facts["gpu"]["gpus"].pop()
    node = judge(facts, PROBE)
    assert node.verdict == "degraded"
    assert node.gpus == "7/8 A100-SXM4-80GB"
    assert node.reasons[0].startswith("GPU count: 7")
    assert judge(facts, {"passed": False, "checks": []}).verdict == "broken"


@pytest.mark.parametrize("state", ["DRAIN", "DOWN", "MAINT", "absent"])
def test_node_away_from_the_gateway_is_degraded(state: str) -> None:
    node = judge(serving_facts(), PROBE, state)
    assert (node.verdict, node.reasons) == ("degraded", [f"{state} at gw01"])


def test_gateways() -> None:
    up = {"name": "gpu01", "status": "UP"}
    drained = {"name": "gpu02", "status": "DRAIN"}
    answer = {"valid": True, "version": "2.6", "servers": [up, drained]}
    assert judge_gateway("gw01", message="", gateway=answer).verdict == "healthy"
    none_up = {**answer, "servers": [drained]}
    assert judge_gateway("gw01", message="", gateway=none_up).verdict == "broken"
    assert judge_gateway("gw01", message="", gateway={**answer, "valid": False}).reasons
    assert judge_gateway("gw01", message="timed out", gateway={}).verdict == "unknown"
    assert states_of("gpu02", {"gw01": answer, "gw02": {}}) == {"gw01": "DRAIN", "gw02": "?"}
    assert states_of("gpu09", {"gw01": answer}) == {"gw01": "absent"}


def test_health_table_and_json(tmp_path: Path) -> None:
    nodes = [judge(serving_facts(), PROBE), unknown_node("gpu02", "timed out", {"gw01": "DOWN"})]
    answer = {"valid": True, "version": "2.6", "servers": [{"name": "gpu01", "status": "UP"}]}
    gateways = [judge_gateway("gw01", message="", gateway=answer)]
    lines = render_health(nodes, gateways, 160)
    text = "\n".join(line.text for line in lines)
    assert "8/8 A100-SXM4-80GB" in text
    assert "56.0" in text
    assert "gpu02 is unknown: no answer: timed out." in text
    assert "gateway gw01 (HAProxy 2.6): healthy, 1 UP" in text
    data = health_json(nodes, gateways, TIME)
    assert data["schema"] == "glm-fleet/health/1"
    assert data["summary"]["nodes"] == {"healthy": 1, "degraded": 0, "broken": 0, "unknown": 1}
    path = tmp_path / "reports" / "fleet.json"
    write_json(path, data)
    write_json(path, data)
    assert json.loads(path.read_text())["nodes"][0]["tokens_per_second"] == 56.04
    assert [each.name for each in path.parent.iterdir()] == ["fleet.json"]
