# SPDX-License-Identifier: Apache-2.0
"""Where a request goes and who waits: HAProxy itself under the role's own configuration."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.gateway.clients import Key, add, digest
from glm_fleet.gateway.haproxy import BACKEND

from tests.gateway import BEARER, NOW, Gateway, Node, eventually

CHAT = "/v1/chat/completions"


@pytest.fixture
def nodes() -> Iterator[dict[str, Node]]:
    made = {f"gpu0{n}": Node() for n in (1, 2, 3)}
    yield made
    for node in made.values():
        node.close()


def started(gateway: Gateway) -> Gateway:
    gateway.start()
    for name in gateway.endpoints:
        gateway.set(name, "ready")
    return gateway


@pytest.fixture
def gateway(tmp_path: Path, nodes: dict[str, Node]) -> Iterator[Gateway]:
    made = started(Gateway(tmp_path, nodes))
    yield made
    made.stop()


@pytest.fixture
def narrow(tmp_path: Path, nodes: dict[str, Node]) -> Iterator[Gateway]:
    """A gateway before one node that runs one request, where two more may wait."""
    limits = {"gateway_node_maxconn": 1, "gateway_queue_max": 2, "gateway_queue_timeout_s": 15}
    made = started(Gateway(tmp_path, {"gpu01": nodes["gpu01"]}, **limits))
    yield made
    made.stop()


def node_for(gateway: Gateway, body: dict[str, Any], path: str = CHAT, **headers: str) -> str:
    # The request before counts for its node until HAProxy has put it away.
    eventually(lambda: not any(gateway.haproxy.sessions(BACKEND, n) for n in gateway.endpoints))
    sent = {**BEARER, **{name.replace("_", "-"): value for name, value in headers.items()}}
    status, answer, _ = gateway.ask_door("POST", path, sent, json.dumps(body).encode())
    assert status == 200
    return answer["x-glm-fleet-node"]


def turns(begin: str, count: int = 8, system: str = "") -> Iterator[dict[str, Any]]:
    """A conversation as clients send it: all of it, each time."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in range(count):
        messages.append({"role": "user", "content": begin if not turn else f"more {turn}"})
        # The order of the fields is the client's.
        yield {"messages": list(messages), "model": "glm-5.2", "stream": turn % 2 == 0}
        messages.append({"role": "assistant", "content": f"answer {turn} to {begin}"})


def test_a_conversation_stays_on_its_node(gateway: Gateway) -> None:
    places = Counter[str]()
    for number in range(30):
        system = "You are a helpful assistant. " * 50 if number % 2 else ""
        seen = {node_for(gateway, body) for body in turns(f"question {number}", 4, system)}
        assert len(seen) == 1
        places.update(seen)
    assert set(places) == {"gpu01", "gpu02", "gpu03"}
    assert max(places.values()) <= 20


def test_other_paths_have_conversations_too(gateway: Gateway) -> None:
    long = "word " * 400
    for number in range(6):
        prompts = [{"prompt": f"{number} {long}{'more ' * turn}"} for turn in range(4)]
        assert len({node_for(gateway, each, "/v1/completions") for each in prompts}) == 1
        inputs = [{"input": f"{number} {long}{'more ' * turn}"} for turn in range(4)]
        assert len({node_for(gateway, each, "/v1/responses") for each in inputs}) == 1
        bodies = [{**body, "system": "same"} for body in turns(f"question {number}", 4)]
        assert len({node_for(gateway, each, "/v1/messages") for each in bodies}) == 1


def test_a_session_header_names_the_conversation(gateway: Gateway) -> None:
    bodies = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(12)]
    assert len({node_for(gateway, each, X_Session_Id="one") for each in bodies}) == 1
    same = bodies[0]
    seen = {node_for(gateway, same, X_Session_Id=str(n)) for n in range(24)}
    assert seen == {"gpu01", "gpu02", "gpu03"}


def test_what_has_no_conversation_goes_around(gateway: Gateway) -> None:
    assert {gateway.get()[1] for _ in range(9)} == {"gpu01", "gpu02", "gpu03"}
    for odd in (b"", b"{", b"[]", b'{"messages": 1}', b'{"messages": [1]}', b"\xff" * 100):
        assert gateway.ask_door("POST", CHAT, BEARER, odd)[0] == 200


def test_a_drained_node_takes_only_its_own_conversations_along(gateway: Gateway) -> None:
    bodies = [next(turns(f"question {number}")) for number in range(40)]
    before = [node_for(gateway, body) for body in bodies]
    gateway.set("gpu02", "drain")
    during = [node_for(gateway, body) for body in bodies]
    assert all(now == then for now, then in zip(during, before) if then != "gpu02")
    assert "gpu02" not in during
    gateway.set("gpu02", "ready")
    # What went elsewhere stays where its latest turns are; what is new comes back.
    assert [node_for(gateway, body) for body in bodies] == during
    assert "gpu02" in {node_for(gateway, next(turns(f"new {n}"))) for n in range(20)}


def test_no_conversation_keeps_a_drained_node_busy(gateway: Gateway) -> None:
    """What is remembered of a conversation is no reason to ask a node that is to be empty."""
    body = next(turns("the same"))
    name = node_for(gateway, body)
    for state in ("drain", "maint"):
        gateway.set(name, state)
        assert name not in {node_for(gateway, body) for _ in range(5)}
        gateway.set(name, "ready")


