# SPDX-License-Identifier: Apache-2.0
"""The artifact: an immutable folder, named by its content.

Everything that a node runs lives the same life: produced once, distributed, verified,
published by an atomic rename, activated by a symbolic link, retired. Layout below an
artifact root (``/srv/glm-fleet/artifacts`` on a node)::

    <kind>/<id>/manifest.json     published: complete and verified
    .staging/<kind>/<id>/         on its way; nobody reads it
    .staging/<kind>/<id>.proven   what has been hashed already
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import FleetError

MANIFEST = "manifest.json"
SCHEMA = "glm-fleet/artifact/1"
KINDS = ("release", "model")

_BLOCK = 4 * 1024 * 1024
_SLUG = re.compile(r"[a-z0-9][a-z0-9._+-]*")
_ID = re.compile(r"[a-z0-9][a-z0-9._+-]*-[0-9a-f]{12}")


@dataclass(frozen=True)
class FileEntry:
    """One file: POSIX path relative to the artifact, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


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
            "files": [vars(entry) for entry in self.files],
            "provenance": dict(self.provenance),
        }

    def as_json(self) -> str:
        """Return the bytes of ``manifest.json``: sorted, the same for the same content."""
        return json.dumps(self.as_dict(), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Damage:
    """One file that is not what the manifest says: missing, truncated, changed or foreign."""

    path: str
    reason: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.found})"


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


