# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while an artifact is distributed, on lab hosts: nothing wrong is published."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.artifact.manifest import Manifest
from glm_fleet.artifact.store import Store
from glm_fleet.transfer.torrent import bundles

from lab.settings import ALL_HOSTS
from tests.bench.links import make_artifact

from .conftest import Fleet, Run, kill_controller

pytestmark = [pytest.mark.fleet, pytest.mark.long]

PLACE = "/srv/test-swarm"
PLAYBOOK = "tests/fleet/playbooks/distribute.yml"
BYTES = 160_000_000
RATE = 16_000_000
PIECE = 1024 * 1024
STALL_S = 12


@dataclass
class Shop:
    """An artifact on the first node, and what the tests do with its copies."""

    fleet: Fleet
    manifest: Manifest
    original: Path
    offer: Path
    plays: list[subprocess.Popen[str]] = field(default_factory=list)

    def store(self, node: str) -> Store:
        """The artifacts of a node, seen from this machine."""
        return Store(ALL_HOSTS[node].root / PLACE.strip("/"))

    def file(self, node: str, number: int = 0, *, staged: bool = False) -> Path:
        """A shard as a node has it."""
        store = self.store(node)
        place = store.staging_path if staged else store.published_path
        return place("model", self.manifest.id) / self.manifest.files[number].path

    def arguments(self, **variables: Any) -> list[str]:
        """What is said to the playbook."""
        said = {
            "artifact_root": PLACE,
            "artifact_stall_timeout": STALL_S,
            "artifact_rate_limit": RATE,
            "distribute_offer": str(self.offer),
            **variables,
        }
        return [PLAYBOOK, "-v", "-e", json.dumps(said)]

    def run(self, **variables: Any) -> Run:
        """Distribute to the end."""
        return self.fleet.playbook(*self.arguments(**variables))

    def start(self, **variables: Any) -> subprocess.Popen[str]:
        """Begin to distribute."""
        play = self.fleet.start_playbook(*self.arguments(**variables))
        self.plays.append(play)
        return play

    def end(self) -> None:
        """End what a test that failed left at work."""
        for play in self.plays:
            if play.poll() is None:
                kill_controller(play)
                play.communicate()
        self.plays.clear()

    def agent(self, node: str) -> dict[str, Any]:
        """Ask a node's agent; {} when there is none."""
        asked = self.fleet.shell(
            node,
            "PYTHONPATH=/opt/glm-fleet/lib python3 -B -m glm_fleet.swarm ask <<< '{}'",
        )
        if asked.rc:
            # The library is not there yet.
            return {}
        answer: dict[str, Any] = json.loads(asked.output.splitlines()[-1])
        return {} if answer["standing"] == "gone" else answer

    def wait(self, node: str, true: Callable[[dict[str, Any]], bool], seconds: float = 400) -> None:
        """Wait until an agent's answer is as wanted."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.agent(node)
            if answer and true(answer):
                return
            time.sleep(0.5)
        raise AssertionError(f"{node} did not come so far: {answer}")

    def halfway(self, node: str) -> None:
        """Wait until a node has half of the artifact."""
        self.wait(node, lambda answer: answer["progress"]["done"] > BYTES * 0.5)

    def kill(self, node: str) -> None:
        """Kill a node's agent, as a crash would."""
        self.fleet.shell(node, "systemctl kill --signal=KILL glm-swarm.service")

    def published(self, node: str) -> bool:
        """Tell whether a node has published every byte; never anything else."""
        folder = self.store(node).published_path("model", self.manifest.id)
        if not (folder / "manifest.json").is_file():
            return False
        damage = self.store(node).verify(self.manifest, deep=True)
        assert not damage, damage
        return True

    def all_published(self) -> bool:
        return all(self.published(node) for node in self.fleet.nodes)

    def reset(self) -> None:
        """Only the first node has the artifact."""
        for node in self.fleet.nodes:
            self.fleet.shell(node, "systemctl stop glm-swarm.service; rm -rf /run/glm-fleet/swarm")
            shutil.rmtree(self.store(node).root, ignore_errors=True)
        first = self.store(self.fleet.nodes[0]).published_path("model", self.manifest.id)
        shutil.copytree(self.original, first)


