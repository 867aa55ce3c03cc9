# SPDX-License-Identifier: Apache-2.0
"""The artifact: named by content, published whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from glm_fleet.artifact import (
    MANIFEST,
    Manifest,
    Proven,
    Store,
    activate,
    exclusive,
    find_damage,
    load_manifest,
    make_manifest,
    parse_manifest,
)
from glm_fleet.errors import FleetError


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
    with pytest.raises(FleetError, match="outside the artifact"):
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


def test_what_was_proven_is_not_read_again(tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", a="alpha")
    proven = Proven(tmp_path / "memory")
    digest = proven.sha256(folder, "a")
    stat = (folder / "a").stat()
    # The same size, mtime and inode with other bytes: only the memory can answer as before.
    with (folder / "a").open("r+") as stream:
        stream.write("ALPHA")
    os.utime(folder / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Proven(tmp_path / "memory").sha256(folder, "a") == digest
    os.utime(folder / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert Proven(tmp_path / "memory").sha256(folder, "a") != digest


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
