# SPDX-License-Identifier: Apache-2.0
"""A model repository at one pinned commit: planned, fetched or adopted, and proven.

The hub's metadata gives size and SHA-256 of every large file, so that the manifest and with
it the id are known before the large files are there: small files are fetched to be hashed.
The client of huggingface_hub speaks the protocol; here is what makes it dependable. Its
download ends in a new file each time, and it can report success with a corrupt file of the
right size (huggingface_hub issue 3643): here a part is continued, and each file is compared
with the hub's metadata after it lies on the disk.
"""

from __future__ import annotations

import shutil
import threading
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, TypeVar

from ..artifact.manifest import FileEntry, Manifest, artifact_id
from ..artifact.store import Store
from ..core.errors import FleetError, from_os_error
from ..core.files import sha256_file
from ..core.progress import Meter
from .client import LONGEST_PAUSE_S, Client, Patience, UnreachableError
from .partfile import Part
from .pins import pin, pinned
from .refusal import UnavailableError
from .source import (
    KIND,
    HubFile,
    Source,
    check_commit,
    describe,
    git_blob_id,
    model_slug,
    select_files,
)

_Answer = TypeVar("_Answer")
# A fresh signature each time: what is refused so often is not refused by chance.
_MOST_REFUSALS = 4


class RefusedError(FleetError):
    """A storage host keeps one file back; others may come."""


