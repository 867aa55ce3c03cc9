# SPDX-License-Identifier: Apache-2.0
"""Clients of the fleet while something is done to it, and who takes their requests meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai

from .conftest import Fleet, say, wait_until

_MOST_REQUESTS = 5000
# Two clients ask all the time, yet leave two cores room for the engines that start: a worker of
# vLLM spins for a second after each step, so a request costs its node a second of a core.
_PAUSE_S = 4.0

# Runs on the gateway, without anything installed there: a line of JSON twice a second.
_WATCHER = """
import csv, json, socket, time
while True:
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(2)
            link.connect("/run/haproxy/admin.sock")
            link.sendall(b"show stat\\n")
            text = b"".join(iter(lambda: link.recv(65536), b"")).decode()
        rows = csv.DictReader(text.lstrip("# ").splitlines())
        state = {row["svname"]: row["status"].split()[0] for row in rows
                 if row["pxname"] == "glm_nodes" and row["svname"] != "BACKEND"}
    except OSError:
        state = {}
    print(json.dumps([time.time(), state]), flush=True)
    time.sleep(0.5)
"""


@dataclass(frozen=True)
class Request:
    """One request as its client saw it; times are seconds since the epoch."""

    kind: str
    outcome: str  # complete, failed or truncated
    began: float
    ended: float
    node: str
    error: str = ""


@dataclass
class Load:
    """What the clients and the watcher saw."""

    requests: list[Request] = field(default_factory=list)
    states: list[tuple[float, dict[str, str]]] = field(default_factory=list)

    def count(self) -> dict[str, int]:
        """Requests by outcome."""
        return dict(Counter(each.outcome for each in self.requests))

    def bad(self) -> list[Request]:
        """The requests that did not complete."""
        return [each for each in self.requests if each.outcome != "complete"]

    def fewest_ready(self) -> int:
        """The fewest nodes that took requests at any moment at which the gateway answered."""
        return min(
            sum(status == "UP" for status in state.values()) for _, state in self.states if state
        )

    def absence(self, node: str) -> list[tuple[float, float]]:
        """When a node took no requests: (from, to), as the gateway saw it."""
        spans: list[tuple[float, float]] = []
        since = 0.0
        for moment, state in self.states:
            if not state:
                continue
            if state.get(node) == "UP":
                if since:
                    spans.append((since, moment))
                since = 0.0
            elif not since:
                since = moment
        return [*spans, (since, time.time())] if since else spans

    def wait_ready(self, *nodes: str) -> None:
        """Wait until the gateway was seen to send requests to these nodes again."""
        wait_until(
            lambda: bool(self.states) and all(self.states[-1][1].get(n) == "UP" for n in nodes),
            f"the gateway does not send requests to {', '.join(nodes)}",
        )

    def say(self, what: str) -> None:
        """Print the figures."""
        nodes = dict(Counter(each.node for each in self.requests))
        say(f"{what}: requests {self.count()}, by node {nodes}, "
            f"fewest ready {self.fewest_ready()}")  # fmt: skip
        for each in self.bad():
            say(f"  {each}")


async def _ask(client: openai.AsyncOpenAI, kind: str) -> Request:
    began, node, text, finished = time.time(), "", 0, False
    body: dict[str, Any] = {
        "model": "glm-5.2",
        "messages": [{"role": "user", "content": "Tell me of the river"}],
        "max_tokens": 16,
        # A conversation of its own: those that begin alike go to the same node.
        "extra_headers": {"X-Session-Id": uuid.uuid4().hex},
    }
    try:
        if kind == "plain":
            raw = await client.chat.completions.with_raw_response.create(**body)
            node = raw.headers.get("x-glm-fleet-node", "")
            answer = raw.parse()
            text = len(answer.choices[0].message.content or "")
            finished = answer.choices[0].finish_reason is not None
        else:
            raw = await client.chat.completions.with_raw_response.create(**body, stream=True)
            node = raw.headers.get("x-glm-fleet-node", "")
            async for event in raw.parse():
                for choice in event.choices:
                    text += len(choice.delta.content or "")
                    finished = finished or choice.finish_reason is not None
    except Exception as error:  # noqa: BLE001 - whatever a client can meet is what is counted
        outcome = "truncated" if node else "failed"
        return Request(kind, outcome, began, time.time(), node, f"{type(error).__name__}: {error}")
    outcome = "complete" if finished and text else "truncated"
    return Request(kind, outcome, began, time.time(), node)


async def _clients(fleet: Fleet, load: Load, stop: threading.Event) -> None:
    async def one(kind: str) -> None:
        # No retries: what fails here is what a client would have seen.
        async with openai.AsyncOpenAI(
            base_url=f"{fleet.url}/v1",
            api_key=fleet.key,
            max_retries=0,
            timeout=120,
            http_client=openai.DefaultAsyncHttpxClient(verify=fleet.trust),
        ) as client:
            while not stop.is_set() and len(load.requests) < _MOST_REQUESTS:
                load.requests.append(await _ask(client, kind))
                await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(one("stream"), one("plain"))


def _watch(process: subprocess.Popen[str], load: Load) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            moment, state = json.loads(line)
            load.states.append((moment, state))


@contextlib.contextmanager
def under_load(fleet: Fleet, what: str) -> Iterator[Load]:
    """Ask the gateway all the time, a stream and a plain request beside each other."""
    load, stop = Load(), threading.Event()
    watcher = subprocess.Popen(
        [*fleet.ssh(fleet.gateway), "sudo python3 -u -"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert watcher.stdin is not None
    watcher.stdin.write(_WATCHER)
    watcher.stdin.close()
    threads = [
        threading.Thread(target=_watch, args=(watcher, load), daemon=True),
        threading.Thread(target=lambda: asyncio.run(_clients(fleet, load, stop)), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        threads[1].join(150)
        watcher.kill()
        watcher.wait()
        threads[0].join(10)
        load.say(what)