def parse_manifest(data: Mapping[str, Any]) -> Manifest:
    """Read a manifest and refuse one that is damaged, of another schema, or leaves its folder."""
    try:
        files = tuple(
            FileEntry(str(each["path"]), int(each["size"]), str(each["sha256"]))
            for each in data["files"]
        )
        manifest = Manifest(str(data["kind"]), str(data["id"]), files, dict(data["provenance"]))
        schema = str(data["schema"])
    except (KeyError, TypeError, ValueError) as error:
        raise FleetError(
            "The manifest of an artifact cannot be read",
            expected="schema, kind, id, files (path, size, sha256) and provenance",
            found=f"{type(error).__name__}: {error}",
            remedy="remove the artifact and distribute it again",
        ) from error
    if schema != SCHEMA or manifest.kind not in KINDS:
        raise FleetError(
            "The manifest is of a kind this version does not know",
            expected=f"schema {SCHEMA}, kind {' or '.join(KINDS)}",
            found=f"schema {schema}, kind {manifest.kind}",
            remedy="use the version of glm-fleet that made it",
        )
    for entry in files:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or str(path) != entry.path:
            raise FleetError(
                "The manifest names a file outside the artifact",
                expected="relative paths without ..",
                found=repr(entry.path),
                remedy="do not use this artifact: find out who made it",
            )
    slug = manifest.id.rpartition("-")[0]
    if not _ID.fullmatch(manifest.id) or artifact_id(slug, files) != manifest.id:
        raise FleetError(
            "The manifest does not belong to its id",
            expected=f"the digest of its file list in {manifest.id}",
            found="another digest: the manifest was changed after it was made",
            remedy="remove the artifact and distribute it again",
        )
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` of a published artifact."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FleetError(
            "The artifact has no readable manifest",
            expected=f"JSON in {path}",
            found=str(error),
            remedy="remove the folder and distribute the artifact again",
        ) from error
    return parse_manifest(data)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Proven:
    """Remembers the hash of a file by its size, mtime and inode.

    A run that is killed while hashing 440 GB goes on where it stopped, and a file that
    did not change is not read again. The memory lies beside the artifact, never in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    @staticmethod
    def _stamp(stat: os.stat_result) -> list[int]:
        return [stat.st_size, stat.st_mtime_ns, stat.st_ino]

    def sha256(self, folder: Path, name: str) -> str:
        """Return the SHA-256 of ``folder/name``, hashing it only when it is not proven."""
        path = folder / name
        before = self._stamp(path.stat())
        known = self._known.get(name)
        if known and known[:3] == before:
            return str(known[3])
        digest = sha256_file(path)
        # A file that changed while it was read proves nothing.
        if self._stamp(path.stat()) == before:
            self._known[name] = [*before, digest]
            self._save()
        return digest

    def forget(self, name: str) -> None:
        """Drop what is known of a file."""
        if self._known.pop(name, None):
            self._save()

    def drop(self) -> None:
        """Forget everything: the artifact is published and will not change."""
        self._known = {}
        self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(dict(self._known)))


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a whole file or nothing: a reader sees the old or the new content."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with scratch.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.chmod(mode)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock for as long as the block lasts, waiting for whoever has it.

    A controller that dies leaves its module at work on the node. The next run waits for
    that one instead of pulling the folder from under it. The kernel drops the lock with
    the process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


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
    hashes = _hash_all(folder, names, proven)
    files = tuple(FileEntry(name, (folder / name).stat().st_size, hashes[name]) for name in names)
    return Manifest(kind, artifact_id(slug, files), files, dict(provenance))


def _hash_all(folder: Path, names: list[str], proven: Proven | None) -> dict[str, str]:
    # Hashing leaves the interpreter lock, so threads use every core.
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        if proven is None:
            hashes = pool.map(lambda name: sha256_file(folder / name), names)
        else:
            hashes = pool.map(lambda name: proven.sha256(folder, name), names)
        return dict(zip(names, hashes))


def find_damage(
    folder: Path, manifest: Manifest, *, deep: bool, proven: Proven | None = None
) -> list[Damage]:
    """Compare a folder with its manifest.

    Always: every file is there, has its size, and none is foreign (a stat per file).
    With ``deep`` every file is hashed too, or taken from ``proven``.
    """
    damage = []
    intact = []
    for entry in manifest.files:
        path = folder / entry.path
        if path.is_symlink() or not path.is_file():
            damage.append(Damage(entry.path, "missing", "no such file"))
        elif path.stat().st_size != entry.size:
            size = path.stat().st_size
            reason = "truncated" if size < entry.size else "changed"
            damage.append(Damage(entry.path, reason, f"{size} of {entry.size} bytes"))
        else:
            intact.append(entry)
    wanted = {entry.path for entry in manifest.files}
    damage += [
        Damage(name, "foreign", "not in the manifest")
        for name in (list_files(folder) if folder.is_dir() else [])
        if name not in wanted
    ]
    if deep:
        hashes = _hash_all(folder, [entry.path for entry in intact], proven)
        damage += [
            Damage(entry.path, "changed", f"SHA-256 {hashes[entry.path][:12]}…")
            for entry in intact
            if hashes[entry.path] != entry.sha256
        ]
    return damage


class Store:
    """The artifacts of one host, below one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def published_path(self, kind: str, identifier: str) -> Path:
        """Where an artifact lies once it is complete and verified."""
        return self.root / kind / identifier

    def staging_path(self, kind: str, name: str) -> Path:
        """Where an artifact is gathered, by its id or by a working name before it has one."""
        return self.root / ".staging" / kind / name

    def proven(self, kind: str, name: str) -> Proven:
        """The memory of what was hashed in a staging folder."""
        return Proven(self.staging_path(kind, name).with_name(f"{name}.proven"))

    def lock(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """The lock of everyone who changes artifacts of a kind on this host."""
        return exclusive(self.root / ".staging" / f"{kind}.lock")

    def published(self, kind: str) -> list[Manifest]:
        """All published artifacts of a kind whose manifest can be read, sorted by id."""
        found = []
        for path in sorted((self.root / kind).glob("*/" + MANIFEST)):
            try:
                found.append(load_manifest(path.parent))
            except FleetError:
                continue
        return found

    def is_published(self, manifest: Manifest) -> bool:
        """Tell whether the artifact is published and every file has its size."""
        folder = self.published_path(manifest.kind, manifest.id)
        return (folder / MANIFEST).is_file() and not find_damage(folder, manifest, deep=False)

    def missing(self, manifest: Manifest) -> list[FileEntry]:
        """The files that still have to come to this host, largest first; [] when published."""
        if self.is_published(manifest):
            return []
        folder = self.published_path(manifest.kind, manifest.id)
        if not folder.is_dir():
            folder = self.staging_path(manifest.kind, manifest.id)
        proven = self.proven(manifest.kind, manifest.id)
        wanted = []
        for entry in manifest.files:
            path = folder / entry.path
            complete = (
                path.is_file()
                and path.stat().st_size == entry.size
                and proven.sha256(folder, entry.path) == entry.sha256
            )
            if not complete:
                wanted.append(entry)
        return sorted(wanted, key=lambda entry: (-entry.size, entry.path))

    def stage(self, manifest: Manifest) -> Path:
        """Open the staging folder of an artifact and drop what does not belong there."""
        staging = self.staging_path(manifest.kind, manifest.id)
        final = self.published_path(manifest.kind, manifest.id)
        if final.is_dir() and not staging.exists() and not self.is_published(manifest):
            # A published folder that was damaged goes back: what is intact stays.
            staging.parent.mkdir(parents=True, exist_ok=True)
            final.rename(staging)
        staging.mkdir(parents=True, exist_ok=True)
        for damage in find_damage(staging, manifest, deep=False):
            if damage.reason in ("foreign", "changed"):
                (staging / damage.path).unlink()
        return staging

    def publish(self, manifest: Manifest) -> Path:
        """Verify the staging folder byte for byte and make it visible at once.

        Raises `FleetError` naming every damaged file; then nothing is published, and
        the intact files stay for the next run.
        """
        final = self.published_path(manifest.kind, manifest.id)
        if self.is_published(manifest):
            return final
        staging = self.staging_path(manifest.kind, manifest.id)
        proven = self.proven(manifest.kind, manifest.id)
        damage = find_damage(staging, manifest, deep=True, proven=proven)
        if damage:
            for each in damage:
                proven.forget(each.path)
                if each.reason in ("foreign", "changed"):
                    (staging / each.path).unlink(missing_ok=True)
            raise FleetError(
                f"The artifact {manifest.id} is not what its manifest says",
                expected=f"{len(manifest.files)} files with the SHA-256 of the manifest",
                found="; ".join(str(each) for each in damage[:10]),
                remedy="run again: only these files are fetched again",
                details={"damage": [vars(each) for each in damage]},
            )
        _set_permissions(staging)
        write_atomically(staging / MANIFEST, manifest.as_json())
        self.retire(manifest.kind, manifest.id)
        final.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(final)
        proven.drop()
        return final

    def adopt(
        self, folder: Path, *, kind: str, slug: str, provenance: Mapping[str, Any]
    ) -> Manifest:
        """Make an artifact of a finished folder on this file system: it moves to its place."""
        proven = self.proven(kind, folder.name)
        manifest = make_manifest(folder, kind=kind, slug=slug, provenance=provenance, proven=proven)
        if self.is_published(manifest):
            shutil.rmtree(folder)
        else:
            final = self.published_path(kind, manifest.id)
            _set_permissions(folder)
            write_atomically(folder / MANIFEST, manifest.as_json())
            # A damaged one may be in its place.
            self.retire(kind, manifest.id)
            final.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(final)
        proven.drop()
        return manifest

    def retire(self, kind: str, identifier: str) -> bool:
        """Remove a published artifact; tell whether it was there."""
        final = self.published_path(kind, identifier)
        if not final.is_dir():
            return False
        # Renamed first, so that a removal that is killed leaves nothing half visible.
        doomed = self.root / ".staging" / kind / f"{identifier}.retired"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        final.rename(doomed)
        shutil.rmtree(doomed)
        return True


def _set_permissions(folder: Path) -> None:
    """Read for all, write for root alone: the service only reads, under another user."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        if os.geteuid() == 0:
            os.chown(path, 0, 0)


def activate(link: Path, target: Path) -> bool:
    """Point a symbolic link at an artifact by one rename; tell whether it changed."""
    if not target.is_dir():
        raise FleetError(
            "An artifact that is not published cannot be activated",
            expected=f"the folder {target}",
            found="no such folder",
            remedy="distribute it first",
        )
    if link.is_symlink() and link.readlink() == target:
        return False
    if link.exists() and not link.is_symlink():
        raise FleetError(
            "The place of a symbolic link is taken",
            expected=f"{link} to be a symbolic link or absent",
            found="a file or folder that is none",
            remedy=f"move {link} away",
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    scratch.replace(link)
    return True
