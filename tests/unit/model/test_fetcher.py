# SPDX-License-Identifier: Apache-2.0
"""What belongs to a model, how it is fetched or adopted, and what happens when it is not."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from glm_fleet.artifact.hashes import find_damage
from glm_fleet.artifact.manifest import load_manifest
from glm_fleet.artifact.store import Store
from glm_fleet.core.errors import FleetError
from glm_fleet.core.progress import Meter
from glm_fleet.model.adopt import adopt, folder_manifest
from glm_fleet.model.client import HubClient, Patience, UnreachableError
from glm_fleet.model.fetcher import Fetcher, missing_space, published_model
from glm_fleet.model.partfile import Span
from glm_fleet.model.pins import pin, pinned
from glm_fleet.model.refusal import UnavailableError, clock_remark
from glm_fleet.model.source import (
    HubFile,
    Source,
    check_endpoint,
    git_blob_id,
    is_commit,
    model_slug,
    select_files,
)
from huggingface_hub import close_session

from lab import hub

OLD, NEW = "a" * 40, "b" * 40
# A piece in the wrong place makes other bytes.
SHARDS = {
    f"model-{number}.safetensors": hashlib.shake_128(bytes([number])).digest(5000)
    for number in range(1, 5)
}
CONTENT = {
    **SHARDS,
    "config.json": b"{}\n",
    "extra/merges.txt": b"a b\n",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {name: name for name in SHARDS}}
    ).encode(),
}
SOURCE = Source("lab/tiny", "main", ("http://hub",))


def blob(content: bytes) -> str:
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def listing(content: dict[str, bytes]) -> list[HubFile]:
    return [
        HubFile(name, len(data), hashlib.sha256(data).hexdigest(), "")
        if name.endswith(".safetensors")
        else HubFile(name, len(data), "", blob(data))
        for name, data in content.items()
    ]


@dataclass
class FakeHub:
    """A client whose answers are decided by the test; it counts what it sends."""

    main: str = OLD
    content: dict[str, bytes] = field(default_factory=lambda: dict(CONTENT))
    trouble: Callable[[str, str], None] = lambda endpoint, what: None
    sent: dict[str, int] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut_at: int = 0

    def describe(self, endpoint: str, repository: str, revision: str) -> tuple[str, list[HubFile]]:
        self.asked.append(f"{endpoint} {revision}")
        self.trouble(endpoint, revision)
        return (revision if is_commit(revision) else self.main), listing(CONTENT)

    def download(
        self,
        endpoint: str,
        repository: str,
        commit: str,
        name: str,
        span: Span,
        sink: Callable[[bytes], None],
    ) -> None:
        self.trouble(endpoint, name)
        data = self.content[name][slice(*span)][: self.cut_at or None]
        self.spans.setdefault(name, []).append(span)
        self.sent[name] = self.sent.get(name, 0) + len(data)
        sink(data)


class Clock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def fetcher(store: Store, client: Any, source: Source = SOURCE, **options: Any) -> Fetcher:
    clock = Clock()
    patience = Patience(options.pop("seconds", 20), clock.sleep, lambda: clock.now)
    made = Fetcher(store, source, client, patience, Meter("test"), **{"workers": 1, **options})
    made.clock = clock  # type: ignore[attr-defined]
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def fail(
    *names: str, times: int = 99, error: Exception | None = None
) -> Callable[[str, str], None]:
    left = [times]

    def trouble(endpoint: str, what: str) -> None:
        if (endpoint in names or what in names) and left[0]:
            left[0] -= 1
            raise error or UnavailableError("ConnectError: refused")

    return trouble


def test_the_manifest_is_known_before_the_large_files_are_there(store: Store) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    assert set(client.sent) == set(CONTENT) - set(SHARDS)
    assert [entry.path for entry in store.missing(plan)] == sorted(SHARDS)
    fetcher(store, client).fetch(plan)
    folder = store.publish(plan)
    assert find_damage(folder, load_manifest(folder), deep=True) == []
    assert folder.name == plan.id
    assert client.sent == {name: len(data) for name, data in CONTENT.items()}
    assert plan.provenance["revision"] == OLD
    assert published_model(store, SOURCE) == plan


def test_a_plan_is_made_once(store: Store) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    assert fetcher(store, FakeHub(trouble=fail("http://hub"))).plan() == plan
    assert client.asked == ["http://hub main"]


def test_a_branch_stays_the_commit_that_it_was(store: Store) -> None:
    first = fetcher(store, FakeHub()).plan()
    assert pinned(store, SOURCE) == OLD
    # Another selection of the same branch: the hub is asked again, for the recorded commit.
    moved = FakeHub(main=NEW)
    second = fetcher(store, moved, replace(SOURCE, exclude=("*.txt",))).plan()
    assert moved.asked == [f"http://hub {OLD}"]
    assert second.provenance["revision"] == first.provenance["revision"] == OLD
    named = fetcher(store, moved, replace(SOURCE, revision=NEW)).plan()
    assert named.provenance["revision"] == NEW
    assert pinned(store, SOURCE) == OLD


def test_pins_that_cannot_be_read_move_nothing(store: Store) -> None:
    pin(store, SOURCE, OLD)
    (store.root / ".pins.json").write_text("{")
    with pytest.raises(FleetError, match="which commits"):
        fetcher(store, FakeHub(main=NEW)).plan()


def test_a_part_of_the_files_is_fetched_and_proven_but_not_published(store: Store) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    mine = sorted(SHARDS)[:2]
    fetcher(store, client).fetch(plan, mine)
    staging = store.staging_path("model", plan.id)
    proven = store.proven("model", plan.id)
    for entry in plan.files:
        known = proven.known(staging, entry.path)
        assert known == (entry.sha256 if entry.path not in sorted(SHARDS)[2:] else None)
    assert not store.is_published(plan)


def test_a_broken_transfer_is_continued_where_it_stopped(store: Store) -> None:
    client = FakeHub(cut_at=2000)
    plan = fetcher(store, client).plan()
    run = fetcher(store, client)
    run.fetch(plan)
    assert store.missing(plan) == []
    assert all(client.sent[name] == 5000 for name in SHARDS)
    assert run.clock.pauses, "it waits before it asks again"  # type: ignore[attr-defined]


def test_the_next_run_fetches_only_what_is_missing_also_of_a_file(store: Store) -> None:
    client = FakeHub(cut_at=3000)
    plan = fetcher(store, client).plan()
    client.trouble = fail("model-3.safetensors")
    with pytest.raises(UnreachableError, match=r"model-3|No hub delivers"):
        fetcher(store, client).fetch(plan, ["model-1.safetensors", "model-3.safetensors"])
    client.trouble = fail("model-2.safetensors")
    with pytest.raises(UnreachableError):
        fetcher(store, client, seconds=0).fetch(plan)
    client.trouble = lambda endpoint, what: None
    fetcher(store, client).fetch(plan)
    store.publish(plan)
    assert client.sent == {name: len(data) for name, data in CONTENT.items()}


def test_all_connections_bring_one_file_after_the_other(store: Store) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    fetcher(store, client, workers=4, segment=1000).fetch(plan)
    assert store.missing(plan) == []
    assert [name for name in client.spans if name in SHARDS] == sorted(SHARDS)
    for name in SHARDS:
        begins = sorted(client.spans[name])
        assert begins == [(0, 1250), (1250, 2500), (2500, 3750), (3750, None)]
    assert list(store.work_path("model", plan.id).iterdir()) == [], "no record is left"


@pytest.mark.parametrize("segment", [1000, 2000, 10_000])
def test_what_a_killed_run_has_of_each_segment_is_not_fetched_again(
    store: Store, segment: int
) -> None:
    client = FakeHub(cut_at=700)
    plan = fetcher(store, client).plan()
    name = "model-1.safetensors"
    with pytest.raises(UnreachableError):
        # No patience: each connection that is cut off ends the run.
        fetcher(store, client, workers=4, segment=1000, seconds=0).fetch(plan, [name])
    assert 0 < client.sent[name] < 5000
    client.cut_at = 0
    # With other settings too: the segments are those of the run before.
    fetcher(store, client, workers=2, segment=segment).fetch(plan, [name])
    assert name not in [entry.path for entry in store.missing(plan)]
    assert client.sent[name] == 5000


@pytest.mark.parametrize(
    ("record", "spans"),
    [
        # Behind, as after a kill: what it does not know is fetched again.
        ("[1000, 400]", [(1000, 2500), (2900, None)]),
        # None, as of a run with one connection: what is there is a beginning.
        ("", [(3000, 3750), (3750, None)]),
    ],
)
def test_a_part_is_continued_where_its_record_says(
    store: Store, record: str, spans: list[Span]
) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    work = store.work_path("model", plan.id)
    work.mkdir(parents=True)
    name = "model-1.safetensors"
    (work / name).write_bytes(SHARDS[name][:3000])
    if record:
        (work / f"{name}%segments").write_text(record)
    fetcher(store, client, workers=4, segment=1000).fetch(plan, [name])
    assert sorted(client.spans[name]) == spans
    assert name not in [entry.path for entry in store.missing(plan)]


def test_the_record_of_a_file_that_is_gone_is_forgotten(store: Store) -> None:
    client = FakeHub(cut_at=700)
    plan = fetcher(store, client).plan()
    work = store.work_path("model", plan.id)
    work.mkdir(parents=True)
    name = "model-1.safetensors"
    (work / f"{name}%segments").write_text("[1250, 1250, 1250, 1250]")
    with pytest.raises(UnreachableError):
        fetcher(store, client, seconds=0).fetch(plan, [name])
    client.cut_at = 0
    fetcher(store, client).fetch(plan, [name])
    assert client.spans[name] == [(0, None), (700, None)]
    assert name not in [entry.path for entry in store.missing(plan)]


def test_a_corrupt_file_in_segments_is_fetched_once_more_then_named(store: Store) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    client.content["model-2.safetensors"] = b"x" * 5000
    with pytest.raises(FleetError, match=r"model-2\.safetensors: SHA-256"):
        fetcher(store, client, workers=4, segment=1000).fetch(plan)
    assert client.sent["model-2.safetensors"] == 10000
    client.content = dict(CONTENT)
    fetcher(store, client).fetch(plan)
    assert store.missing(plan) == []


def test_a_corrupt_file_is_fetched_once_more_then_named(store: Store) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    client.content["model-2.safetensors"] = b"x" * 5000
    with pytest.raises(FleetError, match=r"model-2\.safetensors: SHA-256") as caught:
        fetcher(store, client).fetch(plan)
    assert "metadata" in str(caught.value)
    assert client.sent["model-2.safetensors"] == 10000
    assert [entry.path for entry in store.missing(plan)] == ["model-2.safetensors"]
    client.content = dict(CONTENT)
    fetcher(store, client).fetch(plan)
    assert client.sent["model-1.safetensors"] == 5000


def test_a_damaged_model_gets_only_the_damage_again(store: Store) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    fetcher(store, client).fetch(plan)
    folder = store.publish(plan)
    (folder / "model-4.safetensors").write_bytes(b"short")
    client.sent.clear()
    client.asked.clear()
    assert published_model(store, SOURCE) is None
    assert fetcher(store, client).plan() == plan
    fetcher(store, client).fetch(plan)
    store.publish(plan)
    assert client.sent == {"model-4.safetensors": 5000}
    assert client.asked == [], "the manifest is here"


def test_mirrors_are_asked_in_order_while_the_hub_is_away(store: Store) -> None:
    source = replace(SOURCE, endpoints=("http://hub", "http://one", "http://two"))
    client = FakeHub(trouble=fail("http://hub", "http://one"))
    plan = fetcher(store, client, source).plan()
    run = fetcher(store, client, source)
    run.fetch(plan)
    assert client.asked == ["http://hub main", "http://one main", "http://two main"]
    assert run.clock.pauses == []  # type: ignore[attr-defined]
    client.trouble = fail("http://hub", "http://one", "http://two")
    with pytest.raises(UnreachableError, match="http://hub or http://one or http://two"):
        fetcher(Store(store.root / "other"), client, source).plan()


def test_a_hub_that_does_not_answer_is_asked_again_for_a_bounded_time(store: Store) -> None:
    run = fetcher(store, FakeHub(trouble=fail("main", times=3)))
    run.plan()
    assert run.clock.pauses == [1, 2, 4]  # type: ignore[attr-defined]
    with pytest.raises(UnreachableError, match=r"within 20 s.*refused.*model_proxy"):
        fetcher(Store(store.root / "other"), FakeHub(trouble=fail("main"))).plan()


def test_a_hub_that_asks_to_wait_is_given_the_time(store: Store) -> None:
    busy = UnavailableError("HTTP 429: quota used up", quota=True, pause=7)
    run = fetcher(store, FakeHub(trouble=fail("main", times=1, error=busy)))
    run.plan()
    assert run.clock.pauses == [7]  # type: ignore[attr-defined]
    long = UnavailableError("HTTP 429: quota used up", quota=True, pause=3600)
    other = fetcher(Store(store.root / "o"), FakeHub(trouble=fail("main", error=long)))
    with pytest.raises(FleetError, match=r"refuses more requests.*asks to wait 3600 s"):
        other.plan()
    assert other.clock.pauses == []  # type: ignore[attr-defined]


def test_progress_gives_new_patience(store: Store) -> None:
    # 50 pieces with a pause after each: longer in all than the patience.
    client = FakeHub(cut_at=100)
    plan = fetcher(store, FakeHub()).plan()
    run = fetcher(store, client)
    run.fetch(plan, ["model-1.safetensors"])
    assert sum(run.clock.pauses) > 20  # type: ignore[attr-defined]


def test_a_full_disk_is_said_before_and_while_fetching(store: Store) -> None:
    plan = fetcher(store, FakeHub()).plan()
    small = fetcher(store, FakeHub(), free=lambda path: 15_000, reserve=1000)
    with pytest.raises(FleetError, match="cannot take the model"):
        small.fetch(plan)
    # Only what is missing has to fit.
    fetcher(store, FakeHub()).fetch(plan, sorted(SHARDS)[:2])
    small.fetch(plan)
    other = Store(store.root / "other")
    full = FakeHub(trouble=fail("model-1.safetensors", error=OSError(errno.ENOSPC, "No space")))
    plan = fetcher(other, full).plan()
    with pytest.raises(FleetError, match="disk is full"):
        fetcher(other, full).fetch(plan)


def test_patterns_decide_what_belongs_to_the_model() -> None:
    def names(**patterns: tuple[str, ...]) -> list[str]:
        return [each.path for each in select_files(listing(CONTENT), replace(SOURCE, **patterns))]

    assert names() == sorted(CONTENT)
    assert names(include=("*.safetensors",), exclude=("*-1.*",)) == sorted(SHARDS)[1:]
    with pytest.raises(FleetError, match="No file"):
        names(include=("*.gguf",))


@pytest.mark.parametrize("url", ["hub.example", "ftp://hub", "https://me:secret@hub.example"])
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(FleetError, match="URL of the hub") as caught:
        check_endpoint(url)
    assert "secret" not in str(caught.value)
    assert check_endpoint("https://hub.example/") == "https://hub.example"


# -- A folder that was brought on a disk --------------------------------------------------


def fill(folder: Path, content: dict[str, bytes] = CONTENT, *, records: str = OLD) -> Path:
    """Write a folder as the hub's client leaves it."""
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if records:
            digest = hashlib.sha256(data).hexdigest() if name in SHARDS else blob(data)
            record = folder / ".cache/huggingface/download" / f"{name}.metadata"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(f"{records}\n{digest}\n1.0\n")
    return folder


