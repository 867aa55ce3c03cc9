# SPDX-License-Identifier: Apache-2.0
"""The artifact: named by content, published whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.artifact import hashes, retention
from glm_fleet.artifact.hashes import Proven, find_damage, hash_files, make_manifest
from glm_fleet.artifact.link import point_link as activate
from glm_fleet.artifact.manifest import MANIFEST, Manifest, load_manifest, parse_manifest
from glm_fleet.artifact.retention import Retired, protected_by, retirable, retire_old
from glm_fleet.artifact.store import Store
from glm_fleet.core.errors import FleetError
from glm_fleet.core.files import exclusive, sha256_file
from glm_fleet.core.runner import RunResult

from tests.clock import next_tick


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def published(store: Store, tmp_path: Path) -> Manifest:
    source = fill(tmp_path / "made", a="alpha", sub__b="beta" * 100)
    return store.adopt(source, kind="model", slug="tiny", provenance={"from": "here"})


def test_the_id_depends_on_content_and_not_on_provenance(tmp_path: Path) -> None:
    first = make_manifest(
        fill(tmp_path / "1", a="x", b="y"), kind="model", slug="m", provenance={"at": 1}
    )
    second = make_manifest(
        fill(tmp_path / "2", b="y", a="x"), kind="model", slug="m", provenance={"at": 2}
    )
    third = make_manifest(fill(tmp_path / "3", a="x", b="z"), kind="model", slug="m", provenance={})
    assert first.id == second.id
    assert first.id != third.id


def test_adopting_a_folder_publishes_it_whole(store: Store, published: Manifest) -> None:
    folder = store.published_path("model", published.id)
    assert load_manifest(folder) == published
    assert (folder / "sub/b").read_text() == "beta" * 100
    assert [each.id for each in store.published("model")] == [published.id]
    assert store.missing(published) == []


def test_a_manifest_survives_json(published: Manifest) -> None:
    assert parse_manifest(json.loads(published.as_json())) == published


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b"])
def test_a_manifest_that_leaves_its_folder_is_refused(published: Manifest, path: str) -> None:
    data = published.as_dict()
    data["files"][0]["path"] = path
    with pytest.raises(FleetError, match="outside its folder"):
        parse_manifest(data)


def test_a_manifest_that_was_changed_does_not_fit_its_id(published: Manifest) -> None:
    data = published.as_dict()
    data["files"][0]["sha256"] = "0" * 64
    with pytest.raises(FleetError, match="does not belong to its id"):
        parse_manifest(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "a").unlink(), "missing"),
        (lambda folder: (folder / "a").write_text("alp"), "truncated"),
        (lambda folder: (folder / "a").write_text("ALPHA"), "changed"),
        (lambda folder: (folder / "a").write_text("alphabet"), "changed"),
        (lambda folder: (folder / "c").write_text("new"), "foreign"),
        (lambda folder: ((folder / "a").unlink(), (folder / "a").symlink_to("b")), "missing"),
    ],
)
def test_every_damage_is_named(store: Store, published: Manifest, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    folder = store.published_path("model", published.id)
    damage(folder)
    assert [each.reason for each in find_damage(folder, published, deep=True)] == [reason]


def test_publishing_refuses_what_is_not_in_the_manifest_and_keeps_the_rest(
    store: Store, published: Manifest, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other")
    staging = other.stage(published)
    fill(staging, a="ALPHA", sub__b="beta" * 100)
    with pytest.raises(FleetError, match="a: changed"):
        other.publish(published)
    assert not other.published_path("model", published.id).exists()
    assert [each.path for each in other.missing(published)] == ["a"]
    fill(staging, a="alpha")
    final = other.publish(published)
    assert find_damage(final, published, deep=True) == []
    assert not staging.exists()


def test_a_damaged_published_artifact_goes_back_and_only_the_damage_is_missing(
    store: Store, published: Manifest
) -> None:
    folder = store.published_path("model", published.id)
    (folder / "a").write_text("alp")
    assert not store.is_published(published)
    assert [each.path for each in store.missing(published)] == ["a"]
    staging = store.stage(published)
    assert not folder.exists()
    (staging / "a").write_text("alpha")
    store.publish(published)
    assert store.is_published(published)


def test_what_was_proven_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path / "f", a="alpha")
    digest = Proven(tmp_path / "memory").sha256(folder, "a")
    read = []
    monkeypatch.setattr(hashes, "sha256_file", lambda path, _: read.append(path) or "other")
    assert Proven(tmp_path / "memory").sha256(folder, "a") == digest
    assert read == []
    # Another time of the same bytes could hide other bytes.
    os.utime(folder / "a")
    assert Proven(tmp_path / "memory").sha256(folder, "a") == "other"


def test_a_change_that_hides_its_time_is_seen(tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", a="alpha")
    digest = Proven(tmp_path / "memory").sha256(folder, "a")
    stat = (folder / "a").stat()
    next_tick(tmp_path)
    with (folder / "a").open("r+") as stream:
        stream.write("ALPHA")
    os.utime(folder / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Proven(tmp_path / "memory").known(folder, "a") is None
    assert Proven(tmp_path / "memory").sha256(folder, "a") != digest


def test_what_is_published_stays_proven_until_it_is_retired(
    store: Store, published: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.published_path("model", published.id)
    read: list[Path] = []
    real = hashes.sha256_file

    def reading(path: Path, advance: Any = None) -> str:
        read.append(path)
        return real(path, advance)

    monkeypatch.setattr(hashes, "sha256_file", reading)
    assert store.prove(published) == []
    assert read == []
    assert store.stale("model", [], time.time() + 1e9) == []
    # The same size and time: a look at the folder sees nothing, and a start would use it.
    stat = (folder / "a").stat()
    next_tick(tmp_path)
    with (folder / "a").open("r+") as stream:
        stream.write("ALPHA")
    os.utime(folder / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.is_published(published)
    (damage,) = store.prove(published)
    assert (damage.path, damage.reason) == ("a", "changed")
    assert read == [folder / "a"]
    store.retire("model", published.id)
    assert not list((store.root / ".staging/model").glob("*.proven"))


def test_what_changed_since_it_was_published_is_not_used(
    store: Store, published: Manifest, tmp_path: Path
) -> None:
    assert store.require_proven("model", published.id) == published
    folder = store.published_path("model", published.id)
    next_tick(tmp_path)
    (folder / "a").write_text("ALPHA")
    with pytest.raises(FleetError, match="a: changed"):
        store.require_proven("model", published.id)
    assert not store.is_published(published)
    folder.rename(folder.with_name("tiny-0123456789ab"))
    with pytest.raises(FleetError, match="holds another one"):
        store.require_proven("model", "tiny-0123456789ab")


def test_a_disk_that_lost_a_byte_makes_nobody_trust_what_was_proven(
    store: Store, published: Manifest
) -> None:
    folder = store.published_path("model", published.id)
    store.distrust(published)
    assert store.proven("model", published.id).known(folder, "a") is None


def test_a_manifest_names_the_torrent_of_each_file(store: Store, published: Manifest) -> None:
    folder = store.published_path("model", published.id)
    roots = {entry.path: entry.root for entry in published.files}
    assert roots["a"] == hashlib.sha256(b"alpha").hexdigest()
    assert {each.path: each.root for each in load_manifest(folder).files} == roots
    # One of the version before has no roots, and is the same artifact.
    plain = json.loads((folder / MANIFEST).read_text())
    for each in plain["files"]:
        del each["root"]
    assert parse_manifest(plain) == published
    assert "root" not in parse_manifest(plain).as_json()


def test_activation_is_a_switch_of_one_link(store: Store, published: Manifest) -> None:
    link = store.root.parent / "model"
    target = store.published_path("model", published.id)
    assert activate(link, target)
    assert not activate(link, target)
    assert link.resolve() == target
    with pytest.raises(FleetError, match="not published"):
        activate(link, target.with_name("tiny-000000000000"))
    assert link.resolve() == target


def test_activation_leaves_a_real_folder_alone(store: Store, published: Manifest) -> None:
    place = store.root.parent / "model"
    place.mkdir()
    with pytest.raises(FleetError, match="is taken"):
        activate(place, store.published_path("model", published.id))


def test_retirement_removes_one_artifact(store: Store, published: Manifest) -> None:
    assert store.retire("model", published.id)
    assert store.published("model") == []
    assert not store.retire("model", published.id)


def test_an_artifact_has_no_links_and_is_not_empty(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    with pytest.raises(FleetError, match="nothing to make"):
        make_manifest(folder, kind="model", slug="m", provenance={})
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(FleetError, match="regular files only"):
        make_manifest(folder, kind="model", slug="m", provenance={})
    assert not (folder / MANIFEST).exists()


def test_who_comes_second_waits_for_the_first(tmp_path: Path) -> None:
    order = []
    inside, done = threading.Event(), threading.Event()

    def first() -> None:
        with exclusive(tmp_path / "sub" / "lock"):
            inside.set()
            done.wait(5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(5)
    threading.Timer(0.2, done.set).start()
    with exclusive(tmp_path / "sub" / "lock"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_what_is_staged_to_the_last_file_still_has_to_be_published(
    published: Manifest, tmp_path: Path
) -> None:
    # As after a controller that died between the last file and the publishing.
    other = Store(tmp_path / "other")
    fill(other.stage(published), a="alpha", sub__b="beta" * 100)
    assert other.missing(published) == []
    assert not other.is_published(published)
    other.publish(published)
    assert other.is_published(published)


def test_a_damaged_artifact_is_replaced_by_a_sound_one(
    store: Store, published: Manifest, tmp_path: Path
) -> None:
    folder = store.published_path("model", published.id)
    fill(store.stage(published), a="alpha", sub__b="beta" * 100)
    (folder / "foreign").write_text("?")
    store.publish(published)
    assert find_damage(folder, published, deep=True) == []
    (folder / "a").write_text("alp")
    again = fill(tmp_path / "again", a="alpha", sub__b="beta" * 100)
    store.adopt(again, kind="model", slug="tiny", provenance={})
    assert find_damage(folder, published, deep=True) == []


def test_two_processes_share_what_is_proven(tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", a="alpha", b="beta", c="gamma")
    first, second = Proven(tmp_path / "memory"), Proven(tmp_path / "memory")
    digest = first.sha256(folder, "a")
    second.sha256(folder, "b")
    first.sha256(folder, "c")
    # Neither has overwritten the other, and each sees what came after it was opened.
    assert Proven(tmp_path / "memory").known(folder, "b") is not None
    assert second.known(folder, "a") == digest
    assert second.known(folder, "c") is not None
    first.forget("b")
    assert Proven(tmp_path / "memory").known(folder, "b") is None
    assert second.known(folder, "no such file") is None


def test_many_threads_prove_at_once(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(20)]
    folder = fill(tmp_path / "f", **{name: name * 1000 for name in names})
    counted: list[int] = []
    hashes = hash_files(folder, names, proven=Proven(tmp_path / "m"), advance=counted.append)
    assert hashes == {name: sha256_file(folder / name) for name in names}
    assert sum(counted) == sum((folder / name).stat().st_size for name in names)
    again = Proven(tmp_path / "m")
    assert all(again.known(folder, name) == hashes[name] for name in names)


def test_a_file_is_received_only_when_it_is_right(
    store: Store, published: Manifest, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other")
    entry = next(each for each in published.files if each.path == "sub/b")
    part = tmp_path / "part"
    part.write_text("BETA" * 100)
    assert other.receive(published, entry, part) != entry.sha256
    assert part.exists()
    assert other.missing(published, names=["sub/b"]) == [entry]
    part.write_text("beta" * 100)
    assert other.receive(published, entry, part) == entry.sha256
    assert not part.exists()
    staging = other.staging_path("model", published.id)
    assert other.proven("model", published.id).known(staging, "sub/b") == entry.sha256
    assert [each.path for each in other.missing(published)] == ["a"]
    assert other.missing(published, names=["sub/b"]) == []


def test_what_a_full_pass_found_is_mended_by_the_next_run(
    store: Store, published: Manifest
) -> None:
    folder = store.published_path("model", published.id)
    (folder / "a").write_text("ALPHA")
    assert store.is_published(published), "a stat does not see it"
    assert [str(each).split(" (")[0] for each in store.verify(published, deep=True)] == [
        "a: changed"
    ]
    assert store.distrust(published)
    assert not store.distrust(published)
    assert not store.is_published(published)
    assert [each.path for each in store.missing(published)] == ["a"]
    (store.stage(published) / "a").write_text("alpha")
    store.publish(published)
    assert store.is_published(published)
    assert store.verify(published, deep=True) == []


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o755, 0o4644])
def test_published_files_are_for_root_alone_to_change(
    store: Store, published: Manifest, mode: int
) -> None:
    folder = store.published_path("model", published.id)
    modes = {path.stat().st_mode & 0o7777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o644}
    (folder / "a").chmod(mode)
    (damage,) = store.verify(published, deep=False)
    assert (damage.path, damage.reason) == ("a", "open to changes")
    assert not store.is_published(published)
    store.publish(published)
    assert store.is_published(published)


def test_a_plan_is_remembered_until_it_is_published(
    store: Store, published: Manifest, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other")
    other.plan(published)
    assert other.plans("model") == [published]
    fill(other.stage(published), a="alpha", sub__b="beta" * 100)
    other.work_path("model", published.id).mkdir()
    other.publish(published)
    assert other.plans("model") == []
    assert not other.work_path("model", published.id).exists()


AGES = {"old": 1.0, "middle": 2.0, "new": 3.0}


@pytest.mark.parametrize(
    ("keep", "protected", "coming", "going"),
    [
        (3, [], [], []),
        (2, [], [], ["old"]),
        (1, [], [], ["old", "middle"]),
        (2, ["old"], [], ["middle"]),
        (1, ["old", "middle"], [], ["new"]),
        (2, ["old"], ["newest"], ["middle", "new"]),
        (2, ["old", "middle"], ["new"], []),
        (2, ["gone long ago"], [], ["old"]),
        (2, [], ["old"], ["middle"]),
    ],
)
def test_the_oldest_go_and_what_is_needed_stays(
    keep: int, protected: list[str], coming: list[str], going: list[str]
) -> None:
    assert retirable(AGES, keep=keep, protected=protected, coming=coming) == going


@pytest.fixture
def full(store: Store, tmp_path: Path) -> list[str]:
    """Ids of four releases in the order of their publication, with their environments."""
    ids = []
    for number in range(4):
        folder = fill(tmp_path / f"r{number}", lock=f"{number}")
        made = store.adopt(folder, kind="release", slug=f"r{number}", provenance={})
        os.utime(store.published_path("release", made.id) / MANIFEST, (number, number))
        ids.append(made.id)
        fill(tmp_path / "releases" / made.id, python="x")
        fill(tmp_path / "caches" / made.id, kernel="x")
    return ids


def test_retiring_takes_environment_and_cache_and_tells_before(
    store: Store, full: list[str], tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "releases" / full[0])
    previous = tmp_path / "previous.json"
    previous.write_text(json.dumps({"release": full[1], "model": "m"}))
    fill(tmp_path / "releases" / "by-hand", python="x")

    def retire(dry: bool) -> Retired:
        return retire_old(
            store,
            ["release", "model"],
            keep=2,
            protected=protected_by([link], previous),
            companions=[tmp_path / "releases", tmp_path / "caches"],
            dry=dry,
        )

    told = retire(dry=True)
    assert [each["id"] for each in told.artifacts] == full[2:]
    assert told.bytes == 2
    assert [each.id for each in store.published("release")] == full
    assert retire(dry=False) == told
    assert [each.id for each in store.published("release")] == full[:2]
    assert sorted(each.name for each in (tmp_path / "releases").iterdir()) == ["by-hand", *full[:2]]
    assert sorted(each.name for each in (tmp_path / "caches").iterdir()) == full[:2]
    assert retire(dry=False) == Retired([], [])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_link_in_the_folder_of_a_service_leads_root_nowhere(
    store: Store, full: list[str], tmp_path: Path
) -> None:
    # The service's user reaches its folder, and nothing else here.
    above = [each for each in tmp_path.parents if Path(tempfile.gettempdir()) in each.parents]
    for folder in (tmp_path, *above):
        folder.chmod(0o755)
    precious = fill(tmp_path / "precious", key="x")
    caches = tmp_path / "caches"
    for path in (caches, *caches.rglob("*")):
        os.chown(path, 65534, 65534)
    shutil.rmtree(caches / full[0])
    (caches / full[0]).symlink_to(precious)
    (caches / full[1] / "deeper").symlink_to(precious)

    retire_old(store, ["release"], keep=1, protected=[full[3]], companions=[caches], dry=False)

    assert (precious / "key").read_text() == "x"
    assert [path.name for path in caches.iterdir()] == [full[3]]


def test_a_folder_of_another_user_is_emptied_with_that_users_rights(
    store: Store, full: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []

    def run(argv: Sequence[str], **options: Any) -> RunResult:
        said.append([*argv, str(options["cwd"])])
        return RunResult(0, "", "")

    owner = os.stat_result((0o40755, 0, 0, 0, 990, 990, 0, 0, 0, 0))
    caches = tmp_path / "caches"
    stat = Path.stat
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Path, "stat", lambda self, **how: owner if self == caches else stat(self))
    for id_ in full[:3]:
        retention.remove_as_owner(caches / id_, run)
    assert len(said) == 3
    assert said[0] == [
        *("setpriv", "--reuid=990", "--regid=990", "--clear-groups", "--inh-caps=-all"),
        *("--bounding-set=-all", "--no-new-privs", "--"),
        *("rm", "--recursive", "--force", "--", str(caches / full[0]), "/"),
    ]


def test_what_another_process_uses_or_changes_is_left_alone(store: Store, full: list[str]) -> None:
    def retire() -> list[str]:
        retired = retire_old(store, ["release"], keep=1, protected=[], dry=False)
        return [each["id"] for each in retired.artifacts]

    with store.lock("release"):
        assert retire() == []
    with store.using("release", full[0]):
        assert retire() == full[1:]
    assert [each.id for each in store.published("release")] == full[:1]


def test_leftovers_go_after_a_day_and_what_is_coming_stays(store: Store, full: list[str]) -> None:
    staging = store.root / ".staging" / "model"
    fill(staging / "lost-0123456789ab", shard="x")
    fill(staging / "kept-0123456789ab", shard="x")
    fill(staging / "gone-0123456789ab.retired", shard="x")
    (staging / "lost-0123456789ab.proven").write_text("{}")

    def retire(later_s: float) -> list[str]:
        now = time.time() + later_s
        coming = ["kept-0123456789ab"]
        retired = retire_old(
            store, ["model"], keep=2, protected=[], coming=coming, dry=False, now=now
        )
        return [Path(each).name for each in retired.folders]

    assert retire(3600) == ["gone-0123456789ab.retired"]
    assert retire(90000) == ["lost-0123456789ab", "lost-0123456789ab.proven"]
    assert (staging / "kept-0123456789ab/shard").exists()


def test_nothing_is_retired_when_the_way_back_cannot_be_read(tmp_path: Path) -> None:
    previous = tmp_path / "previous.json"
    assert protected_by([], previous) == set()
    # A link that is a folder protects nothing; what runs is safe all the same.
    running = tmp_path / "serving.json"
    running.write_text('{"release": "r1", "model": "m1", "invocation": "i"}')
    assert protected_by([tmp_path], previous, running) == {"r1", "m1"}
    previous.write_text("{")
    with pytest.raises(FleetError, match="nothing is retired"):
        protected_by([], previous)


def test_a_retirement_that_was_killed_is_finished_by_the_next(
    store: Store, published: Manifest
) -> None:
    fill(store.root / ".staging/model" / f"{published.id}.retired", half="x")
    assert store.retire("model", published.id)
    assert not (store.root / ".staging/model" / f"{published.id}.retired").exists()
