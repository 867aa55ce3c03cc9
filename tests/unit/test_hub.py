# SPDX-License-Identifier: Apache-2.0
"""What belongs to a model repository, and whether it arrived."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
from glm_fleet.artifact import Proven
from glm_fleet.errors import FleetError
from glm_fleet.hub import (
    find_corrupt,
    git_blob_id,
    is_commit,
    missing_space,
    model_slug,
    same_model,
    select_files,
)

WEIGHTS = b"weights" * 100
CONFIG = b"{}\n"
SIBLINGS = [
    Namespace(
        rfilename="model-1.safetensors",
        size=len(WEIGHTS),
        blob_id="0" * 40,
        lfs=Namespace(size=len(WEIGHTS), sha256=hashlib.sha256(WEIGHTS).hexdigest()),
    ),
    # The id that `git hash-object` gives this content.
    Namespace(
        rfilename="config.json",
        size=len(CONFIG),
        blob_id="0967ef424bce6791893e9a57bb952f80fd536e93",
        lfs=None,
    ),
]


def test_files_are_selected_by_patterns() -> None:
    names = [file.path for file in select_files(SIBLINGS, [], [])]
    assert names == ["config.json", "model-1.safetensors"]
    assert [file.path for file in select_files(SIBLINGS, ["*.json"], [])] == ["config.json"]
    assert [file.path for file in select_files(SIBLINGS, [], ["*.json"])] == ["model-1.safetensors"]
    with pytest.raises(FleetError, match="No file"):
        select_files(SIBLINGS, ["*.gguf"], [])


def test_a_blob_id_is_that_of_git(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONFIG)
    assert git_blob_id(tmp_path / "f") == SIBLINGS[1].blob_id


def test_corrupt_files_of_the_right_size_are_found(tmp_path: Path) -> None:
    files = select_files(SIBLINGS, [], [])
    (tmp_path / "model-1.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert find_corrupt(tmp_path, files, Proven(tmp_path / "p")) == {}
    (tmp_path / "model-1.safetensors").write_bytes(b"W" + WEIGHTS[1:])
    (tmp_path / "config.json").write_bytes(b"[]\n")
    assert find_corrupt(tmp_path, files, Proven(tmp_path / "p")) == {
        "config.json": "content differs from the hub's",
        "model-1.safetensors": "SHA-256 differs from the hub's",
    }
    (tmp_path / "config.json").unlink()
    (tmp_path / "model-1.safetensors").write_bytes(WEIGHTS[:5])
    assert find_corrupt(tmp_path, files, Proven(tmp_path / "p")) == {
        "config.json": "missing",
        "model-1.safetensors": f"5 of {len(WEIGHTS)} bytes",
    }


def test_a_name_fits_a_path() -> None:
    assert model_slug("cyankiwi/GLM-5.2-AWQ-INT4", "ab" * 20) == "cyankiwi-glm-5.2-awq-int4-abababa"
    assert is_commit("ab" * 20)
    assert not is_commit("main")


def test_a_branch_stays_the_commit_that_it_was() -> None:
    provenance = {
        "repository": "a/b",
        "revision": "c" * 40,
        "requested": "main",
        "include": [],
        "exclude": [],
    }
    wanted = {"repository": "a/b", "include": [], "exclude": []}
    assert same_model(provenance, revision="main", **wanted)
    assert same_model(provenance, revision="c" * 40, **wanted)
    assert not same_model(provenance, revision="d" * 40, **wanted)
    assert not same_model(provenance, revision="main", **{**wanted, "exclude": ["*.bin"]})


def test_a_full_disk_is_an_error_with_figures() -> None:
    assert missing_space(100, 50, 50) is None
    error = missing_space(10_000_000_000, 474_000_000_000, 5_000_000_000)
    assert error is not None
    assert "479.0 GB" in str(error)
    assert "10.0 GB" in str(error)
