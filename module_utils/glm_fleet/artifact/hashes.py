# SPDX-License-Identifier: Apache-2.0
"""Hashing: a manifest made from a folder, and a folder compared with its manifest."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from ..core.files import Advance, exclusive, sha256_file, write_atomically
from .manifest import MANIFEST, FileEntry, Manifest, artifact_id


@dataclass(frozen=True)
class Damage:
    """One file that is not what the manifest says: missing, truncated, changed or foreign."""

    path: str
    reason: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.found})"


class Proven:
    """Remembers the hash of a file by its size, mtime and inode.

    A run that is killed while hashing 440 GB goes on where it stopped, and a file that
    did not change is not read again. The memory lies beside the artifact, never in it.
    Several processes may add to one memory: what another has written is kept and seen.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()

    def known(self, folder: Path, name: str) -> str | None:
        """Return the SHA-256 of ``folder/name`` if it is proven, without reading the file."""
        try:
            stamp = self._stamp(folder / name)
        except OSError:
            return None
        if self._remembered(name, stamp) is None:
            self._known = self._load()
        return self._remembered(name, stamp)

    def sha256(self, folder: Path, name: str, advance: Advance | None = None) -> str:
        """Return the SHA-256 of ``folder/name``, hashing it only when it is not proven."""
        path = folder / name
        known = self.known(folder, name)
        if known:
            if advance:
                advance(path.stat().st_size)
            return known
        before = self._stamp(path)
        digest = sha256_file(path, advance)
        # A file that changed while it was read proves nothing.
        if self._stamp(path) == before:
            self.record(folder, name, digest)
        return digest

    def record(self, folder: Path, name: str, digest: str) -> None:
        """Remember the hash of a file that was just read."""
        path = folder / name
        with path.open("rb") as stream:
            # After a power cut a file may have its size and time, but not its bytes.
            os.fsync(stream.fileno())
        entry = [*self._stamp(path), digest]
        with self._writing():
            self._known[name] = entry

    def forget(self, name: str) -> None:
        """Drop what is known of a file."""
        if name in self._known:
            with self._writing():
                self._known.pop(name, None)

    def drop(self) -> None:
        """Forget everything: the artifact is published and will not change."""
        self._known = {}
        self._path.unlink(missing_ok=True)

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def _remembered(self, name: str, stamp: list[int]) -> str | None:
        entry = self._known.get(name)
        return str(entry[3]) if entry and entry[:3] == stamp else None

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        # One lock for all memories of a folder: a lock file that is removed is no lock.
        with exclusive(self._path.parent / ".proven.lock"):
            self._known = self._load()
            yield
            write_atomically(self._path, json.dumps(self._known))


def list_files(folder: Path) -> list[str]:
    """List the regular files below a folder as POSIX paths, without the manifest."""
    found = []
    for base, _, names in os.walk(folder):
        for name in names:
            path = Path(base, name)
            relative = path.relative_to(folder).as_posix()
            if relative != MANIFEST:
                found.append(relative)
    return sorted(found)


def make_manifest(
    folder: Path,
    *,
    kind: str,
    slug: str,
    provenance: Mapping[str, Any],
    proven: Proven | None = None,
    advance: Advance | None = None,
) -> Manifest:
    """Hash every file below ``folder`` and describe them as an artifact."""
    names = list_files(folder)
    if not names:
        raise FleetError(
            "There is nothing to make an artifact of",
            expected=f"files below {folder}",
            found="none",
        )
    links = [name for name in names if (folder / name).is_symlink()]
    if links:
        raise FleetError(
            "An artifact holds regular files only",
            expected="no symbolic links",
            found=", ".join(links[:5]),
            remedy="copy the files that the links point to",
        )
    hashes = hash_files(folder, names, proven=proven, advance=advance)
    files = tuple(FileEntry(name, (folder / name).stat().st_size, hashes[name]) for name in names)
    return Manifest(kind, artifact_id(slug, files), files, dict(provenance))


def hash_files(
    folder: Path,
    names: Iterable[str],
    *,
    proven: Proven | None = None,
    advance: Advance | None = None,
) -> dict[str, str]:
    """Return {name: SHA-256} of files below ``folder``, or what ``proven`` remembers."""
    # The largest first, so that no core is left with a large one when the others are done.
    ordered = sorted(names, key=lambda name: -(folder / name).stat().st_size)

    def one(name: str) -> str:
        if proven is None:
            return sha256_file(folder / name, advance)
        return proven.sha256(folder, name, advance)

    # Hashing leaves the interpreter lock, so threads use every core.
    with ThreadPoolExecutor(max(1, min(len(os.sched_getaffinity(0)), len(ordered)))) as pool:
        return dict(zip(ordered, pool.map(one, ordered)))


def find_damage(
    folder: Path,
    manifest: Manifest,
    *,
    deep: bool,
    proven: Proven | None = None,
    advance: Advance | None = None,
) -> list[Damage]:
    """Compare a folder with its manifest.

    Always: every file is there, has its size, and none is foreign (a stat per file).
    With ``deep`` every file is hashed too, or taken from ``proven``.
    """
    damage = []
    intact = []
    for entry in manifest.files:
        status = file_stamp(folder / entry.path)
        if status is None:
            damage.append(Damage(entry.path, "missing", "no such file"))
        elif status.st_size != entry.size:
            reason = "truncated" if status.st_size < entry.size else "changed"
            damage.append(Damage(entry.path, reason, f"{status.st_size} of {entry.size} bytes"))
        else:
            intact.append(entry)
    wanted = {entry.path for entry in manifest.files}
    damage += [
        Damage(name, "foreign", "not in the manifest")
        for name in (list_files(folder) if folder.is_dir() else [])
        if name not in wanted
    ]
    if deep:
        names = [entry.path for entry in intact]
        hashes = hash_files(folder, names, proven=proven, advance=advance)
        damage += [
            Damage(entry.path, "changed", f"SHA-256 {hashes[entry.path][:12]}…")
            for entry in intact
            if hashes[entry.path] != entry.sha256
        ]
    return damage


def find_exposed(folder: Path, manifest: Manifest) -> list[Damage]:
    """Name the files of a published artifact that others than root could change."""
    exposed = []
    for name in [MANIFEST, *(entry.path for entry in manifest.files)]:
        status = file_stamp(folder / name)
        if status is None:
            continue
        mode = stat.S_IMODE(status.st_mode)
        foreign = os.geteuid() == 0 and status.st_uid != 0
        if mode & 0o7133 or foreign:
            found = f"mode {mode:04o}, user {status.st_uid}"
            exposed.append(Damage(name, "open to changes", found))
    return exposed


def file_stamp(path: Path) -> os.stat_result | None:
    """Return the status of a regular file, None for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