def test_the_records_of_the_client_tell_the_same_artifact_as_the_hub(
    store: Store, tmp_path: Path
) -> None:
    told = folder_manifest(fill(tmp_path / "disk"), SOURCE, None, Meter("test"))
    assert told.id == fetcher(store, FakeHub()).plan().id
    assert told.provenance["revision"] == OLD


def test_a_folder_is_adopted_without_copying(store: Store, tmp_path: Path) -> None:
    folder = fill(tmp_path / "disk")
    plan = folder_manifest(folder, SOURCE, None, Meter("test"))
    assert adopt(store, plan, folder, Meter("test")) == []
    final = store.publish(plan)
    name = sorted(SHARDS)[0]
    assert (final / name).stat().st_ino == (folder / name).stat().st_ino
    assert sorted(path.name for path in final.iterdir()) == sorted(
        {*SHARDS, "config.json", "extra", "model.safetensors.index.json", "manifest.json"}
    )


def test_a_folder_of_symbolic_links_is_adopted_by_its_files(store: Store, tmp_path: Path) -> None:
    blobs = fill(tmp_path / "blobs")
    plan = folder_manifest(blobs, SOURCE, None, Meter("test"))
    snapshot = tmp_path / "snapshot"
    for name in CONTENT:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    assert adopt(store, plan, snapshot, Meter("test")) == []
    assert not any(path.is_symlink() for path in store.publish(plan).rglob("*"))


