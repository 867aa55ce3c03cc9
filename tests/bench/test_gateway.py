# SPDX-License-Identifier: Apache-2.0
"""What the front door costs beside a HAProxy that only balances, and how it spreads requests.

Both gateways stand before the same servers, and rounds of both alternate: what else the machine
does meets both.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from glm_fleet.gateway.clients import Client, Key, digest
from glm_fleet.gateway.haproxy import BACKEND

from tests.gateway import KEY, Gateway, Node, eventually

from .conftest import Record

ROUNDS = 12
REQUESTS = 150
# No engine has a first token of a real model so early.
FIRST_TOKEN_MS = 10
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant. " * 40},
    {"role": "user", "content": "Tell me of the river. " * 60},
]
BODY = json.dumps({"model": "glm-5.2", "messages": MESSAGES, "stream": True}).encode()
HEAD = (
    f"POST /v1/chat/completions HTTP/1.1\r\nHost: glm\r\nAuthorization: Bearer {KEY}\r\n"
    f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
).encode()
PLAIN = """
global
    maxconn 4096
    stats socket {socket} level admin
defaults
    mode http
    option forwardfor
    option http-server-close
    option http-no-delay
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend plain
    bind 127.0.0.1:{port}
    default_backend nodes
backend nodes
    balance leastconn
"""


def plainly(gateway: Gateway) -> None:
    """Make it a HAProxy with leastconn before the same nodes, and nothing else."""

    def plain(_: str) -> str:
        servers = "".join(f"    server {n} {e}\n" for n, e in gateway.endpoints.items())
        text = PLAIN.format(socket=gateway.folder / "admin.sock", port=gateway.port) + servers
        return text.replace("global\n", "global\n    description glm-fleet first\n")

    gateway.edit = plain


def gateway_to(folder: Path, ports: list[int], **variables: object) -> Gateway:
    """A gateway before servers that are on these ports."""
    folder.mkdir()
    made = Gateway(folder, {}, **variables)
    made.endpoints = {f"gpu{n:02d}": f"127.0.0.1:{port}" for n, port in enumerate(ports, start=1)}
    return made


def ask(connection: socket.socket) -> None:
    """One request on a connection that stays, up to the end of its answer."""
    connection.sendall(HEAD + BODY)
    answer = b""
    while not answer.endswith(b"data: x"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]


def latencies(port: int) -> list[float]:
    """Seconds of one request after the other."""
    took = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ask(connection)
        for _ in range(REQUESTS):
            begun = time.perf_counter()
            ask(connection)
            took.append(time.perf_counter() - begun)
    return took


def rate(port: int) -> float:
    """Requests a second of four clients at once."""
    threads = [threading.Thread(target=latencies, args=(port,)) for _ in range(4)]
    begun = time.perf_counter()
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return 4 * (REQUESTS + 1) / (time.perf_counter() - begun)


ORIGIN = """
global
    description glm-fleet first
    stats socket {socket} level admin
    lua-load {lua}
defaults
    mode http
    timeout client 60s
    timeout connect 5s
    timeout server 60s
frontend origin
    bind 127.0.0.1:{port}
    http-request wait-for-body time 10s
    http-request lua.engine
    http-request return status 200 content-type text/event-stream string "data: x"
