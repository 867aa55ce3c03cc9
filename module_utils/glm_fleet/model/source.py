# SPDX-License-Identifier: Apache-2.0
"""What is wanted of a hub, and what it lists."""

from __future__ import annotations

import fnmatch
import hashlib
import ipaddress
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import FleetError
from ..core.format import human_bytes
from ..core.paths import relative_path

KIND = "model"
INDEX = "model.safetensors.index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Bytes. A shard of a model, and a file that the hub keeps in git itself (its limit is 10 MB).
LARGEST = 10**12
LARGEST_SMALL = 64 * 1024 * 1024
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """One file of the repository: path, size in bytes, and one of the two digests in hex.

    A hub said so: the path is shown to stay in its folder, and a file without a SHA-256, which is
    read whole, is small.
    """

    path: str
    size: int
    sha256: str
    git_oid: str

    def __post_init__(self) -> None:
        relative_path(self.path, "The hub")
        digest = SHA256.fullmatch(self.sha256) or (
            not self.sha256 and _COMMIT.fullmatch(self.git_oid)
        )
        if not digest or not 0 <= self.size <= (LARGEST if self.sha256 else LARGEST_SMALL):
            raise FleetError(
                "The hub describes a file that cannot be",
                expected=f"a SHA-256 and at most {human_bytes(LARGEST)}, or a git object id and "
                f"at most {human_bytes(LARGEST_SMALL)}",
                found=f"{self.path}: {self.size} bytes, SHA-256 {self.sha256[:80]!r}, object "
                f"{self.git_oid[:80]!r}",
                remedy="leave it out with model_exclude, or ask another endpoint",
            )


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


def check_commit(asked: str, answered: str) -> None:
    """Refuse a hub that answers with no commit, or with another one than it was asked for."""
    if not is_commit(answered) or (is_commit(asked) and answered != asked):
        raise FleetError(
            "The hub answers with another commit",
            expected=f"the commit {asked}" if is_commit(asked) else f"the commit of {asked}",
            found=ascii(answered[:80]),
            remedy="ask another endpoint; if this one is a mirror, find out who changed it",
        )


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


def carries_token(endpoint: str) -> bool:
    """Tell whether nobody on the way to an endpoint can read a token: https, or this host."""
    parts = urllib.parse.urlsplit(endpoint)
    try:
        local = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        local = parts.hostname == "localhost"
    return parts.scheme == "https" or local


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