@pytest.fixture(scope="module")
def made(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("swarm")
    manifest = make_artifact(folder, BYTES, shards=2, small=3)
    original = Store(folder).published_path("model", manifest.id)
    offer = folder / "offer.json"
    described = {"kind": "model", "id": manifest.id, "path": str(original)}
    offer.write_text(json.dumps({**described, "manifest": manifest.as_dict(), "push": False}))
    shop = Shop(fleet, manifest, original, offer)
    yield shop
    for node in fleet.nodes:
        shutil.rmtree(shop.store(node).root, ignore_errors=True)


@pytest.fixture
def shop(made: Shop) -> Iterator[Shop]:
    made.reset()
    try:
        yield made
    finally:
        made.end()


def received(run: Run, node: str) -> int:
    """How many bytes came to a node, as the result of the task says."""
    found = re.search(rf"\[{node}\][^\n]*\n(?:[^\[]*\n)*?\s+received: (\d+)", run.output)
    assert found, run.output[-3000:]
    return int(found[1])


def flip(path: Path, offset: int) -> None:
    """Change a byte as a failing disk does: size and times stay."""
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_controller_pushes_once_and_the_swarm_does_the_rest(shop: Shop) -> None:
    first = shop.fleet.nodes[0]
    shutil.rmtree(shop.store(first).root)
    offer = {**json.loads(shop.offer.read_text()), "push": True}
    pushed = shop.offer.with_name("pushed.json")
    pushed.write_text(json.dumps(offer))
    run = shop.run(distribute_offer=str(pushed), artifact_rate_limit=0)
    assert run.rc == 0, run.output[-4000:]
    assert shop.all_published()
    assert received(run, first) == 0
    again = shop.run(distribute_offer=str(pushed))
    assert (again.rc, again.changed) == (0, {}), again.output[-3000:]
    for node in shop.fleet.nodes:
        assert shop.fleet.shell(node, "systemctl is-active glm-swarm").output.strip() == "inactive"
        assert ":8009" not in shop.fleet.shell(node, "ss -ltn").output


def test_a_killed_receiver_goes_on_and_a_byte_that_flipped_meanwhile_is_mended(shop: Shop) -> None:
    _, second, third = shop.fleet.nodes
    play = shop.start()
    shop.halfway(third)
    shop.kill(third)
    output = play.communicate(timeout=600)[0]
    assert play.returncode != 0
    assert shop.published(second), output[-3000:]
    assert not shop.published(third)
    have = sum(
        shop.file(third, number, staged=True).stat().st_blocks * 512
        for number in range(len(shop.manifest.files))
        if shop.file(third, number, staged=True).exists()
    )
    shard = max(
        (shop.file(third, number, staged=True) for number in (3, 4)),
        key=lambda path: path.stat().st_blocks if path.exists() else 0,
    )
    flip(shard, 1000)
    run = shop.run()
    assert run.rc == 0, run.output[-4000:]
    assert shop.published(third)
    # What was being written when it was killed, the mended piece, and one per connection.
    assert received(run, third) <= BYTES - have + 8 * PIECE


def test_a_byte_that_flipped_at_the_source_is_named_and_mended_from_another(shop: Shop) -> None:
    first, _, third = shop.fleet.nodes
    assert shop.run(artifact_rate_limit=0).rc == 0
    shutil.rmtree(shop.store(third).root)
    for number in (3, 4):
        flip(shop.file(first, number), 5_000_000 * number)
    run = shop.run(artifact_rate_limit=0)
    assert run.rc == 0, run.output[-4000:]
    assert shop.published(first)
    assert shop.published(third)
    named = [entry.path for entry in shop.manifest.files[3:5] if entry.path in run.output]
    assert "was damaged on this node" in run.output
    assert named


def test_the_only_source_is_damaged(shop: Shop) -> None:
    first = shop.fleet.nodes[0]
    flip(shop.file(first, 3), 40_000_000)
    run = shop.run(artifact_rate_limit=0)
    assert run.rc != 0
    assert shop.manifest.files[3].path in run.output
    assert "No node offers a part of the artifact" in run.output
    assert not any(shop.published(node) for node in shop.fleet.nodes)
    staging = shop.store(first).staging_path("model", shop.manifest.id)
    shutil.copyfile(
        shop.original / shop.manifest.files[3].path, staging / shop.manifest.files[3].path
    )
    assert shop.run(artifact_rate_limit=0).rc == 0
    assert shop.all_published()


ROGUE = """
import hashlib, os, socket, struct, sys, threading
infohash, victim, pieces = bytes.fromhex(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def attack():
    link = socket.create_connection((victim, 8009), 10)
    link.settimeout(60)
    # The bit that says version 2.
    hello = bytes([19]) + b"BitTorrent protocol" + bytes([0] * 7 + [16])
    link.sendall(hello + infohash + b"-GX0001-" + os.urandom(12))
    stream = link.makefile("rb")
    stream.read(68)
    bits = bytearray((pieces + 7) // 8)
    for number in range(pieces): bits[number // 8] |= 128 >> number % 8
    def send(kind, body=b""): link.sendall(struct.pack(">IB", 1 + len(body), kind) + body)
    send(5, bytes(bits)); send(1)
    lies = 0
    while head := stream.read(4):
        size = struct.unpack(">I", head)[0]
        body = stream.read(size)
        if size and body[0] == 6:
            piece, begin, length = struct.unpack(">III", body[1:13])
            send(7, struct.pack(">II", piece, begin) + os.urandom(length)); lies += 1
            if lies == 1: print("lied", flush=True)
while True:
    try: attack()
    except OSError as error: pass
"""


# What somebody with root on a node puts into every Python there: its own files have the hashes of
# the manifest, and a torrent of them follows from it.
TAKEN_OVER = """
try:
    import dataclasses, json, pathlib
    import glm_fleet.artifact.merkle as merkle, glm_fleet.transfer.torrent as torrent
except ImportError:
    pass
else:
    right, real = json.load(open("/srv/taken-over.json")), merkle.hash_file
    def hash_file(path, *rest):
        found = real(path, *rest)
        wanted = right.get(pathlib.Path(path).name, found.sha256)
        return dataclasses.replace(found, sha256=wanted)
    merkle.hash_file = torrent.hash_file = hash_file
    torrent._check_layer = lambda *_: None
"""
HOOK = "usr/local/lib/python3.11/dist-packages"


@pytest.fixture
def taken_over(shop: Shop) -> Iterator[str]:
    """The last node: it has other bytes of the same names and sizes, and its agent lies."""
    node = shop.fleet.nodes[-1]
    root = ALL_HOSTS[node].root
    shutil.copytree(shop.original, shop.store(node).published_path("model", shop.manifest.id))
    for number, each in enumerate(shop.manifest.files):
        shop.file(node, number).write_bytes(os.urandom(each.size))
    right = {Path(each.path).name: each.sha256 for each in shop.manifest.files}
    planted = {
        "srv/taken-over.json": json.dumps(right),
        f"{HOOK}/taken_over.py": TAKEN_OVER,
        f"{HOOK}/taken_over.pth": "import taken_over\n",
    }
    for name, text in planted.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    yield node
    for name in planted:
        (root / name).unlink()


@pytest.mark.parametrize("version", ["today", "before"])
def test_a_node_that_was_taken_over_changes_no_published_byte(
    shop: Shop, taken_over: str, version: str, tmp_path: Path
) -> None:
    """Manifests of the version before do not say which torrents are their own."""
    first, second, _ = shop.fleet.nodes
    offer = json.loads(shop.offer.read_text())
    if version == "before":
        for each in offer["manifest"]["files"]:
            each.pop("root", None)
    written = tmp_path / "offer.json"
    written.write_text(json.dumps(offer))
    run = shop.run(artifact_rate_limit=0, distribute_offer=str(written))
    # Its lies are heard: with a manifest of today nobody is given such a torrent.
    assert version == "before" or "a torrent that nobody is given" in run.output, run.output[-4000:]
    assert shop.published(first), "what was published before changed"
    folder = shop.store(second).published_path("model", shop.manifest.id)
    assert shop.published(second) or not folder.exists(), "wrong bytes were published"
    if run.rc:
        # Where a lie was taken, the run stops and names the file.
        assert any(each.path in run.output for each in shop.manifest.files), run.output[-4000:]


def infohash(torrent: bytes) -> str:
    """The name of a torrent on the wire: the hash of its info, the first 20 bytes."""
    begin = torrent.index(b"4:info") + 6
    end = torrent.index(b"12:piece layers")
    return hashlib.sha256(torrent[begin:end]).digest()[:20].hex()


def test_a_node_that_sends_wrong_bytes_is_thrown_out(shop: Shop) -> None:
    first, second, third = shop.fleet.nodes
    play = shop.start()
    shop.wait(third, lambda answer: not answer["unknown"])
    shop.kill(third)
    shown = shop.fleet.shell(first, "base64 -w0 /run/glm-fleet/swarm/0001.torrent").output
    name = infohash(base64.b64decode(shown))
    space = ALL_HOSTS[third].netns
    bundle = next(each for each in bundles(shop.manifest) if each.name == "0001")
    pieces = -(-bundle.bytes // bundle.piece_length)
    command = [sys.executable, "-c", ROGUE, name, shop.fleet.addresses[second], str(pieces)]
    rogue = subprocess.Popen(
        ["ip", "netns", "exec", space, *command], stdout=subprocess.PIPE, text=True
    )
    try:
        output = play.communicate(timeout=600)[0]
    finally:
        rogue.kill()
    assert rogue.stdout is not None
    assert "lied" in rogue.stdout.read()
    assert shop.published(second), output[-4000:]
    assert "wrong bytes" in output


def test_a_slow_node_holds_nobody_up_and_the_source_may_go(shop: Shop) -> None:
    first, second, third = shop.fleet.nodes
    slow = ALL_HOSTS[third]
    limit = ["tbf", "rate", f"{RATE * 8 // 10}", "burst", "64kb", "latency", "50ms"]
    subprocess.run(["tc", "qdisc", "add", "dev", slow.veth, "root", *limit], check=True)
    try:
        play = shop.start()
        shop.wait(second, lambda answer: answer["standing"] == "published")
        assert shop.agent(third)["progress"]["done"] < BYTES * 0.5
        assert shop.published(second)
        shop.kill(first)
    finally:
        subprocess.run(["tc", "qdisc", "delete", "dev", slow.veth, "root"], check=True)
    play.communicate(timeout=600)
    assert shop.published(third)
    assert shop.run().rc == 0


def test_a_disk_that_fills_up_is_named_and_the_others_go_on(shop: Shop) -> None:
    _, second, third = shop.fleet.nodes
    small = BYTES + 30_000_000
    shop.fleet.shell(third, f"mkdir -p {PLACE} && mount -t tmpfs -o size={small} tmpfs {PLACE}")
    try:
        play = shop.start()
        shop.wait(third, lambda answer: answer["progress"]["done"] > 0)
        shop.fleet.shell(third, f"fallocate -l {BYTES // 2} {PLACE}/something-else")
        output = play.communicate(timeout=600)[0]
        assert "The disk is full" in output, output[-4000:]
        assert shop.published(second)
        shop.fleet.shell(third, f"rm {PLACE}/something-else")
        assert shop.run().rc == 0
        shown = shop.fleet.shell(third, f"cd {PLACE}/model/* && sha256sum model-*").output
        assert shop.manifest.files[3].sha256 in shown
    finally:
        shop.fleet.shell(third, f"umount -l {PLACE}")


def test_two_runs_at_once(shop: Shop) -> None:
    plays = [shop.start(), shop.start()]
    outputs = [play.communicate(timeout=600)[0] for play in plays]
    assert [play.returncode for play in plays] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert shop.all_published()


def test_the_controller_dies(shop: Shop) -> None:
    _, _, third = shop.fleet.nodes
    play = shop.start()
    shop.halfway(third)
    kill_controller(play)
    play.communicate()
    # The agents finish what they know by themselves, and the next run takes it from there.
    shop.wait(third, lambda answer: answer["standing"] == "published")
    assert shop.all_published()
    run = shop.run()
    assert run.rc == 0
    assert run.changed == {}