"""


@contextmanager
def origin(folder: Path, delay_ms: int) -> Iterator[int]:
    """The port of a server that answers after so long: another HAProxy."""
    made = gateway_to(folder, [])
    lua = folder / "engine.lua"
    nap = f"core.msleep({delay_ms})" if delay_ms else ""
    lua.write_text(f'core.register_action("engine", {{"http-req"}}, function(txn) {nap} end)\n')
    made.edit = lambda _: ORIGIN.format(socket=made.folder / "admin.sock", port=made.port, lua=lua)
    made.start()
    try:
        yield made.port
    finally:
        made.stop()


def started(gateway: Gateway) -> Gateway:
    gateway.start()
    return gateway


def ready(gateway: Gateway) -> Gateway:
    """Start it with every server taking requests, as checked servers do once they were joined."""
    gateway.edit = lambda text: text.replace("default-server disabled check", "default-server")
    return started(gateway)


def compared(folder: Path, delay_ms: int) -> dict[str, list[float]]:
    """Seconds of requests through ours and through a plain one, by turns."""
    folder.mkdir()
    took: dict[str, list[float]] = {"ours": [], "plain": []}
    with origin(folder / "origin", delay_ms) as port:
        ours = ready(gateway_to(folder / "ours", [port] * 3))
        plain = gateway_to(folder / "plain", [port] * 3)
        plainly(plain)
        started(plain)
        try:
            for _ in range(ROUNDS):
                took["ours"] += latencies(ours.port)
                took["plain"] += latencies(plain.port)
        finally:
            ours.stop()
            plain.stop()
    return took


def test_what_the_front_door_adds(tmp_path: Path, record: Record) -> None:
    """Beside an engine that is faster than any, and beside one that needs no time."""
    took = compared(tmp_path / "engine", FIRST_TOKEN_MS)
    cuts = {name: statistics.quantiles(each, n=100) for name, each in took.items()}
    for percentile, goal in ((50, 1.1), (99, 1.2)):
        mine, theirs = (cuts[name][percentile - 1] * 1e3 for name in ("ours", "plain"))
        record(
            f"gateway-latency-p{percentile}",
            mine / theirs,
            goal=goal,
            unit="x plain HAProxy",
            context=f"{mine:.2f} against {theirs:.2f} ms a request of {len(BODY)} bytes to a "
            f"server that answers after {FIRST_TOKEN_MS} ms, {ROUNDS * REQUESTS} each",
        )
    took = compared(tmp_path / "at-once", 0)
    mine, theirs = (statistics.median(took[name]) * 1e6 for name in ("ours", "plain"))
    record(
        "gateway-latency-added",
        mine - theirs,
        goal=200,
        unit="us",
        context=f"{mine:.0f} against {theirs:.0f} us, medians of {ROUNDS * REQUESTS} requests to "
        "a server that answers at once",
    )


def test_ten_thousand_clients(tmp_path: Path, record: Record) -> None:
    with origin(tmp_path / "origin", 0) as port:
        rates = rates_of(tmp_path, port)
    with_map, without = (statistics.median(rates[name]) for name in ("many", "none"))
    record(
        "gateway-rate-10000-clients",
        with_map / without,
        goal=0.9,
        better="higher",
        unit="x without keys",
        context=f"{with_map:.0f} against {without:.0f} requests a second, medians of {ROUNDS} "
        "rounds of four clients",
    )


def rates_of(folder: Path, port: int) -> dict[str, list[float]]:
    """Requests a second with 10,000 clients in the map and without a map, by turns."""
    many = gateway_to(folder / "many", [port] * 3)
    keys = (Key(str(number), digest(f"key {number}")) for number in range(10_000))
    others = {f"client{n}": Client(f"client{n}", (key,)) for n, key in enumerate(keys)}
    many.clients = type(many.clients)({**others, **many.clients.clients})
    many.keep()
    ready(many)
    none = ready(gateway_to(folder / "none", [port] * 3, gateway_authentication="none"))
    rates: dict[str, list[float]] = {"many": [], "none": []}
    try:
        for _ in range(ROUNDS):
            rates["many"].append(rate(many.port))
            rates["none"].append(rate(none.port))
    finally:
        many.stop()
        none.stop()
    return rates


def test_one_hot_conversation(tmp_path: Path, record: Record) -> None:
    """Everybody asks with the same beginning, and nobody is answered before all have asked."""
    count = 96
    nodes = {f"gpu{n:02d}": Node() for n in (1, 2, 3)}
    hot = ready(gateway_to(tmp_path / "hot", [node.port for node in nodes.values()]))
    waiting = HEAD.replace(b"Host: glm\r\n", b"Host: glm\r\nX-Wait: 1\r\n")
    try:
        connections = [socket.create_connection(("127.0.0.1", hot.port)) for _ in range(count)]
        for each in connections:
            each.sendall(waiting + BODY)
        eventually(lambda: sum(len(node.seen) for node in nodes.values()) == count, timeout=30)
        running = [hot.haproxy.sessions(BACKEND, name) for name in nodes]
        for node in nodes.values():
            node.release.set()
        for each in connections:
            each.close()
    finally:
        hot.stop()
        for node in nodes.values():
            node.close()
    assert sum(running) == count
    record(
        "gateway-hot-conversation",
        max(running) / (count / len(running)),
        goal=1.25,
        unit="x mean",
        context=f"requests at once on three nodes: {', '.join(map(str, sorted(running)))}",
    )


class CachingNode(Node):
    """A node that remembers which beginnings of conversations it has read, as a prefix cache does.

    A request takes some time, so that several are under way at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()
        self.read = self.found = 0
        self.lock = threading.Lock()

    def took(self, body: bytes) -> None:
        """Count the characters of a prompt, and those of its longest beginning that is known."""
        texts = [f"{each['role']}:{each['content']}" for each in json.loads(body)["messages"]]
        beginnings = ["\n".join(texts[:end]) for end in range(1, len(texts) + 1)]
        with self.lock:
            self.read += len(beginnings[-1])
            self.found += max((len(each) for each in beginnings if each in self.known), default=0)
            self.known.update(beginnings)
        time.sleep(random.uniform(0.02, 0.08))  # noqa: S311 - no secret


def talk(port: int, number: int, turns: int = 8) -> None:
    """One conversation: each turn sends everything before it again."""
    dice = random.Random(number)  # noqa: S311 - no secret
    messages = [{"role": "system", "content": "You are a helpful assistant. " * 40}]
    for turn in range(turns):
        question = f"conversation {number} turn {turn} " + "word " * dice.randint(20, 200)
        messages.append({"role": "user", "content": question})
        body = json.dumps({"model": "glm-5.2", "messages": messages}).encode()
        head = HEAD.replace(b"Length: %d" % len(BODY), b"Length: %d" % len(body))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        messages.append({"role": "assistant", "content": "answer " * dice.randint(20, 200)})
        time.sleep(dice.uniform(0.0, 0.1))


def share_found(folder: Path, count: int, **variables: object) -> float:
    """The share of prompts that nodes had in their cache, over 48 conversations, 16 at once."""
    nodes = [CachingNode() for _ in range(count)]
    door = ready(gateway_to(folder, [node.port for node in nodes], **variables))
    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda number: talk(door.port, number), range(48)))
    finally:
        door.stop()
        for node in nodes:
            node.close()
    return sum(node.found for node in nodes) / sum(node.read for node in nodes)


def test_conversations_find_their_beginning(tmp_path: Path, record: Record) -> None:
    alone = share_found(tmp_path / "alone", 1)
    ours = share_found(tmp_path / "ours", 3)
    fewest = share_found(tmp_path / "fewest", 3, gateway_affinity_load=0)
    record(
        "gateway-prefix-found",
        ours / alone,
        goal=0.9,
        better="higher",
        unit="x one node alone",
        context=f"characters that were read before, 48 conversations of 8 turns, 16 at once: "
        f"{alone:.3f} on one node, {ours:.3f} on three, {fewest:.3f} with leastconn; nodes that "
        "remember as a prefix cache does, not vLLM's own counters",
    )
