# SPDX-License-Identifier: Apache-2.0
"""The hub against the unmodified huggingface_hub client."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lab import hub

NAME = "lab/tiny"
OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 2000


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A running hub with one repository in two revisions: (endpoint, faults file)."""
    folder = tmp_path / "hub" / NAME
    for commit, marker in ((OLD, b"old"), (NEW, b"new")):
        tree = folder / "revisions" / commit
        (tree / "extra").mkdir(parents=True)
        (tree / "config.json").write_text("{}")
        (tree / "extra" / "note.txt").write_bytes(marker)
        for number in range(7):
            (tree / f"model-{number}.safetensors").write_bytes(marker + WEIGHTS)
    (folder / "refs.json").write_text(json.dumps({"main": NEW}))
    gated = tmp_path / "hub" / "lab/gated"
    (gated / "revisions" / OLD).mkdir(parents=True)
    (gated / "revisions" / OLD / "config.json").write_text("{}")
    (gated / "refs.json").write_text(json.dumps({"main": OLD}))
    (gated / "repo.json").write_text(json.dumps({"gated": True, "tokens": ["hf_right"]}))
    faults = tmp_path / "faults.json"
    with hub.serving(tmp_path / "hub", faults) as endpoint:
        yield endpoint, faults


def test_snapshot_of_a_branch_is_complete(served: tuple[str, Path], tmp_path: Path) -> None:
    path = Path(snapshot_download(NAME, endpoint=served[0], local_dir=tmp_path / "out"))
    assert (path / "model-3.safetensors").read_bytes() == b"new" + WEIGHTS
    assert (path / "extra/note.txt").read_bytes() == b"new"


def test_pinned_revision_gives_the_old_files(served: tuple[str, Path], tmp_path: Path) -> None:
    path = Path(
        snapshot_download(NAME, revision=OLD, endpoint=served[0], cache_dir=tmp_path / "cache")
    )
    assert path.name == OLD
    assert (path / "extra/note.txt").read_bytes() == b"old"


def test_metadata_names_the_sha256_of_the_weights(served: tuple[str, Path]) -> None:
    expected = hashlib.sha256(b"new" + WEIGHTS).hexdigest()
    api = HfApi(endpoint=served[0])
    info = api.model_info(NAME, files_metadata=True)
    assert info.sha == NEW
    sibling = next(item for item in info.siblings or [] if item.rfilename == "model-0.safetensors")
    assert sibling.lfs is not None and sibling.lfs.sha256 == expected
    assert sibling.size == len(WEIGHTS) + 3
    listed = list(api.list_repo_tree(NAME, recursive=True, revision=OLD))
    assert len(listed) == 10, "nine files and a folder, over several pages"
    (found,) = api.get_paths_info(NAME, ["model-0.safetensors"], revision=NEW)
    assert found.lfs is not None and found.lfs.sha256 == expected


def test_unknown_things_raise_the_clients_own_errors(served: tuple[str, Path]) -> None:
    api = HfApi(endpoint=served[0])
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="f" * 40)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/nothing")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "no.bin", endpoint=served[0], force_download=True)


def test_gated_repository_wants_the_right_token(served: tuple[str, Path], tmp_path: Path) -> None:
    for token in (False, "hf_wrong"):
        with pytest.raises(GatedRepoError):
            HfApi(endpoint=served[0], token=token).model_info("lab/gated")
    api = HfApi(endpoint=served[0], token="hf_right")
    assert Path(api.snapshot_download("lab/gated", cache_dir=tmp_path)).name == OLD


def test_cut_download_is_resumed(served: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, faults = served
    faults.write_text(json.dumps({"cut_after_bytes": 300_000, "cut_times": 2}))
    path = hf_hub_download(NAME, "model-1.safetensors", endpoint=endpoint, cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"new" + WEIGHTS


def test_busy_hub_is_asked_again(served: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, faults = served
    path = snapshot_download(NAME, revision=NEW, endpoint=endpoint, cache_dir=tmp_path)
    faults.write_text(json.dumps({"too_many_requests": 1}))
    with pytest.raises(HfHubHTTPError, match="429"):
        HfApi(endpoint=endpoint).model_info(NAME)
    assert HfApi(endpoint=endpoint).model_info(NAME).sha == Path(path).name


def test_corrupt_file_has_the_right_size_and_wrong_bytes(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    endpoint, faults = served
    faults.write_text(json.dumps({"corrupt": "model-2.safetensors"}))
    path = hf_hub_download(NAME, "model-2.safetensors", endpoint=endpoint, cache_dir=tmp_path)
    received = Path(path).read_bytes()
    assert len(received) == len(WEIGHTS) + 3 and received != b"new" + WEIGHTS


def test_hub_that_is_down_answers_nothing(served: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, faults = served
    faults.write_text(json.dumps({"down": True}))
    with pytest.raises(http.client.RemoteDisconnected):
        urllib.request.urlopen(f"{endpoint}/api/models/{NAME}", timeout=10)
    faults.unlink()
    assert snapshot_download(NAME, endpoint=endpoint, cache_dir=tmp_path)


def test_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="keys of"):
        hub.check_faults('{"explode": true}')