def test_only_what_is_wrong_in_a_folder_is_named_and_fetched(store: Store, tmp_path: Path) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    folder = fill(tmp_path / "disk", records="")
    (folder / "model-1.safetensors").write_bytes(b"x" * 5000)
    (folder / "model-2.safetensors").write_bytes(b"x")
    (folder / "model-3.safetensors").unlink()
    damage = {each.path: each.reason for each in adopt(store, plan, folder, Meter("test"))}
    assert damage == {
        "model-1.safetensors": "changed",
        "model-2.safetensors": "truncated",
        "model-3.safetensors": "missing",
    }
    fetcher(store, client).fetch(plan)
    store.publish(plan)
    assert set(client.sent) & set(SHARDS) == set(damage)


def test_a_manifest_of_another_fleet_tells_what_a_folder_holds(
    store: Store, tmp_path: Path
) -> None:
    client = FakeHub()
    plan = fetcher(store, client).plan()
    fetcher(store, client).fetch(plan)
    published = store.publish(plan)
    told = folder_manifest(published, SOURCE, None, Meter("test"))
    assert told.id == plan.id
    beside = tmp_path / "weights.json"
    beside.write_text((published / "manifest.json").read_text())
    assert folder_manifest(tmp_path, SOURCE, beside, Meter("test")).id == plan.id
    with pytest.raises(FleetError, match="another model"):
        folder_manifest(published, replace(SOURCE, repository="a/b"), None, Meter("test"))
    with pytest.raises(FleetError, match="another model"):
        folder_manifest(published, replace(SOURCE, revision=NEW), None, Meter("test"))
    with pytest.raises(FleetError, match="another model"):
        folder_manifest(published, replace(SOURCE, exclude=("*.txt",)), None, Meter("test"))
    beside.write_text("{}")
    with pytest.raises(FleetError, match="came with the model cannot be used"):
        folder_manifest(tmp_path, SOURCE, beside, Meter("test"))


