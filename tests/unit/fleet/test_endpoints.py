# SPDX-License-Identifier: Apache-2.0
"""Where hosts are reached, as Ansible reaches them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.playbook.play_context import PlayContext
from ansible.plugins.loader import connection_loader
from ansible.vars.manager import VariableManager
from glm_fleet.fleet.endpoints import (
    host_address,
    host_key_file,
    host_port,
    host_user,
    node_endpoints,
    plan_endpoints,
)
from glm_fleet.health.exposition import targets

CASES = Path(__file__).parents[1] / "fixtures/cases"
ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "plugins/plugin_utils"))


def variables_of(text: str, folder: Path, *, name: str = "hosts.ini") -> dict[str, dict[str, Any]]:
    path = folder / name
    path.write_text(text)
    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[str(path)])
    manager = VariableManager(loader=loader, inventory=inventory)
    return {each.name: manager.get_vars(host=each) for each in inventory.get_hosts()}


def as_ansible(variables: dict[str, Any]) -> tuple[str, str, str, str]:
    connection = connection_loader.get("ssh", PlayContext(), None)
    connection.set_options(var_options=variables)
    options = [connection.get_option(each) for each in ("host", "port", "remote_user")]
    options.append(connection.get_option("private_key_file"))
    host, port, user, key = ("" if each is None else str(each) for each in options)
    return host, port, user, key


def ours(variables: dict[str, Any]) -> tuple[str, str, str, str]:
    name = variables["inventory_hostname"]
    return (
        host_address(variables, name),
        host_port(variables),
        host_user(variables),
        host_key_file(variables),
    )


@pytest.mark.parametrize(
    "line",
    [
        "gpu01",
        "gpu01:2222",
        "gpu01 ansible_host=10.20.0.11 ansible_port=2201 ansible_user=ops",
        "gpu01 ansible_ssh_host=10.20.0.11 ansible_ssh_port=2201 ansible_ssh_user=ops",
        "gpu01 ansible_host=10.0.0.1 ansible_ssh_host=10.0.0.2 ansible_port=1 ansible_ssh_port=2",
        "gpu01 ansible_user=a ansible_ssh_user=b ansible_ssh_private_key_file=/k",
        "gpu01 ansible_private_key_file=/a ansible_ssh_private_key_file=/b",
        "gpu01 ansible_host=2001:db8::11",
        "gpu01 ansible_host=gpu01.example.net",
    ],
)
def test_every_way_of_naming_a_host_means_what_it_means_to_ansible(
    line: str, tmp_path: Path
) -> None:
    (variables,) = variables_of(f"[gpu_nodes]\n{line}\n", tmp_path).values()
    assert ours(variables) == as_ansible(variables)


def test_gateways_swarm_and_prometheus_ask_the_same(tmp_path: Path) -> None:
    from glm_filters import addresses

    hosts = variables_of((CASES / "11-legacy-host-variable/hosts.ini").read_text(), tmp_path)
    nodes = ["gpu01", "gpu02"]
    assert node_endpoints(hosts, nodes, 8000) == {
        "gpu01": "10.20.0.11:8000",
        "gpu02": "10.20.0.12:8000",
    }
    assert addresses(hosts, nodes) == ["10.20.0.11", "10.20.0.12"]
    hosts["gw01"]["gateway_metrics_bind"] = "*:8405"
    found = [each["targets"] for each in targets(hosts, nodes, ["gw01"])]
    assert found == [["10.20.0.11:8000"], ["10.20.0.12:8000"], ["10.20.0.5:8405"]]


def test_an_address_of_the_gateways_own_and_ipv6_stay_what_they_are() -> None:
    hosts = {
        "a": {"ansible_host": "2001:db8::11", "serving_port": "8010"},
        "b": {"ansible_host": "10.0.0.2", "gateway_node_address": "10.9.0.2"},
        "c": {"ansible_host": ""},
    }
    assert node_endpoints(hosts, list(hosts), 8000) == {
        "a": "[2001:db8::11]:8010",
        "b": "10.9.0.2:8000",
        "c": "c:8000",
    }


def server(name: str, port: int, state: str = "ready", address: str = "10.0.0.1") -> dict[str, Any]:
    return {"name": name, "address": address, "port": port, "admin_state": state}


def test_a_changed_endpoint_waits_for_the_turn_of_its_node() -> None:
    wanted = {"gpu01": "10.0.0.1:8010", "gpu02": "10.0.0.1:8010", "gpu03": "10.0.0.1:8010"}
    servers = [
        server("gpu01", 8000),
        server("gpu02", 8000, "drain"),
        server("gpu03", 8000, "maint"),
    ]
    found = plan_endpoints(wanted, servers)
    assert found["endpoints"] == {
        "gpu01": "10.0.0.1:8000",
        "gpu02": "10.0.0.1:8000",
        "gpu03": "10.0.0.1:8010",
    }
    assert list(found["endpoints"]) == list(wanted)
    assert (found["kept"], found["leaving"]) == (["gpu01", "gpu02"], [])
    assert plan_endpoints(wanted, [])["endpoints"] == wanted


def test_a_node_that_is_left_out_leaves_and_one_that_got_another_name_stays() -> None:
    wanted = {"node01": "10.0.0.1:8000", "gpu02": "[2001:db8::2]:8000"}
    servers = [
        server("gpu01", 8000),
        server("gpu02", 8000, address="[2001:db8::2]"),
        server("gpu03", 8000, address="10.0.0.3"),
        server("gpu04", 8000, "maint", "10.0.0.4"),
        server("gpu05", 8000, "drain", "10.0.0.5"),
    ]
    found = plan_endpoints(wanted, servers)
    assert found["renamed"] == {"node01": "gpu01"}
    assert found["leaving"] == ["gpu03"]
    assert found["kept"] == []
