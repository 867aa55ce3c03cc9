# SPDX-License-Identifier: Apache-2.0
"""Nodes prove their GPUs before they take requests: once, in their turn, and on demand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Fleet, lab
from .load import under_load
from .test_upgrade import assert_no_request_was_lost, ready

pytestmark = [pytest.mark.fleet, pytest.mark.long]

RECORD = "/var/lib/glm-fleet/acceptance.json"
SLOW = 3


def accepted(fleet: Fleet, node: str) -> dict[str, Any]:
    """Return what a node kept of its acceptance, {} if there is nothing."""
    text = fleet.shell(node, f"cat {RECORD} 2>/dev/null").output
    found: dict[str, Any] = json.loads(text) if text.strip() else {}
    return found


def serial(fleet: Fleet, node: str, index: int) -> str:
    listed = fleet.shell(node, "nvidia-smi --query-gpu=index,serial --format=csv,noheader").output
    serials = dict(line.split(", ") for line in listed.strip().splitlines())
    return serials[str(index)]


def health(fleet: Fleet, node: str) -> list[dict[str, Any]]:
    """Return the findings of the health check about a node's acceptance."""
    fleet.playbook("playbooks/health.yml", "-e", "health_fail_on=never")
    report = json.loads((fleet.root / "reports/fleet.json").read_text())
    (row,) = [each for each in report["nodes"] if each["name"] == node]
    return [each for each in row["findings"] if each["check"] == "acceptance"]


def test_a_slow_gpu_keeps_its_node_out_and_is_named_by_index_and_serial(fleet: Fleet) -> None:
    node = fleet.nodes[1]
    # Also on a fleet that serves already.
    fleet.shell(node, f"systemctl stop glm-serving 2>/dev/null; rm -f {RECORD}")
    lab("gpu", node, "--index", str(SLOW), "--sm-clock", "345", "--temperature", "93")
    run = fleet.playbook("site.yml")
    assert run.rc != 0
    named = f"GPU {SLOW} (serial {serial(fleet, node, SLOW)}): SM clock: 345 MHz"
    assert named in " ".join(run.output.split()), run.output[-6000:]
    assert "check cooling" in run.output
    assert fleet.nodes[0] in ready(fleet)
    assert node not in ready(fleet)
    kept = accepted(fleet, node)
    assert kept["passed"] is False
    assert {each["gpu"] for each in kept["faults"]} == {SLOW}
    # The others of its batch are accepted, each with all of its GPUs.
    first = accepted(fleet, fleet.nodes[0])
    assert first["passed"] is True
    assert len(first["gpus"]) == 8
    assert all(each["together"]["wrong"] == 0 for each in first["gpus"])
    assert len({tuple(each["load"]["digests"]) for each in first["gpus"]}) == 1
    (finding, *_) = health(fleet, node)
    assert f"GPU {SLOW}" in finding["cause"]
    assert finding["verdict"] == "degraded"


def test_the_node_is_accepted_when_the_gpu_is_mended_and_then_no_more(fleet: Fleet) -> None:
    lab("gpu", fleet.nodes[1], "--reset")
    run = fleet.playbook("site.yml")
    assert run.rc == 0, run.output[-6000:]
    assert ready(fleet) == fleet.nodes
    before = {node: accepted(fleet, node)["time_s"] for node in fleet.nodes}
    assert all(accepted(fleet, node)["passed"] for node in fleet.nodes)
    again = fleet.playbook("site.yml")
    assert again.rc == 0, again.output[-6000:]
    assert again.changed == {}
    assert {node: accepted(fleet, node)["time_s"] for node in fleet.nodes} == before


def test_a_node_that_serves_is_not_stopped_when_its_driver_changed(fleet: Fleet) -> None:
    node = fleet.nodes[2]
    before = fleet.shell(node, "systemctl show -P InvocationID glm-serving").output
    lab("gpu", node, "--driver", "581.15")
    try:
        run = fleet.playbook("site.yml", "-e", "health_fail_on=never")
        assert run.rc == 0, run.output[-6000:]
        assert run.changed == {}
        assert fleet.shell(node, "systemctl show -P InvocationID glm-serving").output == before
        (finding,) = health(fleet, node)
        assert finding["verdict"] == "healthy"
        assert "the driver was 580.159.04 and is 581.15" in finding["cause"]
        assert "accept.yml" in finding["next_step"]
    finally:
        lab("gpu", node, "--reset")


def test_a_node_that_serves_is_accepted_on_demand_without_a_lost_request(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    before = accepted(fleet, node)["time_s"]
    with under_load(fleet, "accept.yml") as load:
        run = fleet.playbook("playbooks/accept.yml", "--limit", node)
    assert run.rc == 0, run.output[-6000:]
    assert f"Acceptance of {node}" in run.output
    assert_no_request_was_lost(load)
    assert accepted(fleet, node)["time_s"] > before
    assert ready(fleet) == fleet.nodes
