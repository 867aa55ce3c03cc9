# SPDX-License-Identifier: Apache-2.0
"""The artifact on this node: where its files are, and whether they are what the manifest says."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..artifact.manifest import MANIFEST, FileEntry
from ..artifact.store import Store
from ..core.decode import parse
from ..core.errors import FleetError
from ..core.runner import Runner
from .session import Job, Travel
from .torrent import Bundle, torrent_roots

_LEAST_FREE = 64 * 1024 * 1024


class Holding:
    """Files of one artifact, in the staging folder until all are right, then published.

    ``folder`` is the agent's own: torrents lie there, and a link under which the engine finds the
    files wherever they are.
    """

    def __init__(self, job: Job, folder: Path, run: Runner) -> None:
        self.published = False
        self.store = Store(job.root)
        self.manifest = job.manifest
        self.proven = self.store.proven(job.manifest.kind, job.manifest.id)
        self.view = folder / "view" / job.manifest.id
        self._root = job.root
        self._folder = folder
        self._run = run

    def open(self) -> None:
        """Look at what is here. Whoever fetches into the staging folder goes on doing so."""
        store, manifest = self.store, self.manifest
        self.published = store.is_published(manifest)
        if not self.published:
            staging = store.staging_path(manifest.kind, manifest.id)
            store.plan(manifest)
            if not staging.is_dir():
                with store.lock(manifest.kind):
                    store.stage(manifest)
            for entry in manifest.files:
                path = staging / entry.path
                if path.is_file() and path.stat().st_size > entry.size:
                    path.unlink()
            self._require_space(staging)
        self.point_view(self.home)

    @property
    def home(self) -> Path:
        """Where the files are now."""
        place = self.store.published_path if self.published else self.store.staging_path
        return place(self.manifest.kind, self.manifest.id)

    def point_view(self, folder: Path) -> None:
        """Point the name under which the engine finds the files at their folder of today.

        Publishing renames the folder; through this link the engine never notices.
        """
        self.view.parent.mkdir(mode=0o700, exist_ok=True)
        scratch = self.view.with_name("new")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(folder)
        scratch.replace(self.view)

    def missing_bytes(self) -> int:
        """Bytes that the disk has to take yet. The blocks of a file that was begun are taken."""
        missing = 0
        for entry in self.manifest.files:
            path = self.home / entry.path
            taken = path.stat().st_blocks * 512 if path.is_file() else 0
            missing += max(0, entry.size - taken)
        # What a fetcher has in part.
        work = self.store.work_path(self.manifest.kind, self.manifest.id)
        begun = [path.stat().st_blocks * 512 for path in work.glob("*") if path.is_file()]
        return max(0, missing - sum(begun))

    def _require_space(self, staging: Path) -> None:
        missing, free = self.missing_bytes(), shutil.disk_usage(staging).free
        if missing > free:
            raise FleetError(
                f"The disk cannot take {self.manifest.id}",
                expected=f"{missing / 1e9:.2f} GB free in {self._root}",
                found=f"{free / 1e9:.2f} GB",
                remedy="free some space or put artifact_root on a larger disk, then run again",
            )

    def full_disk(self) -> OSError | None:
        """Return an error when the disk is as good as full: less is free than is to come."""
        free = shutil.disk_usage(self.home).free
        missing = self.missing_bytes() if free < _LEAST_FREE else 0
        if missing <= free:
            return None
        text = f"{free / 1e6:.0f} MB are free, {missing / 1e6:.0f} MB are missing: {self.home}"
        return OSError(errno.ENOSPC, text)

    def was_published(self) -> bool:
        """Tell whether somebody else published it meanwhile."""
        final = self.store.published_path(self.manifest.kind, self.manifest.id)
        return (final / MANIFEST).is_file() and self.store.is_published(self.manifest)

    def become_published(self) -> None:
        """Go on with the published folder."""
        self.published = True
        self.point_view(self.home)

    def verify(self, home: Path, entries: Iterable[FileEntry]) -> dict[str, bool]:
        """Our own word on files that look whole: {path: right}. Runs beside the loop."""
        found = {}
        for each in entries:
            try:
                found[each.path] = self.proven.sha256(home, each.path) == each.sha256
            except FileNotFoundError:
                found[each.path] = False
        return found

    def proves(self, travel: Travel) -> bool:
        """Tell whether a torrent leads to the bytes that are here, from what was hashed before."""
        if not travel.proved and travel.torrent and travel.unsure:
            travel.unsure = False
            travel.proved = all(
                self.proven.known(self.home, entry.path) == entry.sha256
                and travel.roots[entry.path]
                == (entry.root or self.proven.root(self.home, entry.path))
                for entry in travel.bundle.entries
            )
        return travel.proved

    def believe(self, travel: Travel) -> None:
        """Note that the torrent of a bundle leads to the bytes that are here.

        The engine compared every piece with the torrent, and we every file with the manifest.
        """
        travel.proved = True
        for path, root in travel.roots.items():
            self.proven.add_root(self.home, path, root)

    def question(self, travel: Travel) -> None:
        """Have the files of a published bundle hashed before they are given again."""
        if self.published:
            travel.proved = False
            for entry in travel.bundle.entries:
                self.proven.forget(entry.path)

    def torrent_path(self, bundle: Bundle) -> Path:
        """Where the torrent lies that is made here of a bundle."""
        return self._folder / f"{bundle.name}.torrent"

    def make_torrent(self, bundle: Bundle) -> list[str]:
        """Write the torrent of a bundle; return the files that are not what they should be."""
        target = self.torrent_path(bundle)
        wanted = {
            "folder": str(self.view),
            "name": self.manifest.id,
            "piece_length": bundle.piece_length,
            "entries": [vars(entry) for entry in bundle.entries],
            "target": str(target),
        }
        before = {entry.path: stamp_of(self.view / entry.path) for entry in bundle.entries}
        command = [sys.executable, "-B", "-m", "glm_fleet.transfer.torrent"]
        answer = self._run(command, input_text=json.dumps(wanted)).stdout
        damaged = parse(list[str], answer, what=f"What was said of the torrent {bundle.name}")
        if damaged:
            self._drop(damaged)
            return damaged
        roots = torrent_roots(target.read_bytes(), self.manifest.id, bundle)
        for entry in bundle.entries:
            if stamp_of(self.view / entry.path) == before[entry.path]:
                self.proven.record(self.view, entry.path, entry.sha256, roots[entry.path])
        return []

    def _drop(self, damaged: Sequence[str]) -> None:
        """Remove damaged files; a published artifact that lost one is not published any more."""
        with self.store.lock(self.manifest.kind):
            for path in damaged:
                self.proven.forget(path)
            try:
                for path in damaged:
                    (self.home / path).unlink(missing_ok=True)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                # It was known to be right when the agent began, which therefore only reads it.
                raise FleetError(
                    f"{', '.join(damaged[:3])} was damaged on this node",
                    expected="the SHA-256 of the manifest",
                    found="another one, in a file that was right when it was published",
                    remedy="look at the disk, then run again: it is fetched from others",
                ) from error
            if self.published:
                staging = self.store.stage(self.manifest)
                self.point_view(staging)
                self.published = False

    def publish(self) -> None:
        """Verify and publish what is staged. Runs beside the loop. Raises `FleetError`."""
        with self.store.lock(self.manifest.kind):
            staging = self.store.staging_path(self.manifest.kind, self.manifest.id)
            for entry in self.manifest.files:
                if not entry.size:
                    (staging / entry.path).parent.mkdir(parents=True, exist_ok=True)
                    (staging / entry.path).touch()
            self.point_view(self.store.publish(self.manifest))

    def take_in(self, number: int, path: str) -> FleetError | None:
        """Give a file that the controller pushed its place, once it is verified."""
        staging = self.store.staging_path(self.manifest.kind, self.manifest.id)
        entry = next((each for each in self.manifest.files if each.path == path), None)
        source = staging.with_name(f"{staging.name}.incoming") / str(number)
        if self.published or entry is None or not source.is_file():
            return None
        found = self.store.receive(self.manifest, entry, source)
        if found == entry.sha256:
            return None
        source.unlink()
        return FleetError(
            f"The controller pushed other bytes for {path}",
            expected=f"SHA-256 {entry.sha256}",
            found=f"SHA-256 {found}",
            remedy="remove the artifact on the controller, then run again: it is made anew",
        )


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Return size, time of change in ns and inode of a file, None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)
