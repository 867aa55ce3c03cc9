# SPDX-License-Identifier: Apache-2.0
"""What is wanted of a hub, and what it lists."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import FleetError

KIND = "model"
INDEX = "model.safetensors.index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """One file of the repository: path, size in bytes, and one of the two digests in hex."""

    path: str
    size: int
    sha256: str
    git_oid: str


@dataclass(frozen=True)
class Source:
    """What is wanted and from where; the first of ``endpoints`` that can be reached is asked."""

    repository: str
    revision: str
    endpoints: tuple[str, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def selects(self, name: str) -> bool:
        """Tell whether a file belongs to what is wanted; no include pattern means every file."""
        if self.include and not any(fnmatch.fnmatch(name, each) for each in self.include):
            return False
        return not any(fnmatch.fnmatch(name, each) for each in self.exclude)


def is_commit(revision: str) -> bool:
    """Tell a full commit id from a branch or tag name."""
    return _COMMIT.fullmatch(revision) is not None


def check_endpoint(url: str) -> str:
    """Refuse a URL of a hub that cannot be one, or that holds a secret: it goes into reports."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc:
        return url.rstrip("/")
    hidden = f"{parts.scheme}://***" if "@" in url else url
    raise FleetError(
        "The URL of the hub is not one",
        expected="http(s)://host, without user and password",
        found=hidden,
        remedy="correct model_endpoint or model_mirrors; a token belongs into model_token",
    )


def select_files(listed: Iterable[HubFile], source: Source) -> list[HubFile]:
    """Pick the files that are wanted. Raises `FleetError` when nothing is left."""
    files = [file for file in listed if source.selects(file.path)]
    if not files:
        raise FleetError(
            "No file of the model repository is wanted",
            expected="files that match model_include and not model_exclude",
            found=f"include {list(source.include)}, exclude {list(source.exclude)}",
            remedy="correct the patterns",
        )
    return sorted(files, key=lambda file: file.path)


def git_blob_id(path: Path) -> str:
    """Return the object id that git gives a file's content (SHA-1 with its header)."""
    content = path.read_bytes()
    header = f"blob {len(content)}\0".encode()
    # SHA-1 is what git uses; the hub gives nothing better for small files.
    return hashlib.sha1(header + content).hexdigest()  # noqa: S324


def model_slug(repository: str, revision: str) -> str:
    """Name a model artifact: ``<repository>-<first 7 of the commit>``, fit for a path."""
    name = re.sub(r"[^a-z0-9._+-]+", "-", repository.lower()).strip("-.")
    return f"{name}-{revision[:7]}"


def describe(source: Source, commit: str) -> dict[str, Any]:
    """Return the provenance of a model."""
    return {
        "made_by": f"glm-fleet {__version__}",
        "repository": source.repository,
        "revision": commit,
        "requested": source.revision,
        "endpoint": source.endpoints[0] if source.endpoints else "",
        "include": list(source.include),
        "exclude": list(source.exclude),
    }
