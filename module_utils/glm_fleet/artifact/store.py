# SPDX-License-Identifier: Apache-2.0
"""The folder in which artifacts are staged, published and found."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

from ..core.errors import FleetError
from ..core.files import Advance, exclusive, sha256_file, write_atomically
from .hashes import Damage, Proven, file_stamp, find_damage, find_exposed, hash_files, make_manifest
from .manifest import MANIFEST, FileEntry, Manifest, load_manifest

# What lies untouched in the staging folder for so long belongs to no run.
_STALE_S = 86400


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
        # A disk that lost a byte did not change the file.
        self.proven(manifest.kind, manifest.id).drop()
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
                found.append(load_manifest(path.parent, path.name))
            except FleetError:
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
        sizes = {entry.path: file_stamp(folder / entry.path) for entry in asked}
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
        with proven.through(staging):
            _set_permissions(staging)
        write_atomically(staging / MANIFEST, manifest.as_json())
        self._take_away(manifest.kind, manifest.id)
        final.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(final)
        self._arrived(manifest.kind, manifest.id)
        return final

    def adopt(
        self, folder: Path, *, kind: str, slug: str, provenance: Mapping[str, Any]
    ) -> Manifest:
        """Make an artifact of a finished folder on this file system: it moves to its place.

        One that is there already stays, and only its provenance becomes that of this one.
        """
        proven = self.proven(kind, folder.name)
        manifest = make_manifest(folder, kind=kind, slug=slug, provenance=provenance, proven=proven)
        if self.is_published(manifest):
            shutil.rmtree(folder)
            proven.drop()
            path = self.published_path(kind, manifest.id) / MANIFEST
            if path.read_text() != manifest.as_json():
                write_atomically(path, manifest.as_json())
        else:
            final = self.published_path(kind, manifest.id)
            with proven.through(folder):
                _set_permissions(folder)
            write_atomically(folder / MANIFEST, manifest.as_json())
            # A damaged one may be in its place.
            self._take_away(kind, manifest.id)
            final.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(final)
            proven.hand_over(self.proven(kind, manifest.id))
        self._arrived(kind, manifest.id)
        return manifest

    def prove(self, manifest: Manifest, advance: Advance | None = None) -> list[Damage]:
        """Find what is wrong with a published artifact that is about to be used.

        Every file is hashed that is not the very one that was hashed before.
        """
        folder = self.published_path(manifest.kind, manifest.id)
        proven = self.proven(manifest.kind, manifest.id)
        damage = find_damage(folder, manifest, deep=True, proven=proven, advance=advance)
        return damage + find_exposed(folder, manifest)

    def require_proven(
        self, kind: str, identifier: str, advance: Advance | None = None
    ) -> Manifest:
        """Return the manifest of a published artifact that may be used, see `prove`.

        Raises `FleetError` that names what is damaged; the artifact then counts as not
        published, so that the next run mends it.
        """
        folder = self.published_path(kind, identifier)
        manifest = load_manifest(folder)
        if (manifest.kind, manifest.id) != (kind, identifier):
            raise FleetError(
                "The folder of an artifact holds another one",
                expected=f"the manifest of {kind} {identifier} in {folder}",
                found=f"that of {manifest.kind} {manifest.id}",
                remedy="remove the folder and distribute the artifact again",
            )
        damage = self.prove(manifest, advance)
        if damage:
            self.distrust(manifest)
            raise FleetError(
                f"The {kind} {identifier} has changed on this host, and nothing was made of it",
                expected="files with the SHA-256 of the manifest, which root alone can write",
                found="; ".join(str(each) for each in damage[:10]),
                remedy="find out what changed them; site.yml fetches the named files again",
                details={"damage": [vars(each) for each in damage]},
            )
        return manifest

    def retire(self, kind: str, identifier: str) -> bool:
        """Remove a published artifact; tell whether it was there."""
        there = self._take_away(kind, identifier)
        self.proven(kind, identifier).drop()
        return there

    def _take_away(self, kind: str, identifier: str) -> bool:
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
        proofs = {f"{each.id}.proven" for each in self.published(kind)}
        found = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            wanted = any(path.name.lstrip(".").startswith(each) for each in keep)
            if path.name.startswith(".") or wanted or path.name in proofs:
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
        """Forget what was only of use on the way. What was proven stays: see `prove`."""
        self._plan_path(kind, identifier).unlink(missing_ok=True)
        self._damaged(kind, identifier).unlink(missing_ok=True)
        shutil.rmtree(self.work_path(kind, identifier), ignore_errors=True)

    def _plan_path(self, kind: str, identifier: str) -> Path:
        return self.root / ".staging" / kind / f"{identifier}.plan.json"

    def _damaged(self, kind: str, identifier: str) -> Path:
        return self.root / ".staging" / kind / f"{identifier}.damaged"

    def _use_path(self, kind: str, identifier: str) -> Path:
        return self.root / ".staging" / kind / f".{identifier}.use"


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
            os.chown(path, 0, 0, follow_symlinks=False)
