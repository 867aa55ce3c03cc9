# SPDX-License-Identifier: Apache-2.0
"""The artifact: an immutable folder, named by its content.

Everything that a node runs lives the same life: produced once, distributed, verified,
published by an atomic rename, activated by a symbolic link, retired. Layout below an
artifact root (``/srv/glm-fleet/artifacts`` on a node)::

    <kind>/<id>/manifest.json         published: complete and verified
    .staging/<kind>/<id>/             on its way; a file has its name here when it is complete
    .staging/<kind>/<id>.parts/       the beginnings of files that are being fetched
    .staging/<kind>/<id>.proven       what has been hashed already
    .staging/<kind>/<id>.plan.json    the manifest of what is on its way
    .staging/<kind>/<id>.damaged      published, but a full pass found damage in it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Callable

from .errors import FleetError

MANIFEST = "manifest.json"
SCHEMA = "glm-fleet/artifact/1"
KINDS = ("release", "model")
# Names the release and the model that a roll-back returns to: {"release": id, "model": id}.
PREVIOUS = "/etc/glm-fleet/previous.json"

# Told how many bytes were read, from any thread.
Advance = Callable[[int], None]

_BLOCK = 1024 * 1024
# What lies untouched in the staging folder for so long belongs to no run.
_STALE_S = 86400
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


def load_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read ``manifest.json`` of a published artifact."""
    path = folder / name
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


