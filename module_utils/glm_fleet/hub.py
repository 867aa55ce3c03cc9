# SPDX-License-Identifier: Apache-2.0
"""A model repository at one pinned commit: what belongs to it and whether it arrived.

The client of huggingface_hub moves the bytes. It can report success with a corrupt file
of the right size (huggingface_hub issue 3643), so every file is compared with the hub's
own metadata after it lies on the disk: the SHA-256 of a file in LFS, the git object id of
any other.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifact import Proven
from .errors import FleetError

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """One file of the repository: path, size in bytes, and one of the two digests in hex."""

    path: str
    size: int
    sha256: str
    git_oid: str


def is_commit(revision: str) -> bool:
    """Tell a full commit id from a branch or tag name."""
    return _COMMIT.fullmatch(revision) is not None


def select_files(
    siblings: Iterable[Any], include: Sequence[str], exclude: Sequence[str]
) -> list[HubFile]:
    """Pick the files of a repository that match ``include`` and not ``exclude``.

    ``siblings`` are the entries of huggingface_hub's ``ModelInfo`` with file metadata.
    Patterns are those of `fnmatch`; no include pattern means every file. Raises
    `FleetError` when nothing is left.
    """
    files = []
    for each in siblings:
        name = str(each.rfilename)
        if include and not any(fnmatch.fnmatch(name, pattern) for pattern in include):
            continue
        if any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
            continue
        lfs = each.lfs
        files.append(
            HubFile(
                path=name,
                size=int(lfs.size if lfs else each.size),
                sha256=str(lfs.sha256) if lfs else "",
                git_oid="" if lfs else str(each.blob_id),
            )
        )
    if not files:
        raise FleetError(
            "No file of the model repository is wanted",
            expected="files that match model_include and not model_exclude",
            found=f"include {list(include)}, exclude {list(exclude)}",
            remedy="correct the patterns",
        )
    return sorted(files, key=lambda file: file.path)


def git_blob_id(path: Path) -> str:
    """Return the object id that git gives a file's content (SHA-1 with its header)."""
    content = path.read_bytes()
    header = f"blob {len(content)}\0".encode()
    # SHA-1 is what git uses; the hub gives nothing better for small files.
    return hashlib.sha1(header + content).hexdigest()  # noqa: S324


def find_corrupt(folder: Path, files: Iterable[HubFile], proven: Proven) -> dict[str, str]:
    """Compare files on disk with the hub's metadata; return {path: what is wrong}."""
    wrong = {}
    for file in files:
        path = folder / file.path
        if not path.is_file():
            wrong[file.path] = "missing"
        elif path.stat().st_size != file.size:
            wrong[file.path] = f"{path.stat().st_size} of {file.size} bytes"
        elif file.sha256 and proven.sha256(folder, file.path) != file.sha256:
            wrong[file.path] = "SHA-256 differs from the hub's"
        elif file.git_oid and git_blob_id(path) != file.git_oid:
            wrong[file.path] = "content differs from the hub's"
    return wrong


def model_slug(repository: str, revision: str) -> str:
    """Name a model artifact: ``<repository>-<first 7 of the commit>``, fit for a path."""
    name = re.sub(r"[^a-z0-9._+-]+", "-", repository.lower()).strip("-.")
    return f"{name}-{revision[:7]}"


def same_model(
    provenance: Mapping[str, Any],
    *,
    repository: str,
    revision: str,
    include: Sequence[str],
    exclude: Sequence[str],
) -> bool:
    """Tell whether a published artifact is the wanted model.

    A branch name counts as the commit it was when it was fetched: the weights of a fleet
    never change because somebody pushed to a branch.
    """
    return (
        provenance.get("repository") == repository
        and revision in (provenance.get("revision"), provenance.get("requested"))
        and list(provenance.get("include", [])) == list(include)
        and list(provenance.get("exclude", [])) == list(exclude)
    )


def missing_space(free: int, wanted: int, reserve: int) -> FleetError | None:
    """Return the error for a disk that cannot take ``wanted`` more bytes, or None."""
    if free - wanted >= reserve:
        return None
    needed, kept = (wanted + reserve) / 1e9, reserve / 1e9
    return FleetError(
        "The disk cannot take the model",
        expected=f"{needed:.1f} GB free ({kept:.1f} GB of it in reserve)",
        found=f"{free / 1e9:.1f} GB",
        remedy="free some space or put artifact_root on a larger disk, then run again",
    )
