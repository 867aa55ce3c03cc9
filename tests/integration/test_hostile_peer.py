# SPDX-License-Identifier: Apache-2.0
"""A node that somebody took over cannot change a byte of what the others have published.

The agents and the hostile node's engine are real, and so are the bytes: over loopback.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import libtorrent
import pytest
from glm_fleet.artifact.manifest import FileEntry, Manifest
from glm_fleet.artifact.merkle import hash_file
from glm_fleet.artifact.store import Store
from glm_fleet.transfer.agent import Agent
from glm_fleet.transfer.control import untouchable
from glm_fleet.transfer.session import Job, session_settings
from glm_fleet.transfer.torrent import Bundle, bundles, make_torrent

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
FILES = {"big.bin": 96 * MIB, "deep/a": MIB + 17, "c.json": 16384}
VICTIM, HOSTILE = "127.0.0.2", "127.0.0.3"
PORT = 18_309


def write(folder: Path) -> Path:
    for name, size in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


class Hostile:
    """A node's own engine: offers other bytes of the same names, and lacks one piece of each file.

    It asks for that piece. What it is given does not have the hash that its torrent says: an engine
    that believes the torrent takes its own bytes for damaged, and fetches all the others.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.home = write(folder / manifest.id)
        self.manifest = manifest
        self.session = libtorrent.session(session_settings(HOSTILE, PORT, 0, 2))
        self.torrents: dict[str, str] = {}
        self.handles = [self._offer(bundle) for bundle in bundles(manifest)]

    def _offer(self, bundle: Bundle) -> Any:
        hashed = {
            each.path: hash_file(self.home / each.path, bundle.piece_length)
            for each in bundle.entries
        }
        torrent = make_torrent(self.manifest.id, bundle.entries, bundle.piece_length, hashed)
        self.torrents[bundle.name] = base64.b64encode(torrent).decode()
        for entry in bundle.entries:
            with (self.home / entry.path).open("r+b") as stream:
                stream.write(bytes(16))
        parameters = libtorrent.add_torrent_params()
        parameters.ti = libtorrent.torrent_info(libtorrent.bdecode(torrent))
        alone = len(bundle.entries) == 1 and "/" not in bundle.entries[0].path
        parameters.save_path = str(self.home if alone else self.home.parent)
        off = libtorrent.torrent_flags.auto_managed | libtorrent.torrent_flags.paused
        parameters.flags &= ~off
        return self.session.add_torrent(parameters)

    def attack(self) -> None:
        for handle in self.handles:
            handle.connect_peer((VICTIM, PORT))


@pytest.fixture
def published(tmp_path: Path) -> tuple[Store, Manifest]:
    store = Store(tmp_path / "victim")
    return store, store.adopt(write(tmp_path / "made"), kind="model", slug="m", provenance={})


@pytest.fixture
def hostile(tmp_path: Path, published: tuple[Store, Manifest]) -> Iterator[Hostile]:
    made = Hostile(tmp_path / "hostile", published[1])
    yield made
    made.session.pause()


def as_before(manifest: Manifest) -> Manifest:
    """The manifest as the version before wrote it: it does not say which torrents are its own."""
    return replace(manifest, files=tuple(replace(each, root="") for each in manifest.files))


@pytest.mark.parametrize("version", ["today", "before"])
@pytest.mark.parametrize("proven", [True, False])
def test_no_published_byte_changes(
    version: str,
    proven: bool,
    published: tuple[Store, Manifest],
    hostile: Hostile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "module_utils"))
    store, manifest = published
    if version == "before":
        manifest = as_before(manifest)
    if not proven and hasattr(store, "prove"):
        store.proven("model", manifest.id).drop()
    folder = store.published_path("model", manifest.id)
    right = digests(folder)
    peers = {"victim": VICTIM, "hostile": HOSTILE}
    job = Job(store.root, manifest, VICTIM, PORT, peers, 0, 60.0)
    (store.root / "run").mkdir()
    agent = Agent(job, store.root / "run", engine=libtorrent)
    try:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            agent.tick()
            hostile.attack()
            agent.answer({"run": "test", "torrents": hostile.torrents})
            if writable(folder):
                break
            time.sleep(0.1)
        assert writable(folder) == [], "what is published is open for writing"
        state = agent.answer({"run": "test"})
    finally:
        agent.close()
    assert digests(folder) == right
    assert store.verify(manifest, deep=True) == []
    # It gives what is right, and says what it was brought.
    notes = " ".join(state["notes"])
    own = {name: base64.b64decode(text) for name, text in state["torrents"].items()}
    for bundle in bundles(manifest):
        hashed = {
            each.path: hash_file(folder / each.path, bundle.piece_length) for each in bundle.entries
        }
        right_one = make_torrent(manifest.id, bundle.entries, bundle.piece_length, hashed)
        assert own[bundle.name] == right_one
    assert ("does not follow" in notes) == (version == "today")
    assert ("leads to other bytes" in notes) == (version == "before")