def test_a_folder_that_proves_nothing_is_refused(tmp_path: Path) -> None:
    bare = fill(tmp_path / "bare", records="")
    with pytest.raises(FleetError, match=r"Nothing tells.*\.cache"):
        folder_manifest(bare, SOURCE, None, Meter("test"))
    short = fill(tmp_path / "short", {name: CONTENT[name] for name in CONTENT if "4" not in name})
    with pytest.raises(FleetError, match=r"model-4\.safetensors: missing"):
        folder_manifest(short, SOURCE, None, Meter("test"))
    changed = fill(tmp_path / "changed")
    (changed / "config.json").write_bytes(b"[]\n")
    with pytest.raises(FleetError, match=r"config\.json: changed"):
        folder_manifest(changed, SOURCE, None, Meter("test"))
    mixed = fill(tmp_path / "mixed")
    record = mixed / ".cache/huggingface/download/config.json.metadata"
    record.write_text(record.read_text().replace(OLD, NEW))
    with pytest.raises(FleetError, match="2 commits"):
        folder_manifest(mixed, SOURCE, None, Meter("test"))


# -- The hub's own client against the lab's hub ----------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A running hub with one repository: (endpoint, faults file)."""
    folder = tmp_path / "hub" / "lab/tiny"
    fill(folder / "revisions" / OLD, records="")
    (folder / "refs.json").write_text(json.dumps({"main": OLD}))
    faults = tmp_path / "faults.json"
    with hub.serving(tmp_path / "hub", faults) as endpoint:
        yield endpoint, faults


