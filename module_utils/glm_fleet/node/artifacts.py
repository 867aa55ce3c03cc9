# SPDX-License-Identifier: Apache-2.0
"""The artifacts on a host, and whether they are whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ..artifact.hashes import find_damage
from ..artifact.manifest import load_manifest
from ..artifact.retention import protected_by
from ..core.decode import Count, read
from ..core.errors import FleetError


class _PublishedFile(TypedDict):
    size: Count


class _Published(TypedDict):
    kind: str
    id: str
    files: Sequence[_PublishedFile]
    provenance: Mapping[str, Any]


def read_link(path: Path) -> dict[str, Any]:
    """Return where a symbolic link leads: {path, target (or None), exists}."""
    target = str(path.readlink()) if path.is_symlink() else None
    return {"path": str(path), "target": target, "exists": path.exists()}


def read_damage(folder: Path) -> list[str]:
    """Name the files of a published artifact that are missing, foreign or of another size."""
    try:
        damage = find_damage(folder, load_manifest(folder), deep=False)
    except FleetError as error:
        return [f"manifest.json damaged ({error.message}: {error.found})"]
    return [str(each) for each in damage]


def read_artifacts(root: Path, keys: Sequence[str], errors: list[str]) -> list[dict[str, Any]]:
    """Return the published artifacts: {kind, id, bytes, published_at, damage, provenance}.

    ``published_at`` is in seconds since 1970, ``damage`` comes from sizes alone, one look a
    file, and of the provenance there are only the asked keys.

    A manifest that cannot be read is named in ``errors`` and its artifact left out.
    """
    found = []
    for path in sorted(root.glob("[!.]*/[!.]*/manifest.json")):
        try:
            manifest = read(_Published, path)
            provenance = manifest["provenance"]
            found.append(
                {
                    "kind": manifest["kind"],
                    "id": manifest["id"],
                    "bytes": sum(each["size"] for each in manifest["files"]),
                    "published_at": path.stat().st_mtime,
                    "damage": read_damage(path.parent),
                    "provenance": {key: provenance[key] for key in keys if key in provenance},
                }
            )
        except FleetError as error:
            errors.append(f"manifest {path}: expected {error.expected}, found {error.found}")
        except OSError as error:
            errors.append(f"manifest {path}: {error}")
    return found


def protected_ids(links: Sequence[Path], previous: Path) -> list[str]:
    return sorted(protected_by(links, previous))


def read_staging(staging: Path) -> dict[str, int]:
    """Return the bytes on disk of artifacts that are still on their way, by kind."""
    return {
        kind.name: sum(_disk_usage(path) for path in kind.rglob("*"))
        for kind in (staging.iterdir() if staging.is_dir() else ())
        if kind.is_dir()
    }


def _disk_usage(path: Path) -> int:
    """Return allocated bytes, because a preallocated file has a size and no content yet."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return min(status.st_size, status.st_blocks * 512)