def writable(folder: Path) -> list[str]:
    """Name the files of a folder that this process has open, or mapped, for writing."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
            flags = Path(f"/proc/self/fdinfo/{fd.name}").read_text().split("flags:")[1].split()[0]
        except OSError:
            continue
        if target.startswith(str(folder)) and int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
            found.append(target)
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        if "w" in words[1] and "s" in words[1] and words[-1].startswith(str(folder)):
            found.append(words[-1])
    return found


def test_a_node_that_takes_publishes_no_hostile_byte(
    published: tuple[Store, Manifest], hostile: Hostile, tmp_path: Path
) -> None:
    """It has nothing yet, and the one torrent that it is brought is the hostile one."""
    manifest = as_before(published[1])
    store = Store(tmp_path / "taker")
    job = Job(store.root, manifest, VICTIM, PORT, {"t": VICTIM, "h": HOSTILE}, 0, 3.0)
    (store.root / "run").mkdir(parents=True)
    agent = Agent(job, store.root / "run", engine=libtorrent)
    state: dict[str, Any] = {}
    try:
        end = time.monotonic() + 60
        while state.get("standing") != "failed":
            assert time.monotonic() < end, state
            agent.tick()
            hostile.attack()
            state = agent.answer({"run": "test", "torrents": hostile.torrents})
            time.sleep(0.05)
    finally:
        agent.close()
    assert "stands still" in json.dumps(state["failure"])
    assert not store.is_published(manifest)
    assert not store.published("model")


def test_a_hostile_torrent_does_not_follow_from_a_manifest_of_today(
    published: tuple[Store, Manifest], hostile: Hostile, tmp_path: Path
) -> None:
    manifest = published[1]
    store = Store(tmp_path / "taker")
    job = Job(store.root, manifest, VICTIM, PORT, {"t": VICTIM, "h": HOSTILE}, 0, 60.0)
    (store.root / "run").mkdir(parents=True)
    agent = Agent(job, store.root / "run", engine=libtorrent)
    state = agent.answer({"run": "test", "torrents": hostile.torrents})
    agent.close()
    assert len(state["unknown"]) == len(bundles(manifest))
    assert "does not follow from the manifest" in " ".join(state["notes"])


def test_entries_may_say_nothing_of_their_torrent() -> None:
    assert FileEntry("a", 1, "0" * 64) == FileEntry("a", 1, "0" * 64, "1" * 64)


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount that is read-only needs root")
def test_an_agent_that_only_reads_says_what_is_damaged(
    published: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its unit has it: what was right when it began cannot be changed, nor removed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "module_utils"))
    store, manifest = published
    folder = store.published_path("model", manifest.id)
    assert untouchable(store, manifest) == [folder]
    stamp = (folder / "big.bin").stat()
    with (folder / "big.bin").open("r+b") as stream:
        stream.write(b"wrong")
    os.utime(folder / "big.bin", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        job = Job(store.root, manifest, VICTIM, PORT, {"victim": VICTIM}, 0, 60.0)
        (store.root / "run").mkdir()
        agent = Agent(job, store.root / "run", engine=libtorrent)
        try:
            end = time.monotonic() + 60
            while agent.answer({"run": "test"})["standing"] != "failed":
                assert time.monotonic() < end
                agent.tick()
                time.sleep(0.05)
            said = json.dumps(agent.answer({"run": "test"})["failure"])
        finally:
            agent.close()
    finally:
        subprocess.run(["umount", folder], check=True)
    assert "big.bin was damaged on this node" in said
    assert "run again" in said
    assert (folder / "big.bin").is_file()
    # The next agent may write there, and heals it.
    assert untouchable(store, manifest) == []