def test_the_client_brings_a_model_and_continues_a_part(
    served: tuple[str, Path], store: Store
) -> None:
    endpoint, faults = served
    source = replace(SOURCE, endpoints=(endpoint,))
    plan = fetcher(store, HubClient(""), source).plan()
    work = store.work_path("model", plan.id)
    work.mkdir(parents=True)
    # A beginning of other bytes: only the hash of the whole can tell.
    (work / "model-1.safetensors").write_bytes(b"x" * 2000)
    (work / "model-2.safetensors").write_bytes(SHARDS["model-2.safetensors"][:2000])
    faults.write_text(json.dumps({"cut_after_bytes": 1000, "cut_times": 3}))
    fetcher(store, HubClient(""), source, workers=4).fetch(plan)
    assert find_damage(store.publish(plan), plan, deep=True) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_the_client_brings_segments_also_past_a_proxy_without_ranges(
    served: tuple[str, Path], store: Store, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    endpoint, faults = served
    if not ranges:
        monkeypatch.setattr(hub.Handler, "byte_range", lambda self, size: (0, size))
    source = replace(SOURCE, endpoints=(endpoint,))
    plan = fetcher(store, HubClient(""), source).plan()
    faults.write_text(json.dumps({"cut_after_bytes": 700, "cut_times": 3}))
    fetcher(store, HubClient(""), source, workers=4, segment=1000).fetch(plan)
    assert find_damage(store.publish(plan), plan, deep=True) == []


@pytest.mark.parametrize(
    ("faults", "token", "revision", "words"),
    [
        ({"gated": ["hf_right"]}, "", "main", "does not let us read lab/tiny.*no token was given"),
        ({"gated": ["hf_right"]}, "hf_wrong", "main", "token has no access.*accept its terms"),
        ({"gone": [OLD]}, "", OLD, f"revision is not on the hub.*{OLD}"),
        ({}, "", "no-such-branch", "revision is not on the hub.*no-such-branch"),
        ({"too_many_requests": 9, "retry_after": 60}, "", "main", "429.*asks to wait 60 s"),
        ({"down": True}, "", "main", "No hub delivers lab/tiny"),
        ({"disabled": True}, "hf_x", "main", "has disabled lab/tiny.*disabled.*no token opens it"),
        (
            {"forbidden": "Blocked by the site's proxy"},
            "",
            "main",
            "not because it is gated: Blocked by the site's proxy.*model_proxy",
        ),
        (
            {"forbidden": "Fine-grained token without read"},
            "hf_x",
            "main",
            "without read.*give the token the right to read",
        ),
    ],
)
def test_each_refusal_is_one_clear_sentence(
    served: tuple[str, Path],
    store: Store,
    faults: dict[str, Any],
    token: str,
    revision: str,
    words: str,
) -> None:
    served[1].write_text(json.dumps(faults))
    source = replace(SOURCE, endpoints=(served[0],), revision=revision)
    with pytest.raises(FleetError, match=words) as caught:
        fetcher(store, HubClient(token), source, seconds=2).plan()
    assert "What to do" in str(caught.value)
    assert "hf_wrong" not in str(caught.value)


def test_a_storage_host_that_refuses_once_is_asked_again_with_another_signature(
    served: tuple[str, Path], store: Store
) -> None:
    source = replace(SOURCE, endpoints=(served[0],))
    plan = fetcher(store, HubClient(""), source).plan()
    refused = dict.fromkeys(list(SHARDS)[:2], 2)
    served[1].write_text(json.dumps({"storage": "localhost", "storage_refuses": refused}))
    fetcher(store, HubClient(""), source, workers=2).fetch(plan)
    assert find_damage(store.publish(plan), plan, deep=True) == []


def test_what_a_storage_host_keeps_back_is_named_and_the_rest_comes(
    served: tuple[str, Path], store: Store
) -> None:
    source = replace(SOURCE, endpoints=(served[0],))
    plan = fetcher(store, HubClient("hf_x"), source).plan()
    kept = ["model-2.safetensors", "model-3.safetensors"]
    refused = dict.fromkeys(kept, 10**6)
    served[1].write_text(json.dumps({"storage": "localhost", "storage_refuses": refused}))
    with pytest.raises(FleetError) as caught:
        fetcher(store, HubClient("hf_x"), source, workers=2).fetch(plan)
    text = str(caught.value)
    assert all(f"refuses {name} with HTTP 403" in text for name in kept)
    assert "the storage host localhost:" in text
    assert "gated" not in text
    assert "accept its terms" not in text
    assert sorted(entry.path for entry in store.missing(plan)) == kept


def test_a_mirror_is_asked_for_what_the_hub_or_its_storage_refuses(store: Store) -> None:
    def trouble(endpoint: str, what: str) -> None:
        if endpoint == "http://hub" and what == "model-1.safetensors":
            raise UnavailableError("cdn refuses it", refused="cdn")
        if endpoint == "http://hub" and what == "model-2.safetensors":
            raise FleetError("The hub does not let us read it")

    client = FakeHub(trouble=trouble)
    source = replace(SOURCE, endpoints=("http://hub", "http://mirror"))
    made = fetcher(store, client, source)
    made.fetch(made.plan())
    assert made.clock.pauses == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("date", "said", "words"),
    [
        ("Fri, 01 Jan 2021 00:00:00 GMT", "", "s ahead of the server's"),
        ("Fri, 01 Jan 2100 00:00:00 GMT", "", "s behind the server's"),
        ("", "certificate verify failed: certificate is not yet valid", "is the clock"),
        ("", "timed out", ""),
        ("no date", "timed out", ""),
    ],
)
def test_a_wrong_clock_is_told(date: str, said: str, words: str) -> None:
    remark = clock_remark(SimpleNamespace(headers={"date": date}), OSError(said))
    assert words in remark
    assert bool(remark) == bool(words)