def sha256_file(path: Path, advance: Advance | None = None) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if advance:
                advance(count)
    return digest.hexdigest()


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
def exclusive(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock for as long as the block lasts, waiting for whoever has it.

    ``waiting`` is called when somebody has it.

    A controller that dies leaves its module at work on the node. The next run waits for
    that one instead of pulling the folder from under it. The kernel drops the lock with
    the process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
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
        status = _status(folder / entry.path)
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
        status = _status(folder / name)
        if status is None:
            continue
        mode = stat.S_IMODE(status.st_mode)
        foreign = os.geteuid() == 0 and status.st_uid != 0
        if mode & 0o7133 or foreign:
            found = f"mode {mode:04o}, user {status.st_uid}"
            exposed.append(Damage(name, "open to changes", found))
    return exposed


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a regular file, None for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def retirable(
    published: Mapping[str, float],
    *,
    keep: int,
    protected: Collection[str],
    coming: Collection[str],
) -> list[str]:
    """Return which artifacts of a kind may go, the oldest first.

    ``published`` is {id: time of publication}. ``keep`` stay, among them all that are
    ``protected`` and, also if they are not here yet, those that are ``coming``.
    """
    held = {each for each in protected if each in published} | set(coming)
    others = sorted(
        (each for each in published if each not in held), key=lambda each: (published[each], each)
    )
    return others[: max(0, len(others) - max(0, keep - len(held)))]


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

    def work_path(self, kind: str, identifier: str) -> Path:
        """Where the parts of files are gathered that are not complete yet."""
        return self.root / ".staging" / kind / f"{identifier}.parts"

    def proven(self, kind: str, name: str) -> Proven:
        """The memory of what was hashed in a staging folder."""
        return Proven(self.staging_path(kind, name).with_name(f"{name}.proven"))

    def lock(
        self, kind: str, waiting: Callable[[], None] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """The lock of everyone who changes artifacts of a kind on this host."""
        return exclusive(self.root / ".staging" / f"{kind}.lock", waiting)

    @contextlib.contextmanager
    def try_lock(self, kind: str) -> Iterator[bool]:
        """Take the same lock if it is free, and tell whether it was."""
        path = self.root / ".staging" / f"{kind}.lock"
        if not path.parent.is_dir():
            yield True
            return
        with path.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

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
        """Tell whether the artifact is published and sound, as far as a stat per file tells."""
        folder = self.published_path(manifest.kind, manifest.id)
        return (
            (folder / MANIFEST).is_file()
            and not self._damaged(manifest.kind, manifest.id).exists()
            and not find_damage(folder, manifest, deep=False)
            and not find_exposed(folder, manifest)
        )

    def verify(
        self, manifest: Manifest, *, deep: bool, advance: Advance | None = None
    ) -> list[Damage]:
        """Find what is wrong with a published artifact; with ``deep`` every byte is read."""
        folder = self.published_path(manifest.kind, manifest.id)
        damage = find_damage(folder, manifest, deep=deep, advance=advance)
        return damage + find_exposed(folder, manifest)

    def distrust(self, manifest: Manifest) -> bool:
        """Let a published artifact count as damaged, so that the next run mends it.

        Its files are then hashed, and what is not right is fetched again. Tells whether it
        was trusted before.
        """
        marker = self._damaged(manifest.kind, manifest.id)
        if marker.exists():
            return False
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, "")
        return True

    def plan(self, manifest: Manifest) -> None:
        """Remember the manifest of an artifact that is about to come."""
        path = self._plan_path(manifest.kind, manifest.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, manifest.as_json())

    def plans(self, kind: str) -> list[Manifest]:
        """All artifacts of a kind that are on their way to this host, sorted by id."""
        found = []
        for path in sorted((self.root / ".staging" / kind).glob("*.plan.json")):
            try:
                found.append(parse_manifest(json.loads(path.read_text())))
            except (OSError, ValueError, FleetError):
                continue
        return found

    def receive(
        self, manifest: Manifest, entry: FileEntry, path: Path, advance: Advance | None = None
    ) -> str:
        """Move a complete file into the staging folder if it is right; return its SHA-256.

        ``path`` has to be on the same file system. A file that is wrong stays where it is.
        """
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        digest = sha256_file(path, advance)
        if digest == entry.sha256:
            staging = self.staging_path(manifest.kind, manifest.id)
            target = staging / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            self.proven(manifest.kind, manifest.id).record(staging, entry.path, digest)
        return digest

    def missing(
        self,
        manifest: Manifest,
        *,
        names: Collection[str] | None = None,
        advance: Advance | None = None,
    ) -> list[FileEntry]:
        """The files that still have to come to this host, largest first; [] when published.

        ``names`` asks for these files only.
        """
        if self.is_published(manifest):
            return []
        folder = self.published_path(manifest.kind, manifest.id)
        if not folder.is_dir():
            folder = self.staging_path(manifest.kind, manifest.id)
        asked = [each for each in manifest.files if names is None or each.path in names]
        sizes = {entry.path: _status(folder / entry.path) for entry in asked}
        there = [
            entry.path
            for entry in asked
            if (status := sizes[entry.path]) and status.st_size == entry.size
        ]
        proven = self.proven(manifest.kind, manifest.id)
        hashes = hash_files(folder, there, proven=proven, advance=advance)
        wanted = [each for each in asked if hashes.get(each.path) != each.sha256]
        return sorted(wanted, key=lambda entry: (-entry.size, entry.path))

    def stage(self, manifest: Manifest) -> Path:
        """Open the staging folder of an artifact and drop what does not belong there."""
        staging = self.staging_path(manifest.kind, manifest.id)
        self._take_back(manifest)
        staging.mkdir(parents=True, exist_ok=True)
        for damage in find_damage(staging, manifest, deep=False):
            if damage.reason in ("foreign", "changed"):
                (staging / damage.path).unlink()
        return staging

    def publish(self, manifest: Manifest, advance: Advance | None = None) -> Path:
        """Verify the staging folder byte for byte and make it visible at once.

        Raises `FleetError` naming every damaged file; then nothing is published, and
        the intact files stay for the next run.
        """
        final = self.published_path(manifest.kind, manifest.id)
        if self.is_published(manifest):
            return final
        self._take_back(manifest)
        staging = self.staging_path(manifest.kind, manifest.id)
        proven = self.proven(manifest.kind, manifest.id)
        damage = find_damage(staging, manifest, deep=True, proven=proven, advance=advance)
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
        self._arrived(manifest.kind, manifest.id)
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
        self._arrived(kind, manifest.id)
        return manifest

    def retire(self, kind: str, identifier: str) -> bool:
        """Remove a published artifact; tell whether it was there."""
        final = self.published_path(kind, identifier)
        if not final.is_dir():
            return False
        # Renamed first, so that a removal that is killed leaves nothing half visible.
        doomed = self.root / ".staging" / kind / f"{identifier}.retired"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        if doomed.exists():
            shutil.rmtree(doomed)
        final.rename(doomed)
        shutil.rmtree(doomed)
        return True

    @contextlib.contextmanager
    def using(self, kind: str, identifier: str) -> Iterator[None]:
        """Keep an artifact from being retired for as long as the block lasts."""
        path = self._use_path(kind, identifier)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    def in_use(self, kind: str, identifier: str) -> bool:
        """Tell whether another process is inside `using`."""
        try:
            with self._use_path(kind, identifier).open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def ages(self, kind: str) -> dict[str, float]:
        """Return {id: when it was published, in seconds since 1970}."""
        folders = {each.id: self.published_path(kind, each.id) for each in self.published(kind)}
        return {each: (path / MANIFEST).stat().st_mtime for each, path in folders.items()}

    def stale(self, kind: str, keep: Collection[str], now: float) -> list[Path]:
        """Return what lies in the staging folder and belongs to no artifact that is coming."""
        folder = self.root / ".staging" / kind
        found = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            wanted = any(path.name.lstrip(".").startswith(each) for each in keep)
            if path.name.startswith(".") or wanted:
                continue
            retired = path.name.endswith(".retired")
            if retired or now - _last_change(path) > _STALE_S:
                found.append(path)
        return found

    def _take_back(self, manifest: Manifest) -> None:
        """Move a published folder that was damaged back to staging: what is intact stays."""
        staging = self.staging_path(manifest.kind, manifest.id)
        final = self.published_path(manifest.kind, manifest.id)
        if final.is_dir() and not staging.exists() and not self.is_published(manifest):
            staging.parent.mkdir(parents=True, exist_ok=True)
            self.plan(manifest)
            final.rename(staging)
            (staging / MANIFEST).unlink(missing_ok=True)

    def _arrived(self, kind: str, identifier: str) -> None:
        """Forget what was only of use on the way."""
        self.proven(kind, identifier).drop()
        self._plan_path(kind, identifier).unlink(missing_ok=True)
        self._damaged(kind, identifier).unlink(missing_ok=True)
        shutil.rmtree(self.work_path(kind, identifier), ignore_errors=True)

    def _plan_path(self, kind: str, identifier: str) -> Path:
        return self.root / ".staging" / kind / f"{identifier}.plan.json"

    def _damaged(self, kind: str, identifier: str) -> Path:
        return self.root / ".staging" / kind / f"{identifier}.damaged"

    def _use_path(self, kind: str, identifier: str) -> Path:
        return self.root / ".staging" / kind / f".{identifier}.use"


@dataclass(frozen=True)
class Retired:
    """What was retired, or would be: artifacts with kind, id and bytes, and whole folders."""

    artifacts: list[dict[str, Any]]
    folders: list[str]

    @property
    def bytes(self) -> int:
        """Size of the artifacts, in bytes."""
        return sum(int(each["bytes"]) for each in self.artifacts)


def retire_old(
    store: Store,
    kinds: Iterable[str],
    *,
    keep: int,
    protected: Collection[str],
    coming: Collection[str] = (),
    companions: Sequence[Path] = (),
    dry: bool,
    now: float | None = None,
) -> Retired:
    """Retire what is above ``keep`` of each kind, and what belonged to it.

    ``companions`` are folders whose subfolders bear the id of a release: environments and
    caches. ``dry`` only tells. What another process is changing or using is left alone.
    """
    if keep < 1:
        raise FleetError(
            "At least one artifact of each kind has to stay",
            expected="artifact_keep of 1 or more",
            found=str(keep),
        )
    artifacts: list[dict[str, Any]] = []
    doomed: list[Path] = []
    for kind in kinds:
        with store.try_lock(kind) as locked:
            if not locked:
                continue
            sizes = {each.id: each.bytes for each in store.published(kind)}
            safe = {*protected, *(each for each in sizes if store.in_use(kind, each))}
            going = retirable(store.ages(kind), keep=keep, protected=safe, coming=coming)
            artifacts += [{"kind": kind, "id": each, "bytes": sizes[each]} for each in going]
            leftovers = store.stale(kind, coming, time.time() if now is None else now)
            if kind == "release":
                leftovers += [
                    path
                    for folder, each in itertools.product(companions, going)
                    if (path := folder / each).is_dir()
                ]
            doomed += leftovers
            if dry:
                continue
            # The artifact goes last: killed in between, the next run finds all of it again.
            for path in leftovers:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            for each in going:
                store.retire(kind, each)
    return Retired(artifacts, [str(path) for path in doomed])


def protected_by(links: Iterable[Path], previous: Path) -> set[str]:
    """Return the ids that are active or that a roll-back needs.

    ``links`` lead to what is active; ``previous`` is a JSON file {release: id, model: id}.
    """
    found = {link.readlink().name for link in links if link.is_symlink()}
    try:
        before = json.loads(previous.read_text())
    except FileNotFoundError:
        return found
    except ValueError as error:
        raise FleetError(
            "It cannot be told what a roll-back needs, so nothing is retired",
            expected=f"JSON with release and model in {previous}",
            found=str(error),
            remedy="repair or remove that file",
        ) from error
    return found | {str(before[key]) for key in KINDS if before.get(key)}


def _last_change(path: Path) -> float:
    def changed(each: Path) -> float:
        try:
            return each.lstat().st_mtime
        except FileNotFoundError:
            return 0.0

    return max(map(changed, [path, *path.rglob("*")]))


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
