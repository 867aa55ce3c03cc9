# SPDX-License-Identifier: Apache-2.0
"""Agents over loopback, with the real engine and real bytes."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import libtorrent
import pytest
from glm_fleet.artifact.manifest import FileEntry, Manifest
from glm_fleet.artifact.merkle import hash_file, merkle_root
from glm_fleet.artifact.store import Store
from glm_fleet.core.errors import FleetError
from glm_fleet.transfer import agent as transfer_agent
from glm_fleet.transfer import session
from glm_fleet.transfer.agent import Agent
from glm_fleet.transfer.control import unit_command
from glm_fleet.transfer.holding import Holding
from glm_fleet.transfer.rendezvous import Meeting, Record
from glm_fleet.transfer.session import Job, session_settings
from glm_fleet.transfer.torrent import (
    Bundle,
    bdecode,
    bundles,
    make_torrent,
    shares,
    torrent_roots,
)

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024


def write(folder: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))


FILES = {"big.bin": 65 * MIB, "deep/a": 3 * MIB + 17, "deep/b": 5, "c.json": 16384, "empty": 0}


@pytest.fixture
def first(tmp_path: Path) -> tuple[Store, Manifest]:
    store = Store(tmp_path / "node0")
    folder = tmp_path / "made"
    write(folder, FILES)
    return store, store.adopt(folder, kind="model", slug="m", provenance={})


class Fleet:
    """Agents of one artifact on 127.0.0.N, ticked in turn."""

    def __init__(self, folder: Path, manifest: Manifest, count: int, **job: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        self.manifest = manifest
        self.addresses = {f"node{number}": f"127.0.0.{number + 1}" for number in range(count)}
        self.settings = {"port": port, "rate_limit": 0, "stall_timeout": 60.0, **job}
        self.agents: dict[str, Agent] = {}
        self.torrents: dict[str, str] = {}
        self.states: dict[str, dict[str, Any]] = {}
        for name in self.addresses:
            self.add(name)

    def add(self, name: str) -> None:
        job = Job(
            root=self.folder / name,
            manifest=self.manifest,
            address=self.addresses[name],
            peers=self.addresses,
            **self.settings,
        )
        run = self.folder / name / "run"
        run.mkdir(parents=True, exist_ok=True)
        self.agents[name] = Agent(job, run, engine=libtorrent)

    def drop(self, name: str) -> None:
        self.agents.pop(name).close()

    def step(self) -> None:
        for name, agent in self.agents.items():
            agent.tick()
            request = {"run": "test", "torrents": self.torrents, "have": list(self.torrents)}
            self.states[name] = agent.answer(request)
            self.torrents.update(self.states[name]["torrents"])
        time.sleep(0.05)

    def until(self, names: Sequence[str], standing: str = "published", seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while any(self.states.get(name, {}).get("standing") != standing for name in names):
            assert time.monotonic() < deadline, self.states
            self.step()

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()


@pytest.fixture
def fleet(
    tmp_path: Path, first: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "module_utils"))
    made = Fleet(tmp_path, first[1], 3)
    yield made
    made.close()


def test_each_file_is_dealt_to_one_fetcher_and_stays_there() -> None:
    big = [FileEntry(f"model-{number:02}", 5_700_000_000, "0" * 64) for number in range(83)]
    small = [FileEntry(f"config-{number}.json", 1000, "0" * 64) for number in range(5)]
    manifest = Manifest("model", "m-1", (*big, *small), {})
    every = [entry.path for entry in manifest.files]
    dealt = shares(manifest, ["a", "b", "c", "d"], every)
    assert sorted(path for paths in dealt.values() for path in paths) == sorted(every)
    assert {len(paths) for paths in dealt.values()} <= {20, 21, 21 + 5, 20 + 5}
    # What is there already changes nothing for the others, and small files travel together.
    assert shares(manifest, ["a", "b", "c", "d"], ["model-07"]) == {
        host: ["model-07"] if "model-07" in paths else [] for host, paths in dealt.items()
    }
    assert len(shares(manifest, ["a"], ["config-3.json"])["a"]) == 5


def test_the_torrent_is_the_one_that_the_engine_makes(tmp_path: Path) -> None:
    sizes = {"a": 3 * MIB, "deep/b": MIB, "deep/c": 1, "d": 2 * MIB + 16384 * 3 + 5}
    write(tmp_path / "art", sizes)
    hashed = {name: hash_file(tmp_path / "art" / name, MIB) for name in sizes}
    entries = [FileEntry(name, size, hashed[name].sha256) for name, size in sizes.items()]
    ours = make_torrent("art", entries, MIB, hashed)
    storage = libtorrent.file_storage()
    for name, size in sorted(sizes.items()):
        storage.add_file(f"art/{name}", size)
    theirs = libtorrent.create_torrent(storage, MIB, libtorrent.create_torrent.v2_only)
    theirs.set_priv(True)
    libtorrent.set_piece_hashes(theirs, str(tmp_path))
    generated = theirs.generate()
    expected = {key: generated[key] for key in (b"info", b"piece layers")}
    assert libtorrent.bdecode(ours) == expected


def test_a_torrent_follows_from_the_manifest_or_is_refused(tmp_path: Path) -> None:
    sizes = {"a": 3 * MIB, "deep/b": MIB, "deep/c": 1}
    write(tmp_path / "art", sizes)
    hashed = {name: hash_file(tmp_path / "art" / name, MIB // 8) for name in sizes}
    files = tuple(FileEntry(name, size, hashed[name].sha256) for name, size in sizes.items())
    (bundle,) = bundles(Manifest("model", "art", files, {}))
    good = make_torrent("art", bundle.entries, bundle.piece_length, hashed)
    roots = {name: each.root.hex() for name, each in hashed.items()}
    assert torrent_roots(good, "art", bundle) == roots
    known = replace(bundle, entries=tuple(replace(e, root=roots[e.path]) for e in bundle.entries))
    assert torrent_roots(good, "art", known) == roots

    def refused(torrent: bytes, part: Bundle = bundle, name: str = "art") -> bool:
        with pytest.raises(FleetError, match="does not follow from the manifest"):
            torrent_roots(torrent, name, part)
        return True

    other = {**hashed, "deep/b": replace(hashed["deep/b"], root=bytes(32), layer=b"")}
    shorter = {**hashed, "a": replace(hashed["a"], layer=hashed["a"].layer[:-32])}
    bigger = {**hashed, "deep/c": replace(hashed["deep/c"], size=2)}
    for files_of in (other, shorter, bigger):
        assert refused(make_torrent("art", bundle.entries, bundle.piece_length, files_of))
    for text in (b"", b"de", b"i1e", good[:-1], good + b"e", good.replace(b"art", b"trb"),
                 b"l" * 100_000, b"99999999999:", good.replace(b"i1e", b"i01e")):  # fmt: skip
        assert refused(text)
    assert refused(good, name="other")
    # More files than the manifest has: the engine would make them.
    extra = (*bundle.entries, FileEntry("evil", 1, "0" * 64))
    more = {**hashed, "evil": hashed["deep/c"]}
    assert refused(make_torrent("art", extra, bundle.piece_length, more))
    assert refused(make_torrent("art", known.entries, bundle.piece_length, other), known)
    assert bdecode(good)[b"info"][b"private"] == 1


def test_a_tree_of_nothing_is_all_padding() -> None:
    assert merkle_root([], 1, b"\1" * 32) == b"\1" * 32
    assert merkle_root([b"\1" * 32], 2, b"\1" * 32) == merkle_root([], 2, b"\1" * 32)


def test_big_files_travel_alone_and_small_ones_together() -> None:
    files = tuple(
        FileEntry(name, size, "0" * 64)
        for name, size in {"a": 10, "b": 5_700_000_000, "c": 20, "d": 0, "e": 70 * MIB}.items()
    )
    made = bundles(Manifest("model", "m", files, {}))
    assert [[each.path for each in bundle.entries] for bundle in made] == [["b"], ["e"], ["a", "c"]]
    assert [bundle.piece_length for bundle in made] == [4 * MIB, MIB // 8, MIB // 8]


def test_every_node_publishes_the_same_bytes(fleet: Fleet, tmp_path: Path) -> None:
    fleet.until(["node0", "node1", "node2"])
    for name in ("node1", "node2"):
        store = Store(tmp_path / name)
        assert store.verify(fleet.manifest, deep=True) == []
        assert fleet.states[name]["received"] >= fleet.manifest.bytes
    assert fleet.states["node0"]["received"] == 0


def test_what_is_there_already_is_not_fetched(
    fleet: Fleet, tmp_path: Path, first: tuple[Store, Manifest]
) -> None:
    fleet.drop("node2")
    fleet.drop("node1")
    source = first[0].published_path("model", fleet.manifest.id)
    staging = Store(tmp_path / "node1").staging_path("model", fleet.manifest.id)
    half = bytearray((source / "big.bin").read_bytes()[: 40 * MIB])
    half[MIB * 10] ^= 1
    (staging / "big.bin").write_bytes(half)
    fleet.add("node1")
    fleet.until(["node1"])
    assert Store(tmp_path / "node1").verify(fleet.manifest, deep=True) == []
    # One of its pieces was wrong.
    assert fleet.manifest.bytes - 40 * MIB < fleet.states["node1"]["received"]
    assert fleet.states["node1"]["received"] < fleet.manifest.bytes - 37 * MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount that is read-only needs root")
def test_a_node_gives_what_it_can_only_read(tmp_path: Path, fleet: Fleet) -> None:
    """As the agent's unit has it where the artifact is published and known to be right."""
    fleet.drop("node0")
    folder = Store(tmp_path / "node0").published_path("model", fleet.manifest.id)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        fleet.torrents.clear()
        fleet.states.clear()
        fleet.add("node0")
        fleet.until(["node0", "node1", "node2"])
        assert [note for state in fleet.states.values() for note in state["notes"]] == []
        fleet.drop("node0")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_damaged_source_says_so_and_takes_the_file_from_another(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.until(["node1"])
    for name in list(fleet.agents):
        fleet.drop(name)
    fleet.torrents.clear()
    fleet.states.clear()
    path = Store(tmp_path / "node0").published_path("model", fleet.manifest.id) / "big.bin"
    with path.open("r+b") as stream:
        stream.seek(30 * MIB)
        stream.write(b"wrong")
    fleet.add("node0")
    deadline = time.monotonic() + 60
    while not fleet.states.get("node0", {}).get("notes"):
        assert time.monotonic() < deadline
        fleet.step()
    assert "big.bin was damaged on this node" in fleet.states["node0"]["notes"][0]
    assert not Store(tmp_path / "node0").is_published(fleet.manifest)
    fleet.add("node1")
    fleet.until(["node0", "node1"])
    assert Store(tmp_path / "node0").verify(fleet.manifest, deep=True) == []


def test_a_standstill_is_explained(tmp_path: Path, fleet: Fleet) -> None:
    while len(fleet.torrents) < len(bundles(fleet.manifest)):
        fleet.step()
    fleet.close()
    fleet.agents.clear()
    # Long enough for two busy agents to find each other before they stand still.
    alone = Fleet(tmp_path / "alone", fleet.manifest, 2, stall_timeout=5.0)
    alone.torrents = fleet.torrents
    alone.until(["node1"], "failed")
    text = alone.states["node1"]["failure"]["msg"]
    alone.close()
    assert "stands still" in text
    assert "big.bin: 520 of 520 pieces are missing; no node holds them any more" in text


def test_a_torrent_of_other_bytes_publishes_nothing(tmp_path: Path, fleet: Fleet) -> None:
    fleet.close()
    fleet.agents.clear()
    write(tmp_path / "bad", FILES)
    (bundle,) = (each for each in bundles(fleet.manifest) if each.entries[0].path == "big.bin")
    hashed = {"big.bin": hash_file(tmp_path / "bad" / "big.bin", bundle.piece_length)}
    torrent = make_torrent(fleet.manifest.id, bundle.entries, bundle.piece_length, hashed)
    # One of the version before, which does not say which torrents are its own.
    plain = tuple(replace(entry, root="") for entry in fleet.manifest.files)
    wrong = Fleet(tmp_path / "wrong", replace(fleet.manifest, files=plain), 1)
    staging = Store(tmp_path / "wrong/node0").staging_path("model", fleet.manifest.id)
    wrong.torrents = {bundle.name: base64.b64encode(torrent).decode()}
    (tmp_path / "bad" / "big.bin").replace(staging / "big.bin")
    wrong.until(["node0"], "failed")
    wrong.close()
    assert "leads to other bytes" in wrong.states["node0"]["failure"]["msg"]
    assert not (staging / "big.bin").exists()


def stage_by_hand(fleet: Fleet, source: Store, name: str) -> Store:
    """Stop all agents, and give a node the files, whole and not published."""
    for each in list(fleet.agents):
        fleet.drop(each)
    store = Store(fleet.folder / name)
    staging = store.staging_path("model", fleet.manifest.id)
    published = source.published_path("model", fleet.manifest.id)
    for each in FILES:
        (staging / each).parent.mkdir(parents=True, exist_ok=True)
        (staging / each).write_bytes((published / each).read_bytes())
    return store


def test_nothing_is_moved_while_a_torrent_is_made_of_it(
    fleet: Fleet, first: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stage_by_hand(fleet, first[0], "node1")
    made: list[tuple[bool, bool]] = []
    make = Holding.make_torrent

    def slowly(self: Holding, bundle: Any) -> list[str]:
        before = store.is_published(fleet.manifest)
        time.sleep(0.5)
        made.append((before, store.is_published(fleet.manifest)))
        return make(self, bundle)

    monkeypatch.setattr(Holding, "make_torrent", slowly)
    fleet.add("node1")
    fleet.until(["node1"])
    assert made
    assert not any(each for pair in made for each in pair)


def test_a_torrent_that_begins_while_its_files_are_moved_is_given_on(
    fleet: Fleet, first: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_by_hand(fleet, first[0], "node1")
    rename = Path.rename

    def slowly(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if Path(target).name == fleet.manifest.id:
            # The files have their new place; the engine's way there follows, a second later.
            time.sleep(1)
        return moved

    monkeypatch.setattr(Path, "rename", slowly)
    fleet.add("node1")
    fleet.add("node2")
    fleet.until(["node1", "node2"], seconds=30)


def test_a_pushed_file_is_taken_if_it_is_right(
    fleet: Fleet, tmp_path: Path, first: tuple[Store, Manifest]
) -> None:
    fleet.drop("node0")
    source = first[0].published_path("model", fleet.manifest.id)
    staging = Store(tmp_path / "node1").staging_path("model", fleet.manifest.id)
    incoming = staging.with_name(f"{staging.name}.incoming")
    incoming.mkdir()
    for number, name in enumerate(FILES):
        (incoming / str(number)).write_bytes((source / name).read_bytes())
    request = {"run": "test", "arrived": {str(n): name for n, name in enumerate(FILES)}}
    fleet.agents["node1"].answer(request)
    fleet.until(["node1", "node2"])
    (incoming / "9").write_bytes(b"wrong")
    late = Fleet(tmp_path / "late", fleet.manifest, 1)
    place = Store(tmp_path / "late/node0").staging_path("model", fleet.manifest.id)
    place.with_name(f"{place.name}.incoming").mkdir()
    (place.with_name(f"{place.name}.incoming") / "0").write_bytes(b"wrong")
    answer = late.agents["node0"].answer({"run": "test", "arrived": {"0": "big.bin"}})
    late.close()
    assert "pushed other bytes for big.bin" in answer["failure"]["msg"]


def test_too_little_room_is_refused_before_a_byte_moves(
    tmp_path: Path, first: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("glm_fleet.transfer.holding.shutil.disk_usage", lambda _: Full)
    with pytest.raises(FleetError, match="The disk cannot take"):
        Fleet(tmp_path / "small", first[1], 1)


def test_the_agent_ends_with_its_last_controller_or_when_nothing_moves(
    tmp_path: Path, first: tuple[Store, Manifest]
) -> None:
    now = [1000.0]
    job = Job(tmp_path / "node9", first[1], "127.0.0.9", 1, {"node9": "127.0.0.9"}, 0, 60)
    (tmp_path / "node9/run").mkdir(parents=True)
    agent = Agent(job, tmp_path / "node9/run", engine=libtorrent, clock=lambda: now[0])
    agent.answer({"run": "one"})
    agent.answer({"run": "two"})
    agent.answer({"run": "one", "leave": True})
    assert not agent.ended()
    now[0] += transfer_agent.LEASE_S + transfer_agent.IDLE_S + 1
    assert agent.ended()
    agent.answer({"run": "two"})
    assert not agent.ended()
    agent.answer({"run": "two", "leave": True})
    assert agent.ended()
    agent.close()


def test_each_node_begins_with_other_pieces() -> None:
    nodes = {"10.0.0.1", "10.0.0.2", "10.0.0.10"}
    wanted = [session.priorities(8, nodes, node) for node in nodes]
    assert [sorted(each) for each in zip(*wanted)] == [[1, 1, 7]] * 8
    assert session.priorities(3, {"10.0.0.1"}, "10.0.0.1") == [7, 7, 7]


def test_the_session_finds_nobody_by_itself() -> None:
    settings = session_settings("192.0.2.1", 8009, 5, 7)
    assert settings["listen_interfaces"] == "192.0.2.1:8009"
    assert session_settings("2001:db8::1", 8009, 0, 7)["listen_interfaces"] == "[2001:db8::1]:8009"
    for name in ("dht", "lsd", "upnp", "natpmp", "incoming_utp", "outgoing_utp"):
        assert settings[f"enable_{name}"] is False
    known = libtorrent.default_settings()
    assert set(settings) - {"outgoing_interfaces"} <= set(known)


def test_the_unit_is_fenced_in_and_holds_no_secret() -> None:
    command = unit_command(
        Path("/run/x/job.json"),
        Path("/srv/a"),
        "/usr/bin/python3",
        "/lib:/e",
        ["192.0.2.12", "192.0.2.11", "192.0.2.11"],
    )
    assert "--property=IPAddressDeny=any" in command
    assert "--property=IPAddressAllow=192.0.2.11 192.0.2.12" in command
    assert "--property=ProtectSystem=strict" in command
    assert "--property=ReadWritePaths=/srv/a /run/x" in command
    assert command[-6:] == ["/usr/bin/python3", "-B", "-m", "glm_fleet.swarm", "agent", "/run/x"]


def follows(name: str, torrent: bytes) -> None:
    if torrent != b"good":
        raise FleetError(f"{name} does not follow")


def meetings(folder: Path, clock: list[float]) -> dict[str, Meeting]:
    hosts = ["a", "b"]
    return {
        host: Meeting(folder, host, hosts, stall_timeout=100, check=follows, clock=lambda: clock[0])
        for host in hosts
    }


def test_workers_hand_torrents_on_once(tmp_path: Path) -> None:
    met = meetings(tmp_path, [0.0])
    good, bad = (base64.b64encode(each).decode() for each in (b"good", b"bad"))
    assert met["a"].keep({"0002": bad, "0003": "="}) != []
    assert met["b"].fresh() == {}
    assert met["a"].keep({"0001": good, "../x": good}) == []
    assert met["b"].fresh() == {"0001": good}
    assert met["b"].fresh() == met["a"].fresh() == {}
    assert met["b"].known() == ["0001"]
    assert [path.name for path in tmp_path.parent.glob("*.torrent")] == []


def test_what_nobody_offers_is_given_up(tmp_path: Path) -> None:
    clock = [0.0]
    met = meetings(tmp_path, clock)
    lacking = Record(unknown=["0000"])

    def hopeless(**own: Any) -> bool:
        return bool(met["a"].hopeless(replace(lacking, **own), met["a"].others()))

    assert not hopeless()
    met["b"].say(Record(standing="published", busy=True))
    clock[0] += 99
    assert not hopeless()
    met["b"].say(Record(standing="published"))
    assert not hopeless()
    clock[0] += 11
    assert hopeless()
    for brings in (Record(pushing=True), Record(fetching={"what": "fetching from the hub"})):
        met["b"].say(brings)
        clock[0] += 1000
        assert not hopeless()
    met["b"].say(Record(standing="failed", fetching={"what": "fetching from the hub"}))
    assert not hopeless()
    clock[0] += 11
    assert not hopeless(fetching={"what": "fetching from the hub"})
    clock[0] += 11
    error = met["a"].hopeless(lacking, met["a"].others())
    assert error is not None
    assert "b failed, see there" in str(error)
    met["b"].keep({"0000": base64.b64encode(b"good").decode()})
    clock[0] += 1000
    assert not hopeless()


def test_a_host_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    met = meetings(tmp_path, [0.0])
    assert not met["a"].others()["b"].has_ended
    met["b"].say(Record().ended())
    assert met["a"].others()["b"].standing == "gone"
    assert Record(standing="published").ended().standing == "published"