def test_the_right_token_opens_a_gated_repository(served: tuple[str, Path], store: Store) -> None:
    served[1].write_text(json.dumps({"gated": ["hf_right"]}))
    source = replace(SOURCE, endpoints=(served[0],))
    assert fetcher(store, HubClient("hf_right"), source).plan().provenance["revision"] == OLD


def test_a_proxy_brings_what_the_host_cannot_reach(
    served: tuple[str, Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", served[0])
    monkeypatch.setenv("no_proxy", "")
    source = replace(SOURCE, endpoints=("http://hub.invalid",))
    # The client keeps its connections, and the proxy with them.
    close_session()
    try:
        plan = fetcher(store, HubClient(""), source).plan()
        fetcher(store, HubClient(""), source).fetch(plan)
    finally:
        close_session()
    assert find_damage(store.publish(plan), plan, deep=True) == []


def test_an_unknown_repository_is_named(served: tuple[str, Path], store: Store) -> None:
    source = replace(SOURCE, endpoints=(served[0],), repository="lab/nothing")
    with pytest.raises(FleetError, match=r"repository is not on the hub.*lab/nothing"):
        fetcher(store, HubClient(""), source).plan()


# -- Small things ---------------------------------------------------------------------------


def test_a_blob_id_is_that_of_git(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"{}\n")
    # What `git hash-object` gives this content.
    assert git_blob_id(tmp_path / "f") == "0967ef424bce6791893e9a57bb952f80fd536e93"


def test_a_name_fits_a_path() -> None:
    assert model_slug("cyankiwi/GLM-5.2-AWQ-INT4", "ab" * 20) == "cyankiwi-glm-5.2-awq-int4-abababa"
    assert is_commit("ab" * 20)
    assert not is_commit("main")


def test_a_disk_that_is_too_small_is_an_error_with_figures() -> None:
    assert missing_space(100, 50, 50) is None
    assert missing_space(0, 0, 50) is None, "nothing is wanted"
    error = missing_space(10_000_000_000, 474_000_000_000, 5_000_000_000)
    assert error is not None
    assert "479.0 GB" in str(error)
    assert "10.0 GB" in str(error)


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/cron.d/x", "a/../../x", "..", "a\\b", "\x1b]52;c;x\x07"]
)
def test_a_hub_writes_no_file_outside(store: Store, name: str, tmp_path: Path) -> None:
    class Hostile(FakeHub):
        def describe(self, *_: str) -> tuple[str, list[HubFile]]:
            return OLD, [*listing(CONTENT), HubFile(name, 2, "", blob(b"x\n"))]

    with pytest.raises(FleetError, match="The hub names a file outside its folder"):
        fetcher(store, Hostile()).plan()
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("answer", [NEW, "main", "", "../../x", "a" * 39])
def test_a_hub_answers_with_the_commit_that_it_was_asked_for(store: Store, answer: str) -> None:
    class Other(FakeHub):
        def describe(self, *_: str) -> tuple[str, list[HubFile]]:
            return answer, listing(CONTENT)

    with pytest.raises(FleetError, match="answers with another commit"):
        fetcher(store, Other(), replace(SOURCE, revision=OLD)).plan()
    if answer != NEW:
        with pytest.raises(FleetError, match="answers with another commit"):
            fetcher(store, Other()).plan()


