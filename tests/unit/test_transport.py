# SPDX-License-Identifier: Apache-2.0
"""One host offers, another fetches: over loopback, with real bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_fleet.artifact import Manifest, Store
from glm_fleet.errors import FleetError
from glm_fleet.transport import SeedServer, fetch_missing

TOKEN = "a-secret"  # noqa: S105 - of this test


@pytest.fixture
def offered(tmp_path: Path) -> tuple[Store, Manifest]:
    store = Store(tmp_path / "seed")
    folder = tmp_path / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "big").write_bytes(bytes(range(256)) * 20_000)
    (folder / "deep" / "empty").write_bytes(b"")
    (folder / "deep" / "a file").write_text("small")
    return store, store.adopt(folder, kind="model", slug="m", provenance={})


@pytest.fixture
def seed(offered: tuple[Store, Manifest]) -> Iterator[SeedServer]:
    server = SeedServer(("127.0.0.1", 0), offered[0].root, ["127.0.0.1"], TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def url(server: SeedServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_everything_arrives_and_is_published(
    tmp_path: Path, offered: tuple[Store, Manifest], seed: SeedServer
) -> None:
    store, manifest = Store(tmp_path / "node"), offered[1]
    fetch_missing(store, manifest, [url(seed)], TOKEN)
    assert store.missing(manifest) == []
    store.publish(manifest)
    assert store.is_published(manifest)


def test_a_beginning_is_continued_and_a_wrong_beginning_is_fetched_again(
    tmp_path: Path, offered: tuple[Store, Manifest], seed: SeedServer
) -> None:
    store, manifest = Store(tmp_path / "node"), offered[1]
    staging = store.stage(manifest)
    whole = (offered[0].published_path("model", manifest.id) / "big").read_bytes()
    (staging / "big").write_bytes(whole[:1_000_000])
    fetch_missing(store, manifest, [url(seed)], TOKEN)
    assert (staging / "big").read_bytes() == whole
    (staging / "big").write_bytes(b"x" * 1000)
    fetch_missing(store, manifest, [url(seed)], TOKEN)
    assert (staging / "big").read_bytes() == whole


def test_the_next_source_is_asked_when_one_is_dead(
    tmp_path: Path, offered: tuple[Store, Manifest], seed: SeedServer
) -> None:
    store, manifest = Store(tmp_path / "node"), offered[1]
    fetch_missing(store, manifest, ["http://127.0.0.1:1", url(seed)], TOKEN, sleep=lambda _: None)
    assert store.missing(manifest) == []


@pytest.mark.parametrize(
    ("allowed", "token", "status"), [(["192.0.2.1"], TOKEN, "403"), (["127.0.0.1"], "no", "401")]
)
def test_strangers_get_nothing(
    tmp_path: Path,
    offered: tuple[Store, Manifest],
    seed: SeedServer,
    allowed: list[str],
    token: str,
    status: str,
) -> None:
    seed.allowed = frozenset(allowed)
    store, manifest = Store(tmp_path / "node"), offered[1]
    with pytest.raises(FleetError, match=status):
        fetch_missing(store, manifest, [url(seed)], token, sleep=lambda _: None)
    assert not (store.staging_path("model", manifest.id) / "big").exists()


def test_a_source_that_changed_a_file_is_named(
    tmp_path: Path, offered: tuple[Store, Manifest], seed: SeedServer
) -> None:
    store, manifest = Store(tmp_path / "node"), offered[1]
    path = offered[0].published_path("model", manifest.id) / "big"
    data = path.read_bytes()
    path.write_bytes(b"!" + data[1:])
    with pytest.raises(FleetError, match="sends other bytes for big"):
        fetch_missing(store, manifest, [url(seed)], TOKEN)
    assert [each.path for each in store.missing(manifest)] == ["big", "deep/a file", "deep/empty"]
