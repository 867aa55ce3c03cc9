# SPDX-License-Identifier: Apache-2.0
"""The manifest: what an artifact is, and every file in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.decode import decode, read
from ..core.errors import FleetError
from ..core.paths import relative_path

MANIFEST = "manifest.json"
SCHEMA = "glm-fleet/artifact/1"
KINDS = ("release", "model")
_SLUG = re.compile(r"[a-z0-9][a-z0-9._+-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROOT = re.compile(r"([0-9a-f]{64})?")
_ID = re.compile(r"[a-z0-9][a-z0-9._+-]*-[0-9a-f]{12}")


@dataclass(frozen=True)
class FileEntry:
    """One file: POSIX path relative to the artifact, size in bytes, SHA-256 in hex.

    ``root`` is that of its hash tree (`merkle`) in hex: it says which torrent is the file's. A
    manifest of an earlier version, and one that was planned before the bytes were here, lack it.
    """

    path: str
    size: int
    sha256: str
    root: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        relative_path(self.path, "The manifest of an artifact")
        if self.size < 0 or not _SHA256.fullmatch(self.sha256) or not _ROOT.fullmatch(self.root):
            raise FleetError(
                "The manifest of an artifact describes a file that cannot be",
                expected="a size of 0 or more, a SHA-256 of 64 hex digits, a root of 64 or none",
                found=f"{self.path}: size {self.size}, SHA-256 {self.sha256[:80]!r}",
                remedy="remove the artifact and distribute it again",
            )


@dataclass(frozen=True)
class Manifest:
    """What an artifact is made of and where it came from."""

    kind: str
    id: str
    files: tuple[FileEntry, ...]
    provenance: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all files together, in bytes, without the manifest."""
        return sum(entry.size for entry in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest as it stands in ``manifest.json``."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "id": self.id,
            "files": [
                {name: value for name, value in vars(entry).items() if value != ""}
                for entry in self.files
            ],
            "provenance": dict(self.provenance),
        }

    def as_json(self) -> str:
        """Return the bytes of ``manifest.json``: sorted, the same for the same content."""
        return json.dumps(self.as_dict(), indent=1, sort_keys=True) + "\n"


def artifact_id(slug: str, files: Iterable[FileEntry]) -> str:
    """Name an artifact by its content: ``<slug>-<first 12 hex digits of the digest>``."""
    if not _SLUG.fullmatch(slug):
        raise FleetError(
            "The name of an artifact cannot be used in a path",
            expected="lower-case letters, digits and . _ + -",
            found=repr(slug),
        )
    digest = hashlib.sha256()
    for entry in sorted(files, key=lambda each: each.path):
        digest.update(f"{entry.path}\0{entry.size}\0{entry.sha256}\n".encode())
    return f"{slug}-{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class _Head:
    schema: str
    kind: str


def parse_manifest(data: Any) -> Manifest:
    """Read a manifest and refuse one that is damaged, of another schema, or leaves its folder."""
    what, remedy = "The manifest of an artifact", "remove the artifact and distribute it again"
    # Another version may have written the rest in its own way: that is said first.
    head = decode(_Head, data, what=what, remedy=remedy)
    if head.schema != SCHEMA or head.kind not in KINDS:
        raise FleetError(
            "The manifest is of a kind this version does not know",
            expected=f"schema {SCHEMA}, kind {' or '.join(KINDS)}",
            found=f"schema {head.schema}, kind {head.kind}",
            remedy="use the version of glm-fleet that made it",
        )
    manifest = decode(Manifest, data, what=what, remedy=remedy)
    files = manifest.files
    _check_names(files)
    slug = manifest.id.rpartition("-")[0]
    if not _ID.fullmatch(manifest.id) or artifact_id(slug, files) != manifest.id:
        raise FleetError(
            "The manifest does not belong to its id",
            expected=f"the digest of its file list in {manifest.id}",
            found="another digest: the manifest was changed after it was made",
            remedy="remove the artifact and distribute it again",
        )
    return manifest


def _check_names(files: Sequence[FileEntry]) -> None:
    """Refuse names that cannot be files beside each other: twice the same, or one in another."""
    names = {entry.path for entry in files}
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    clash = sorted(names & folders)
    if clash or len(names) != len(files):
        raise FleetError(
            "The manifest names a file twice, or a file inside another one",
            expected="each file once",
            found=", ".join(clash[:5]) or f"{len(files)} files of {len(names)} names",
            remedy="do not use this artifact: find out who made it",
        )


def load_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read ``manifest.json`` of a published artifact."""
    path = folder / name
    try:
        data = read(dict[str, Any], path)
    except (FileNotFoundError, FleetError) as error:
        raise FleetError(
            "The artifact has no readable manifest",
            expected=f"JSON in {path}",
            found=error.found if isinstance(error, FleetError) else str(error),
            remedy="remove the folder and distribute the artifact again",
        ) from error
    return parse_manifest(data)