def test_a_small_file_ends_at_its_size(store: Store) -> None:
    sent = []

    class Endless(FakeHub):
        def download(self, *arguments: Any) -> None:
            for _ in range(1000):
                sent.append(1)
                arguments[-1](b"x" * 1024)

    with pytest.raises(FleetError, match=r"more than its [34] bytes"):
        fetcher(store, Endless()).plan()
    # At most the first block of each.
    assert len(sent) <= len(CONTENT)


@pytest.mark.parametrize(
    ("size", "sha256", "oid"),
    [(-1, "0" * 64, ""), (10**13, "0" * 64, ""), (10**8, "", "a" * 40), (1, "", ""), (1, "x", "")],
)
def test_a_hub_describes_files_that_can_be(size: int, sha256: str, oid: str) -> None:
    with pytest.raises(FleetError, match="a file that cannot be"):
        HubFile("a", size, sha256, oid)


def test_a_token_goes_where_nobody_on_the_way_can_read_it() -> None:
    client = HubClient("hf_x")
    assert client.token_for("https://hub") == client.token_for("http://127.0.0.1:1") == "hf_x"
    assert client.token_for("http://hub") is False
    assert client.token_for("http://127.0.0.1.example") is False
    assert HubClient("hf_x", in_clear_text=True).token_for("http://hub") == "hf_x"
    assert HubClient("").token_for("https://hub") is False
