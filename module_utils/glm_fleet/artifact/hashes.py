# SPDX-License-Identifier: Apache-2.0
"""Hashing: a manifest made from a folder, and a folder compared with its manifest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, TypeVar

from ..core.decode import read
from ..core.errors import FleetError
from ..core.files import Advance, exclusive, sha256_file, write_atomically
from .manifest import MANIFEST, FileEntry, Manifest, artifact_id
from .merkle import hash_file

_Hashes = TypeVar("_Hashes")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Damage:
    """One file that is not what the manifest says: missing, truncated, changed or foreign."""

    path: str
    reason: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.found})"


class Proven:
    """Remembers the hashes of a file by its size, change time and inode.

    A run that is killed while hashing 440 GB goes on where it stopped, and a file that
    did not change is not read again. Nobody can set the change time of a file, so what is
    remembered also proves that a published file is still the one that was hashed. The memory
    lies beside the artifact, never in it. Several processes may add to one memory: what another
    has written is kept and seen.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # By name: size, change time in ns, inode, SHA-256, and the root of the tree if known.
        self._known = self._load()

    def known(self, folder: Path, name: str) -> str | None:
        """Return the SHA-256 of ``folder/name`` if it is proven, without reading the file."""
        entry = self._entry(folder, name)
        return str(entry[3]) if entry else None

    def root(self, folder: Path, name: str) -> str:
        """Return the root of the tree of ``folder/name`` in hex if it is proven, '' if not."""
        entry = self._entry(folder, name)
        return str(entry[4]) if entry and len(entry) > 4 else ""

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

    def tree(self, folder: Path, name: str, advance: Advance | None = None) -> tuple[str, str]:
        """Return SHA-256 and root of ``folder/name``, hashing it only when both are not proven."""
        path = folder / name
        known, root = self.known(folder, name), self.root(folder, name)
        if known and root:
            if advance:
                advance(path.stat().st_size)
            return known, root
        before = self._stamp(path)
        found = hash_file(path, advance=advance)
        if self._stamp(path) == before:
            self.record(folder, name, found.sha256, found.root.hex())
        return found.sha256, found.root.hex()

    def record(self, folder: Path, name: str, digest: str, root: str = "") -> None:
        """Remember the hashes of a file that was just read."""
        path = folder / name
        with path.open("rb") as stream:
            # After a power cut a file may have its size and time, but not its bytes.
            os.fsync(stream.fileno())
        entry = [*self._stamp(path), digest, *([root] if root else [])]
        with self._writing():
            self._known[name] = entry

    def add_root(self, folder: Path, name: str, root: str) -> None:
        """Remember the root of a file whose SHA-256 is proven."""
        entry = self._entry(folder, name)
        if entry:
            with self._writing():
                self._known[name] = [*entry[:4], root]

    @contextlib.contextmanager
    def through(self, folder: Path) -> Iterator[None]:
        """Keep what is proven through a change of owner or mode, which is no change of content."""
        valid = [name for name in self._known if self._entry(folder, name)]
        yield
        with self._writing():
            for name in valid:
                self._known[name][:3] = self._stamp(folder / name)

    def forget(self, name: str) -> None:
        """Drop what is known of a file."""
        if name in self._known:
            with self._writing():
                self._known.pop(name, None)

    def drop(self) -> None:
        """Forget everything."""
        self._known = {}
        self._path.unlink(missing_ok=True)

    def hand_over(self, other: Proven) -> None:
        """Let another memory know what this one knows, and forget it here."""
        if other._path == self._path:
            return
        with other._writing():
            other._known.update(self._known)
        self.drop()

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_ctime_ns, status.st_ino]

    def _entry(self, folder: Path, name: str) -> list[Any] | None:
        try:
            stamp = self._stamp(folder / name)
        except OSError:
            return None
        if self._remembered(name, stamp) is None:
            self._known = self._load()
        return self._remembered(name, stamp)

    def _remembered(self, name: str, stamp: list[int]) -> list[Any] | None:
        entry = self._known.get(name)
        return entry if entry and entry[:3] == stamp and len(entry) > 3 else None

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = read(dict[str, list[Any]], self._path)
        except (FileNotFoundError, FleetError):
            return {}
        return {name: each for name, each in known.items() if _is_proof(each)}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        # One lock for all memories of a folder: a lock file that is removed is no lock.
        with exclusive(self._path.parent / ".proven.lock"):
            self._known = self._load()
            yield
            write_atomically(self._path, json.dumps(self._known))


def _is_proof(entry: list[Any]) -> bool:
    """Tell whether it is size, change time, inode and one or two digests in hex."""
    stamp, digests = entry[:3], entry[3:]
    return (
        len(stamp) == 3
        and all(type(each) is int for each in stamp)
        and len(digests) in (1, 2)
        and all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in digests)
    )


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

    def one(name: str) -> tuple[str, str]:
        if proven is None:
            found = hash_file(folder / name, advance=advance)
            return found.sha256, found.root.hex()
        return proven.tree(folder, name, advance)

    hashes = _in_parallel(folder, names, one)
    files = tuple(FileEntry(name, (folder / name).stat().st_size, *hashes[name]) for name in names)
    return Manifest(kind, artifact_id(slug, files), files, dict(provenance))


def hash_files(
    folder: Path,
    names: Iterable[str],
    *,
    proven: Proven | None = None,
    advance: Advance | None = None,
) -> dict[str, str]:
    """Return {name: SHA-256} of files below ``folder``, or what ``proven`` remembers."""

    def one(name: str) -> str:
        if proven is None:
            return sha256_file(folder / name, advance)
        return proven.sha256(folder, name, advance)

    return _in_parallel(folder, names, one)


def _in_parallel(
    folder: Path, names: Iterable[str], one: Callable[[str], _Hashes]
) -> dict[str, _Hashes]:
    # The largest first, so that no core is left with a large one when the others are done.
    ordered = sorted(names, key=lambda name: -(folder / name).stat().st_size)
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
