# SPDX-License-Identifier: Apache-2.0
"""What a node can do at the gateway by its own word: take itself out, and nothing else."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_fleet.gateway.haproxy import describe
from glm_fleet.gateway.state_file import save_states
from glm_fleet.gateway.statistics import parse_servers_state

from tests.gateway import Gateway, Node, eventually, free_port

WORDS = (
    "ready", "up ready", "ready up", "up 25600%", "25600%", "up maxconn:1", "up,ready", "drain",
    "maint", "stopped", "fail", "", "UP", "upper", "down #the engine is up", "down", "\tup",
)  # fmt: skip


@pytest.fixture
def agent_port() -> int:
    return free_port()


@pytest.fixture
def nodes(agent_port: int) -> Iterator[dict[str, Node]]:
    made = {f"gpu0{n}": Node(f"127.0.0.{n + 1}", agent_port) for n in (1, 2)}
    yield made
    for node in made.values():
        node.close()


@pytest.fixture
def gateway(tmp_path: Path, nodes: dict[str, Node], agent_port: int) -> Iterator[Gateway]:
    made = Gateway(tmp_path, nodes, gateway_sentry_port=agent_port)
    made.start()
    yield made
    made.stop()


def weights(gateway: Gateway) -> set[int]:
    return {server["weight"] for server in describe(gateway.haproxy)["servers"]}


def test_a_node_takes_itself_out_and_back(gateway: Gateway, nodes: dict[str, Node]) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu02", "ready")
    nodes["gpu01"].word = "down #not attested"
    begun = time.monotonic()
    eventually(lambda: gateway.states()["gpu01"] == "DOWN")
    assert time.monotonic() - begun < 5
    server = describe(gateway.haproxy)["servers"][0]
    assert "does not say up" in server["check"]
    assert {gateway.get() for _ in range(4)} == {(200, "gpu02")}
    nodes["gpu01"].word = "up"
    eventually(lambda: gateway.states()["gpu01"] == "UP")


@pytest.mark.parametrize("state", ["drain", "maint"])
def test_no_word_lifts_what_an_operator_ordered(
    gateway: Gateway, nodes: dict[str, Node], state: str
) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu01", state)
    nodes["gpu02"].word = "down"
    gateway.set("gpu02", "ready", wait=False)
    eventually(lambda: gateway.states()["gpu02"] == "DOWN")
    for word in (*WORDS[2::4], "ready", "up 25600%", "up"):
        nodes["gpu01"].word = word
        # Nobody asks a node in maintenance: the other one, out by its own word, tells the time.
        heard = nodes["gpu02"].asked + 2
        eventually(lambda wanted=heard: nodes["gpu02"].asked >= wanted)
        assert gateway.haproxy.server("glm_nodes", "gpu01").admin_state == state
        assert gateway.get()[0] == 503
    assert weights(gateway) == {1}


def test_only_the_word_itself_is_up(gateway: Gateway, nodes: dict[str, Node]) -> None:
    gateway.variables |= {"gateway_check_fall": 1, "gateway_check_rise": 1}
    gateway.reload("second")
    gateway.set("gpu01", "ready")
    for word in WORDS[::2]:
        nodes["gpu01"].word = word
        eventually(lambda: gateway.states()["gpu01"] == "DOWN")
        assert weights(gateway) == {1}
        assert {each.admin_state for each in gateway.haproxy.servers()} == {"ready", "maint"}
        nodes["gpu01"].word = "up"
        eventually(lambda: gateway.states()["gpu01"] == "UP")


def test_health_and_readiness_are_both_needed(gateway: Gateway, nodes: dict[str, Node]) -> None:
    gateway.set("gpu01", "ready")
    nodes["gpu01"].healthy = False
    eventually(lambda: gateway.states()["gpu01"] == "DOWN")
    nodes["gpu01"].healthy = True
    eventually(lambda: gateway.states()["gpu01"] == "UP")
    nodes["gpu01"].stop_agent()
    eventually(lambda: gateway.states()["gpu01"] == "DOWN")


def test_an_agent_that_restarts_does_not_take_its_node_out(
    gateway: Gateway, nodes: dict[str, Node], agent_port: int
) -> None:
    gateway.set("gpu01", "ready")
    begun = time.monotonic()
    nodes["gpu01"].stop_agent()
    time.sleep(1)  # how long the agent is away
    nodes["gpu01"].start_agent(agent_port)
    while time.monotonic() - begun < 4:
        assert gateway.states()["gpu01"] == "UP"
        time.sleep(0.1)


def test_from_a_gateway_that_still_obeyed_agents(
    gateway: Gateway, nodes: dict[str, Node], agent_port: int
) -> None:
    """The upgrade of a gateway that version 7a1c8e4 set up, under the states that it saved."""
    gateway.stop()

    def before(text: str) -> str:
        text = re.sub(r"    option tcp-check\n(    tcp-check .*\n)+", "    option httpchk\n    "
                      "http-check send meth GET uri /health ver HTTP/1.1 hdr Host glm-fleet\n    "
                      "http-check expect status 200\n", text)  # fmt: skip
        agent = f"agent-check agent-port {agent_port} agent-inter 1s check"
        assert "default-server disabled check" in text
        return text.replace("default-server disabled check", f"default-server disabled {agent}")

    gateway.edit = before
    gateway.start("old")
    gateway.set("gpu01", "ready")
    gateway.set("gpu02", "ready")
    gateway.set("gpu02", "drain")
    # What such a node can do: more weight, and back in against the operator's word.
    nodes["gpu01"].word = "up 25600%"
    eventually(lambda: 256 in weights(gateway))
    assert not save_states(gateway.haproxy, gateway.state_file)
    gateway.edit = lambda text: text
    nodes["gpu01"].word = "up"
    gateway.reload("new")
    assert gateway.states() == {"gpu01": "UP", "gpu02": "DRAIN"}
    assert weights(gateway) == {1}
    assert gateway.get() == (200, "gpu01")
    gateway.stop()
    gateway.start("newer")
    assert gateway.states() == {"gpu01": "UP", "gpu02": "DRAIN"}
    assert weights(gateway) == {1}
    saved = parse_servers_state(gateway.state_file.read_text())
    assert {each.name: each.admin_state for each in saved} == {"gpu01": "ready", "gpu02": "drain"}
