# SPDX-License-Identifier: Apache-2.0
"""The inventory check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.fleet.inventory import Inventory, check_inventory, left_out

ROOT = Path(__file__).resolve().parents[3]
CASES = Path(__file__).parents[1] / "fixtures/cases"
KNOWN = {
    "serving_port": 8000,
    "serving_sentry_port": 8002,
    "serving_gpu_memory_utilization": 0.9,
    "serving_max_model_len": 32768,
    "serving_max_num_seqs": "",
    "serving_bind_address": "0.0.0.0",
    "artifact_port": 8009,
    "artifact_keep": 2,
    "gateway_metrics_bind": "127.0.0.1:8405",
    "gateway_node_address": "",
    "serve_canary": "",
    "repair": "",
    "serve_quality_gate": False,
    "benchmark_quality_set": "",
    "serve_min_ready": "{{ (groups['gpu_nodes'] | length > 1) | int }}",
    "serving_tensor_parallel_size": 8,
    "serve_batch": 1,
    "gateway_port": 8080,
    "preflight_gpu_count": 8,
    "model_revision": None,
}


def problems(groups: dict[str, list[str]], hosts: dict[str, dict[str, Any]]) -> list[str]:
    """Return what `check_inventory` finds."""
    inventory = Inventory(
        groups=groups,
        names={host: list(variables) for host, variables in hosts.items()},
        value=lambda host, name: hosts[host].get(name),
        known=KNOWN,
        literals=hosts,
        complaint=lambda name, value: f"{name} is odd" if value == "odd" else "",
    )
    try:
        check_inventory(inventory)
    except FleetError as error:
        found: list[str] = error.details["problems"]
        assert all(problem in str(error) for problem in found)
        return found
    return []


def fleet(**variables: Any) -> list[str]:
    """Check a right fleet whose gpu01 has these variables."""
    hosts: dict[str, dict[str, Any]] = {"gpu01": variables, "gpu02": {}, "gw01": {}}
    return problems({"gpu_nodes": ["gpu01", "gpu02"], "gateways": ["gw01"]}, hosts)


def test_a_right_inventory_passes() -> None:
    assert fleet(serving_port="8001", model_revision="x", ansible_user="ops", mode_of_work=1) == []


def test_empty_groups() -> None:
    assert problems({}, {})[0].startswith("group gpu_nodes has no hosts")
    found = problems({"gateways": ["gw01"]}, {"gw01": {}})
    assert found == [
        "group gpu_nodes has no hosts: name the GPU nodes in it, and gw01 would be a gateway "
        "without nodes"
    ]
    assert "gateways has no hosts" in problems({"gpu_nodes": ["a"]}, {"a": {}})[0]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("serving_tensor_paralel_size", "serving_tensor_parallel_size"),
        ("servings_port", "serving_port"),
        ("serve_port", "serving_port"),
        ("gatway_port", "gateway_port"),
        ("model_revison", "model_revision"),
    ],
)
def test_typing_mistakes_are_named_with_what_was_meant(name: str, meant: str) -> None:
    assert fleet(**{name: 1}) == [
        f"no role knows the variable {name} (set for gpu01); did you mean {meant}?"
    ]


def test_an_unknown_name_without_likeness_is_named_too() -> None:
    assert fleet(preflight_zzz=1) == ["no role knows the variable preflight_zzz (set for gpu01)"]


@pytest.mark.parametrize(
    ("size", "fits"),
    [(8, True), (4, True), ("2", True), (3, False), (16, False), (0, False), ("x", False)],
)
def test_tensor_parallel_size_divides_the_gpus(size: Any, fits: bool) -> None:
    assert (fleet(serving_tensor_parallel_size=size) == []) is fits


def test_ports_and_addresses() -> None:
    assert "from 1 to 65535" in fleet(serving_port=70000)[0]
    assert fleet(ansible_host="gpu02") == [
        "gpu01 and gpu02 have the same address gpu02 (SSH port 22)"
    ]
    both = {"gpu_nodes": ["a"], "gateways": ["a"]}
    assert problems(both, {"a": {}}) == []
    assert "both would listen" in problems(both, {"a": {"gateway_port": 8000}})[0]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"serving_port": 8002}, "serving_port and serving_sentry_port of gpu01 are both 8002"),
        ({"artifact_port": "8000"}, "serving_port and artifact_port of gpu01 are both 8000"),
        ({"serving_sentry_port": 22}, "serving_sentry_port and the SSH port of gpu01 are both 22"),
        (
            {"serving_port": 2222, "ansible_ssh_port": 2222},
            "serving_port and the SSH port of gpu01 are both 2222",
        ),
        ({"serving_gpu_memory_utilization": 1.7}, "serving_gpu_memory_utilization is 1.7: a share"),
        ({"serving_gpu_memory_utilization": "0"}, "serving_gpu_memory_utilization is 0: a share"),
        ({"serving_max_model_len": -5}, "serving_max_model_len is -5: a context"),
        ({"serving_max_num_seqs": 0}, "serving_max_num_seqs is 0: a batch"),
        ({"serve_batch": 0}, "The size of a batch cannot be read"),
        ({"serve_batch": "150%"}, "a percentage up to 100%, or auto, not '150%'"),
        ({"serve_min_ready": 2}, "serve_min_ready is 2 with 2 nodes: no node could ever be taken"),
        ({"serve_min_ready": -1}, "serve_min_ready is -1 with 2 nodes"),
        ({"serve_quality_gate": True}, "questions of benchmark_quality_set, which is empty"),
        (
            {"serve_quality_gate": "yes", "benchmark_quality_set": "/no/set.jsonl"},
            "benchmark_quality_set, which is '/no/set.jsonl': no such file here",
        ),
        ({"serve_canary": "gpu09"}, "serve_canary is gpu09, which is no host of gpu_nodes"),
        ({"repair": "gw01"}, "repair is gw01, which is no host of gpu_nodes"),
        ({"ansible_host": "010.77.0.12"}, "'010.77.0.12', no IPv4 address.*leading zeros"),
        ({"ansible_host": "10.77.0.300"}, "no IPv4 address.*not in range"),
        ({"ansible_host": "10.77.12"}, "no IPv4 address: it needs four numbers"),
        ({"ansible_ssh_host": "ops@10.0.0.1"}, "a login: give the address alone"),
        ({"gateway_node_address": "http://10.0.0.1"}, "a URL or a path"),
        ({"gateway_node_address": "10.0.0.1:8000"}, "no IPv6 address; a port belongs"),
        ({"ansible_host": "gpu 01"}, "no address and no host's name"),
    ],
)
def test_what_nothing_could_run_with_is_found_before_anything_runs(
    variables: dict[str, Any], words: str
) -> None:
    found = fleet(**variables)
    assert len(found) == 1, found
    assert re.search(words, found[0]), found


def test_right_values_of_every_kind_pass() -> None:
    assert fleet(ansible_host="2001:db8::11", gateway_node_address="[2001:db8::11]") == []
    assert fleet(ansible_host="gpu-01.example.net", serve_batch="50%", serve_min_ready="1") == []
    assert fleet(serve_canary="gpu02", serving_max_num_seqs=32, ansible_ssh_host="10.0.0.1") == []


def test_a_gateway_s_own_ports_clash_too() -> None:
    hosts = {"gpu01": {}, "gw01": {"gateway_port": 8405}}
    groups = {"gpu_nodes": ["gpu01"], "gateways": ["gw01"]}
    assert problems(groups, hosts) == [
        "gateway_port and gateway_metrics_bind of gw01 are both 8405: each needs a port of its own"
    ]


def test_one_address_by_old_and_new_names_is_noticed() -> None:
    hosts = {
        "gpu01": {"ansible_ssh_host": "10.20.0.11"},
        "gpu02": {"ansible_host": "10.20.0.11"},
        "gw01": {},
    }
    groups = {"gpu_nodes": ["gpu01", "gpu02"], "gateways": ["gw01"]}
    assert problems(groups, hosts) == [
        "gpu01 and gpu02 have the same address 10.20.0.11 (SSH port 22)"
    ]


def test_a_wrong_value_is_named_once_with_its_hosts() -> None:
    groups = {"gpu_nodes": ["gpu01", "gpu02"], "gateways": ["gw01"]}
    hosts = {"gpu01": {"model_revision": "odd"}, "gpu02": {"model_revision": "odd"}, "gw01": {}}
    assert problems(groups, hosts) == ["model_revision is odd (set for gpu01, gpu02)"]
    assert fleet(serving_port="odd") == [
        "serving_port of gpu01 is 'odd': a port is a number from 1 to 65535"
    ]


def test_groups_that_are_left_out_have_a_host() -> None:
    nodes = {"gpu_nodes": ["gpu01", "gpu02"]}
    assert left_out(nodes) == {"builders": "controller", "fetchers": "gpu01"}
    assert left_out({**nodes, "fetchers": ["gpu02"]}) == {"builders": "controller"}
    assert left_out({"builders": ["controller"]}) == {}


def test_all_mistakes_come_at_once() -> None:
    assert len(fleet(serving_port=0, serving_tensor_parallel_size=5, serving_prt=1)) == 3


def test_a_builder_other_than_the_controller_is_refused() -> None:
    groups = {"gpu_nodes": ["gpu01"], "gateways": ["gw01"], "builders": ["build01"]}
    assert problems(groups, {"gpu01": {}, "gw01": {}, "build01": {}}) == [
        "group builders names build01: releases are built on the controller only for now; "
        "leave the group out"
    ]