def test_a_conversation_outlives_its_node(gateway: Gateway, nodes: dict[str, Node]) -> None:
    """Before the health check knows: the connection fails, and another node is asked."""
    body = next(turns("the same"))
    name = node_for(gateway, body)
    nodes[name].close()
    assert {node_for(gateway, body) for _ in range(3)} <= set(gateway.endpoints) - {name}


def test_conversations_outlive_a_reload(gateway: Gateway) -> None:
    bodies = [next(turns(f"question {number}")) for number in range(20)]
    before = [node_for(gateway, body) for body in bodies]
    gateway.reload("second")
    assert [node_for(gateway, body) for body in bodies] == before


def test_a_hot_conversation_does_not_fill_its_node(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    """All ask with the same beginning: nobody has more than 1.25 times the mean, rounded up."""
    body = json.dumps(next(turns("the same for all"))).encode()
    headers = {**BEARER, "X-Wait": "1"}
    asking = [
        threading.Thread(target=gateway.ask_door, args=("POST", CHAT, headers, body))
        for _ in range(36)
    ]
    for each in asking:
        each.start()
    eventually(lambda: sum(len(node.seen) for node in nodes.values()) == 36)
    running = sorted(gateway.haproxy.sessions(BACKEND, name) for name in nodes)
    assert sum(running) == 36
    assert running[-1] <= 1.25 * 12 + 1
    for node in nodes.values():
        node.release.set()
    for each in asking:
        each.join(10)


def test_without_affinity_the_node_with_the_fewest_is_asked(
    tmp_path: Path, nodes: dict[str, Node]
) -> None:
    made = started(Gateway(tmp_path, nodes, gateway_affinity_load=0))
    try:
        body = next(turns("the same"))
        assert {node_for(made, body) for _ in range(6)} == {"gpu01", "gpu02", "gpu03"}
    finally:
        made.stop()


# -- a queue with an end ---------------------------------------------------------------


def client(gateway: Gateway, name: str, priority: int) -> dict[str, str]:
    key = Key("1", digest(name))
    gateway.clients = add(gateway.clients, name, key, {"priority": priority}, NOW)
    gateway.keep()
    return {"Authorization": f"Bearer {name}"}


class Asking:
    """Requests that take until the node is told to answer."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.threads: list[threading.Thread] = []
        self.answers: list[tuple[str, int]] = []

    def ask(self, who: str, headers: dict[str, str]) -> None:
        def one() -> None:
            waiting = {**headers, "X-Wait": "1", "X-Who": who}
            self.answers.append((who, self.gateway.ask_door("GET", "/v1/models", waiting)[0]))

        self.threads.append(threading.Thread(target=one))
        self.threads[-1].start()

    def waiting(self) -> int:
        return self.gateway.haproxy.waiting()


def test_the_queue_ends_and_the_urgent_go_first(narrow: Gateway, nodes: dict[str, Node]) -> None:
    low, high = client(narrow, "low", -5), client(narrow, "high", 5)
    asking = Asking(narrow)
    asking.ask("running", BEARER)
    eventually(lambda: len(nodes["gpu01"].seen) == 1)
    for number, (who, headers) in enumerate([("low", low), ("plain", BEARER)]):
        asking.ask(who, headers)
        eventually(lambda n=number: asking.waiting() == n + 1)
    # Full for everybody, but for those with a priority.
    status, answer, text = narrow.ask_door("GET", "/v1/models", BEARER)
    assert (status, json.loads(text)["error"]["code"]) == (429, "queue_full")
    assert int(answer["retry-after"]) > 0
    for number in range(2):
        asking.ask("high", high)
        eventually(lambda n=number: asking.waiting() == n + 3)
    assert narrow.ask_door("GET", "/v1/models", high)[0] == 429
    assert narrow.haproxy.sessions(BACKEND, "gpu01") == 1
    nodes["gpu01"].release.set()
    for each in asking.threads:
        each.join(10)
    assert {status for _, status in asking.answers} == {200}
    order = [each.headers["x-who"] for each in nodes["gpu01"].seen]
    assert order == ["running", "high", "high", "plain", "low"]


def test_who_waits_too_long_is_told(tmp_path: Path, nodes: dict[str, Node]) -> None:
    limits = {"gateway_node_maxconn": 1, "gateway_queue_timeout_s": 1}
    made = started(Gateway(tmp_path, {"gpu01": nodes["gpu01"]}, **limits))
    try:
        asking = Asking(made)
        asking.ask("running", BEARER)
        eventually(lambda: len(nodes["gpu01"].seen) == 1)
        begun = time.monotonic()
        status, answer, _ = made.ask_door("GET", "/v1/models", BEARER)
        assert (status, answer["retry-after"]) == (503, "5")
        assert 0.5 < time.monotonic() - begun < 5
        nodes["gpu01"].release.set()
        asking.threads[0].join(10)
        assert asking.answers == [("running", 200)]
    finally:
        made.stop()


def test_slow_clients_leave_others_their_places(narrow: Gateway) -> None:
    """Bodies that trickle take no place on a node, however many they are."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\n".encode()
    head += f"Authorization: {BEARER['Authorization']}\r\nContent-Length: 50000\r\n\r\n".encode()
    slow = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(300)]
    try:
        for each in slow:
            each.sendall(head + b"x" * 30_000)
        took = []
        for _ in range(50):
            begun = time.monotonic()
            assert narrow.get()[0] == 200
            took.append(time.monotonic() - begun)
        assert sorted(took)[48] < 0.5
        assert narrow.haproxy.sessions(BACKEND, "gpu01") == 0
    finally:
        for each in slow:
            each.close()