@dataclass
class Fetcher:
    """Everything that fetching needs. A connection brings at least ``segment`` bytes of a file."""

    store: Store
    source: Source
    client: Client
    patience: Patience
    meter: Meter
    workers: int = 8
    segment: int = 64 * 1024 * 1024
    reserve: int = 0
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    _stop: threading.Event = field(default_factory=threading.Event)

    def plan(self) -> Manifest:
        """Return the manifest of what is wanted; the hub is asked only if nobody knows it yet.

        Fetches the small files, which have no SHA-256 in the hub's metadata.
        """
        commit = pinned(self.store, self.source)
        known = known_plan(self.store, self.source)
        if known:
            return known
        self.meter.what = "asking the hub"
        asked = commit or self.source.revision
        commit, listed = self._persist(
            lambda endpoint: self.client.describe(endpoint, self.source.repository, asked)
        )
        check_commit(asked, commit)
        files = select_files(listed, self.source)
        pin(self.store, self.source, commit)
        slug = model_slug(self.source.repository, commit)
        folder = self.store.staging_path(KIND, f"{slug}.plan")
        folder.mkdir(parents=True, exist_ok=True)
        small = [file for file in files if not file.sha256]
        self._check_space(folder, sum(file.size for file in small))
        self.meter.what = "reading the small files of the model"
        self._each(small, lambda file: self._fetch_small(folder, commit, file))
        entries = tuple(
            FileEntry(file.path, file.size, file.sha256 or sha256_file(folder / file.path))
            for file in files
        )
        manifest = Manifest(
            KIND, artifact_id(slug, entries), entries, describe(self.source, commit)
        )
        self.store.plan(manifest)
        wanted = {file.path for file in small}
        if not self.store.is_published(manifest):
            for entry in entries:
                if entry.path in wanted:
                    self.store.receive(manifest, entry, folder / entry.path)
        shutil.rmtree(folder)
        return manifest

    def fetch(self, manifest: Manifest, names: Collection[str] | None = None) -> None:
        """Bring the missing files of a manifest, all or these, into the staging folder.

        Each gets its name there when it is complete and proven. Raises `FleetError`; what
        arrived, also in part, stays for the next run.
        """
        if names is None:
            self.store.stage(manifest)
        self.meter.what = "verifying what is there"
        missing = self.store.missing(manifest, names=names)
        if not missing:
            return
        work = self.store.work_path(KIND, manifest.id)
        work.mkdir(parents=True, exist_ok=True)
        parts = {
            entry: Part(
                work / urllib.parse.quote(entry.path, safe=""),
                entry.size,
                max(1, min(self.workers, entry.size // self.segment)),
            )
            for entry in missing
        }
        have = sum(part.have for part in parts.values())
        total = sum(entry.size for entry in missing)
        self._check_space(work, total - have)
        self.meter.what = "fetching from the hub"
        self.meter.total = total
        self.meter.start(have)
        jobs = [(entry, number) for entry, part in parts.items() for number in range(len(part))]
        # {path: what is wrong}: the other files go on.
        corrupt: dict[str, str] = {}
        refused: dict[str, str] = {}

        def bring(job: tuple[FileEntry, int]) -> None:
            entry, number = job
            try:
                wrong = self._complete(manifest, entry, parts[entry], number)
            except RefusedError as error:
                refused[entry.path] = error.found
                return
            if wrong:
                corrupt[entry.path] = wrong

        try:
            self._each(jobs, bring)
        finally:
            for part in parts.values():
                if part.have and part.path.is_file():
                    part.note()
        if corrupt:
            raise _corrupt(corrupt)
        if refused:
            raise _refused(refused)

    def _complete(self, manifest: Manifest, entry: FileEntry, part: Part, number: int) -> str:
        """Bring a segment of a file; with the last one, prove the file, or say what is wrong."""
        self._bring(manifest, entry, part, number)
        if not part.close():
            return ""
        # An empty file comes without a block.
        part.path.touch()
        found = self.store.receive(manifest, entry, part.path)
        if found != entry.sha256:
            self._drop(part)
            for each in range(len(part)):
                self._bring(manifest, entry, part, each)
            found = self.store.receive(manifest, entry, part.path)
        if found == entry.sha256:
            part.discard()
            return ""
        self._drop(part)
        return f"SHA-256 {found[:12]}… instead of {entry.sha256[:12]}…"

    def _drop(self, part: Part) -> None:
        self.meter.add(-part.have)
        part.discard()

    def _bring(self, manifest: Manifest, entry: FileEntry, part: Part, number: int) -> None:
        commit = str(manifest.provenance["revision"])

        def take(block: bytes) -> None:
            self._advance(part.write(number, block))

        def attempt(endpoint: str) -> None:
            span = part.missing(number)
            if span:
                repository = self.source.repository
                self.client.download(endpoint, repository, commit, entry.path, span, take)
            if part.missing(number):
                raise UnavailableError(
                    f"{entry.path} ended after {part.have} of {entry.size} bytes"
                )

        self._persist(attempt, lambda: part.received(number))

    def _fetch_small(self, folder: Path, commit: str, file: HubFile) -> None:
        path = folder / file.path
        for _ in range(2):
            if path.is_file() and git_blob_id(path) == file.git_oid:
                return
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._persist(lambda endpoint: self._download(endpoint, commit, file, path))
        if git_blob_id(path) != file.git_oid:
            path.unlink()
            raise _corrupt({file.path: "another git object id"})

    def _download(self, endpoint: str, commit: str, file: HubFile, path: Path) -> None:
        """Bring a small file, from its beginning; one that does not end at its size is refused."""
        repository = self.source.repository
        with path.open("wb") as sink:

            def take(block: bytes) -> None:
                if sink.tell() + len(block) > file.size:
                    raise _corrupt({file.path: f"more than its {file.size} bytes"})
                sink.write(block)
                self._advance(len(block))

            self.client.download(endpoint, repository, commit, file.path, (0, None), take)

    def _each(self, items: Sequence[Any], work: Callable[[Any], None]) -> None:
        """Do it to all at once; the first error ends the others at their next block."""
        self._stop.clear()
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            futures = [pool.submit(work, item) for item in items]
            done, others = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception()]
            if failed:
                self._stop.set()
                for future in others:
                    future.cancel()
        for future in failed:
            future.result()

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise UnavailableError("another file could not be fetched")
        self.meter.add(count)

    def _persist(
        self,
        attempt: Callable[[str], _Answer],
        progress: Callable[[], int] = lambda: 0,
    ) -> _Answer:
        """Ask one endpoint after the other, again and again while patience lasts."""
        clock = self.patience.clock
        deadline = clock() + self.patience.seconds
        pause, before, refusals = 1.0, progress(), 0
        while True:
            problems: dict[str, UnavailableError] = {}
            denied: list[FleetError] = []
            for endpoint in self.source.endpoints:
                try:
                    return attempt(endpoint)
                except UnavailableError as problem:
                    problems[endpoint] = problem
                except FleetError as error:
                    # A mirror may have what another endpoint refuses.
                    denied.append(error)
                except OSError as error:
                    raise from_os_error(error) from error
            if not problems:
                raise denied[0]
            if progress() > before:
                before, pause, refusals = progress(), 1.0, 0
                deadline = clock() + self.patience.seconds
            if all(problem.refused for problem in problems.values()):
                refusals += 1
                if refusals == _MOST_REFUSALS:
                    listed = "; ".join(dict.fromkeys(str(each) for each in problems.values()))
                    raise RefusedError("A storage host refuses a file", found=listed)
            asked = max(problem.pause for problem in problems.values())
            if self._stop.is_set() or clock() + max(pause, asked) > deadline:
                raise _unavailable(self.source, problems, self.patience.seconds)
            (self.patience.sleep or self._stop.wait)(max(pause, asked))
            pause = min(pause * 2, LONGEST_PAUSE_S)

    def _check_space(self, folder: Path, wanted: int) -> None:
        short = missing_space(self.free(folder), wanted, self.reserve)
        if short:
            raise short


def published_model(store: Store, source: Source) -> Manifest | None:
    """Return the published model that is wanted, the one that was published last."""
    commit = pinned(store, source)
    found = [
        each
        for each in store.published(KIND)
        if same_model(each.provenance, source, commit) and store.is_published(each)
    ]
    ages = store.ages(KIND)
    return max(found, key=lambda each: ages[each.id]) if found else None


def known_plan(store: Store, source: Source) -> Manifest | None:
    """Return the manifest of what is wanted if this host has it, also of a damaged model."""
    commit = pinned(store, source)
    known = [published_model(store, source), *store.published(KIND), *store.plans(KIND)]
    return next(
        (each for each in known if each and same_model(each.provenance, source, commit)), None
    )


def same_model(provenance: Mapping[str, Any], source: Source, commit: str) -> bool:
    """Tell whether a model is the wanted one; ``commit`` is what the revision stands for."""
    revision = provenance.get("revision") if commit else provenance.get("requested")
    return (
        provenance.get("repository") == source.repository
        and revision == (commit or source.revision)
        and list(provenance.get("include", ())) == list(source.include)
        and list(provenance.get("exclude", ())) == list(source.exclude)
    )


def missing_space(free: int, wanted: int, reserve: int) -> FleetError | None:
    """Return the error for a disk that cannot take ``wanted`` more bytes, or None."""
    if wanted <= 0 or free - wanted >= reserve:
        return None
    needed, kept = (wanted + reserve) / 1e9, reserve / 1e9
    return FleetError(
        "The disk cannot take the model",
        expected=f"{needed:.1f} GB free ({kept:.1f} GB of it in reserve)",
        found=f"{free / 1e9:.1f} GB",
        remedy="free some space or put artifact_root on a larger disk, then run again",
    )


def _corrupt(files: Mapping[str, str]) -> FleetError:
    return FleetError(
        "The hub sends files that are not what its own metadata says",
        expected="the digest of the hub's metadata",
        found="; ".join(f"{name}: {reason}" for name, reason in sorted(files.items())),
        remedy="try again later or another endpoint; a proxy may change what passes",
    )


def _refused(files: Mapping[str, str]) -> FleetError:
    listed = "; ".join(dict.fromkeys(files[name] for name in sorted(files)))
    return FleetError(
        f"{len(files)} files of the model are kept back by the host that stores them",
        expected="the bytes of every file: the hub gave out the list and the addresses",
        found=listed,
        remedy="the token has nothing to do with it. Look at the fetcher's clock, proxy and "
        "firewall for that host, name a mirror in model_mirrors, then run again: what came is kept",
    )


def _unavailable(
    source: Source, problems: Mapping[str, UnavailableError], patience: float
) -> UnreachableError:
    quota = [each for each in problems.values() if each.quota]
    listed = "; ".join(f"{endpoint}: {problem}" for endpoint, problem in problems.items())
    if quota and len(quota) == len(problems):
        pause = max(each.pause for each in quota)
        return UnreachableError(
            "The hub refuses more requests for now",
            expected=f"an answer within {patience:g} s",
            found=listed + (f", it asks to wait {pause:g} s" if pause else ""),
            remedy="wait, or give a token; running again continues where this stopped",
        )
    return UnreachableError(
        f"No hub delivers {source.repository}",
        expected=f"an answer of {' or '.join(source.endpoints)} within {patience:g} s",
        found=listed,
        remedy="check network, model_endpoint, model_mirrors and model_proxy of the fetcher; "
        "running again continues where this stopped",
    )
