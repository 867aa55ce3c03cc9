# SPDX-License-Identifier: Apache-2.0
"""Network namespaces with links of a given rate, and a swarm or an rsync among them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_fleet.artifact.manifest import Manifest
from glm_fleet.artifact.store import Store
from glm_fleet.core.errors import FleetError
from glm_fleet.transfer.control import NICE, ask
from glm_fleet.transfer.session import Job

ROOT = Path(__file__).resolve().parents[2]
PORT = 8009
COMMIT = "c0ffee" + "0" * 34
# A name is the beginning of the names of a bridge and of its links.
_LAN, _UPLINKS = "glmbench", "glmuplink"
_NETWORKS = {_LAN: "10.78.0", _UPLINKS: "10.78.1"}
_INSIDE = {_LAN: "eth0", _UPLINKS: "up0"}


def run(*words: str, check: bool = True) -> None:
    """Run a program, and say what it said if it fails."""
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert not (check and done.returncode), f"{' '.join(words)}: {done.stderr}"


@dataclass(frozen=True)
class Node:
    """A namespace with one link to the other nodes, and perhaps one to the world."""

    number: int

    @property
    def space(self) -> str:
        """Name of the namespace."""
        return f"glmbench{self.number}"

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"node{self.number}"

    @property
    def address(self) -> str:
        """Its address among the nodes."""
        return self._at(_LAN)

    @property
    def world_address(self) -> str:
        """Its address at its uplink."""
        return self._at(_UPLINKS)

    def _at(self, bridge: str) -> str:
        return f"{_NETWORKS[bridge]}.{10 + self.number}"

    def connect(self, bridge: str, rate: int) -> None:
        """Give it a link of ``rate`` bits per second, each way."""
        outside, inside = f"{bridge}-{self.number}", _INSIDE[bridge]
        peer = ["peer", "name", inside, "netns", self.space]
        run("ip", "link", "add", outside, "type", "veth", *peer)
        run("ip", "link", "set", outside, "master", bridge, "up")
        address = ["address", "add", f"{self._at(bridge)}/24", "dev", inside]
        run("ip", "-netns", self.space, *address)
        run("ip", "-netns", self.space, "link", "set", inside, "up")
        tbf = ["tbf", "rate", str(rate), "burst", "64kb", "latency", "50ms"]
        run("tc", "qdisc", "replace", "dev", outside, "root", *tbf)
        shape = ["tc", "qdisc", "replace", "dev", inside, "root", *tbf]
        run("ip", "netns", "exec", self.space, *shape)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program in it."""
        return subprocess.Popen(["ip", "netns", "exec", self.space, *command], **options)


@contextlib.contextmanager
def network(count: int, rate: int, uplinks: Sequence[int] = ()) -> Iterator[list[Node]]:
    """``count`` namespaces on one bridge, each with a link of ``rate`` bits per second.

    The first ones have a second link at another bridge, of so many bits per second.
    """
    nodes = [Node(number) for number in range(count)]
    remove(nodes)
    try:
        for bridge in _NETWORKS:
            run("ip", "link", "add", bridge, "type", "bridge")
            run("ip", "link", "set", bridge, "up")
        for node in nodes:
            run("ip", "netns", "add", node.space)
            run("ip", "-netns", node.space, "link", "set", "lo", "up")
            node.connect(_LAN, rate)
        for node, uplink in zip(nodes, uplinks):
            node.connect(_UPLINKS, uplink)
        yield nodes
    finally:
        remove(nodes)


def remove(nodes: Sequence[Node]) -> None:
    """Take the namespaces away, and their links, which else stay until the kernel is done."""
    for node in nodes:
        for bridge in _NETWORKS:
            run("ip", "link", "delete", f"{bridge}-{node.number}", check=False)
        run("ip", "netns", "delete", node.space, check=False)
    for bridge in _NETWORKS:
        run("ip", "link", "delete", bridge, check=False)


class Swarm:
    """The agents of some nodes, and what a controller does with them."""

    def __init__(self, nodes: Sequence[Node], manifest: Manifest, folder: Path) -> None:
        self.nodes = list(nodes)
        self.manifest = manifest
        self.folder = folder
        self.torrents: dict[str, str] = {}
        self.last: dict[str, dict[str, Any]] = {}
        self._agents: dict[str, subprocess.Popen[bytes]] = {}

    def root(self, node: Node) -> Path:
        """Where a node keeps its artifacts."""
        return self.folder / node.name / "artifacts"

    def start(self, *, rate_limit: int = 0, stall_timeout: float = 60) -> None:
        """Start an agent in every node."""
        peers = {node.name: node.address for node in self.nodes}
        for node in self.nodes:
            root = self.root(node)
            root.mkdir(parents=True, exist_ok=True)
            job = Job(root, self.manifest, node.address, PORT, peers, rate_limit, stall_timeout)
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "module_utils")}
            # As its unit has it on a node.
            command = ["nice", "-n", str(NICE), sys.executable, "-B"]
            command += ["-m", "glm_fleet.swarm", "agent"]
            agent = node.start(
                *command,
                str(self.folder / node.name / "run"),
                stdin=subprocess.PIPE,
                env=environment,
            )
            assert agent.stdin is not None
            agent.stdin.write(json.dumps(job.as_dict()).encode())
            agent.stdin.close()
            self._agents[node.name] = agent
        for node in self.nodes:
            self._wait_for(node)

    def _wait_for(self, node: Node) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                ask({}, self.folder / node.name / "run")
                break
            except FleetError:
                assert time.monotonic() < deadline, f"{node.name} has no agent"
                time.sleep(0.05)

    def ask(self, node: Node, wait: float = 0.5, *, leave: bool = False) -> dict[str, Any]:
        """Do what the controller does every other second."""
        request = {
            "run": "bench",
            "torrents": self.torrents,
            "have": list(self.torrents),
            "wait": wait,
            "leave": leave,
        }
        answer = ask(request, self.folder / node.name / "run")
        self.torrents.update(answer["torrents"])
        self.last[node.name] = answer
        return answer

    def wait(self, timeout: float = 600) -> None:
        """Carry torrents from node to node until every node has published or failed."""
        deadline = time.monotonic() + timeout

        def ended() -> bool:
            standings = [self.last.get(node.name, {}).get("standing") for node in self.nodes]
            return all(each in ("published", "failed") for each in standings)

        def attend(node: Node) -> None:
            while time.monotonic() < deadline and not ended():
                try:
                    self.ask(node)
                except FleetError:
                    time.sleep(0.2)

        threads = [threading.Thread(target=attend, args=(node,)) for node in self.nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wrong = {
            name: answer["failure"] or answer["progress"]
            for name, answer in self.last.items()
            if answer["standing"] != "published"
        }
        assert not wrong, wrong

    def stop(self) -> None:
        """End the agents."""
        for agent in self._agents.values():
            agent.send_signal(signal.SIGTERM)
        for agent in self._agents.values():
            agent.wait(30)


def make_artifact(root: Path, size: int, shards: int = 12, small: int = 8) -> Manifest:
    """Publish an artifact of random bytes below ``root``."""
    store = Store(root)
    folder = store.staging_path("model", "bench.making")
    folder.mkdir(parents=True)
    for number in range(shards):
        with (folder / f"model-{number:05d}-of-{shards:05d}.safetensors").open("wb") as stream:
            left = size // shards
            while left > 0:
                left -= stream.write(os.urandom(min(left, 1 << 24)))
    for number in range(small):
        (folder / f"config-{number}.json").write_bytes(os.urandom(20_000))
    return store.adopt(folder, kind="model", slug="bench", provenance={"revision": COMMIT})
