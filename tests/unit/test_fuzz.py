# SPDX-License-Identifier: Apache-2.0
"""Whatever comes from outside is read, or refused with a `FleetError`: nothing else, and no loop.

Bounded and the same on every run: what is tried is chosen by position, or by Hypothesis without
a random seed.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.health.exposition import exposition
from glm_fleet.health.html import render_page, view
from glm_fleet.health.judge import judge_fleet
from glm_fleet.health.notify import find_events
from glm_fleet.health.preflight import judge_hosts
from glm_fleet.health.tables import health_json, preflight_json, render_health, render_preflight
from glm_fleet.health.verdict import Limits
from glm_fleet.node.answer import decode_facts
from glm_fleet.node.gpu import read_gpus

# The answers that the tests of the health package judge.
sys.path.append(str(Path(__file__).parent / "health"))
from test_judge import TIME, fleet_records
from test_preflight import EXPECT

NVIDIA_SMI = Path(__file__).parent / "fixtures/nvidia-smi"
TEMPLATE = Path(__file__).resolve().parents[2] / "roles/health/templates/fleet.html.j2"

_DEEP: list[Any] = []
for _ in range(60):
    _DEEP = [_DEEP]
GONE = object()
WRONG: tuple[Any, ...] = (
    GONE,
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**400,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\ud800\x00\x1b[2J",
    "%s {0} \\",
    [],
    ["x"],
    {},
    {"x": {"y": 1}},
    _DEEP,
)
Place = tuple[Any, ...]


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Yield the place of every value in plain data, also of what holds others."""
    if here:
        yield here
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from places(each, (*here, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from places(each, (*here, number))


def changed(value: Any, place: Place, wrong: Any) -> Any:
    """Return plain data with one other value in it."""
    copied = copy.copy(value)
    if len(place) > 1:
        copied[place[0]] = changed(value[place[0]], place[1:], wrong)
    elif wrong is GONE:
        del copied[place[0]]
    else:
        copied[place[0]] = wrong
    return copied


def mutations(value: Any) -> Iterator[tuple[Place, Any, Any]]:
    """Yield (place, what is there instead, all of it) for every place and every wrong value."""
    for place in places(value):
        for wrong in WRONG:
            yield place, wrong, changed(value, place, wrong)


def answers_of_a_fleet() -> dict[str, dict[str, Any]]:
    """Return what was gathered of three nodes with two real GPUs each, and of their gateway."""

    def nvidia_smi(argv: Sequence[str], **_: Any) -> RunResult:
        name = {"-q": "q.xml", "topo": "topo.txt"}.get(argv[1], "query.csv")
        return RunResult(0, (NVIDIA_SMI / f"h200-x2-{name}").read_text(), "")

    records = fleet_records()
    for name in ("gpu", "fabric_manager", "xids"):
        del records["gw01"]["node"][name]
    for record in records.values():
        if "gpu_nodes" not in record["groups"]:
            continue
        facts = record["node"]
        facts["gpu"] = read_gpus(nvidia_smi).as_dict()
        for gpu in facts["gpu"]["gpus"]:
            gpu["processes"] = [{"pid": 41, "name": "x", "used_mib": 7, "unit": "a.service"}]
        facts["xids"] = [
            {"kind": "Xid", "code": 79, "device": "0000:01", "time_s": 1.0, "message": "lost"}
        ]
        facts["listeners"] = [
            {"port": 8000, "pid": 7, "name": "a", "user": "b", "unit": "c", "command": "d"}
        ]
        facts["verified"] = [{"kind": "model", "id": "glm-123", "damage": []}]
        facts["protected"] = ["glm-123"]
        facts["errors"] = ["units: no answer"]
        record["expect"] = [{"gpu_node": True, "expect": {**EXPECT, "gpu_count": 2}}]
    return records


def everything(records: Mapping[str, Mapping[str, Any]], *, draw: bool) -> dict[str, Any]:
    """Make every report of these answers, as fleet_report does; return the rows of health.

    To ``draw`` the page compiles its template: what is drawn is made in any case.
    """
    problems = judge_hosts(records)
    render_preflight(list(records), problems, 120)
    json.dumps(preflight_json(list(records), problems, TIME), allow_nan=False).encode()
    nodes, gateways = judge_fleet(records, limits=Limits(), previous={}, time=TIME)
    for line in render_health(nodes, gateways, 120):
        line.text.encode()
    report = health_json(nodes, gateways, TIME)
    json.dumps(report, allow_nan=False).encode()
    json.dumps(view(report, [report])).encode()
    if draw:
        render_page(report, [report], TEMPLATE).encode()
    exposition(report).encode()
    find_events(report, {})
    hosts = {each["name"]: each for each in (*report["nodes"], *report["gateways"])}
    return {**hosts, "preflight": [each for each in problems if each.host != "gpu02"]}


@pytest.mark.parametrize("host", ["gpu02", "gw01"])
def test_one_wrong_value_changes_the_row_of_its_host_only(host: str) -> None:
    records = answers_of_a_fleet()
    right = everything(records, draw=True)
    refused = taken = 0
    for place, wrong, facts in mutations(records[host]["node"]):
        try:
            decode_facts(host, facts)
        except FleetError:
            refused += 1
            # One refusal is like another.
            if refused % 50:
                continue
        else:
            taken += 1
        changed_records = {**records, host: {**records[host], "node": facts}}
        found = everything(changed_records, draw=not (refused + taken) % 50)
        if host == "gpu02":
            found[host] = right[host]
            assert found == right, (place, wrong)
    assert refused > 500
    assert taken > 100
