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

import errno
import fnmatch
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import threading
import time
import urllib.parse
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Protocol, TypeVar

from .artifact import (
    MANIFEST,
    Damage,
    FileEntry,
    Manifest,
    Store,
    artifact_id,
    load_manifest,
    sha256_file,
    write_atomically,
)
from .errors import FleetError, from_os_error
from .progress import Meter

KIND = "model"
INDEX = "model.safetensors.index.json"
# What the client leaves beside the files that it downloaded to a folder.
CLIENT_RECORDS = Path(".cache/huggingface/download")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1024 * 1024
_LONGEST_PAUSE_S = 30.0
_TIMEOUT_S = 30.0
_NOTE_S = 5.0
_Answer = TypeVar("_Answer")


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


class UnavailableError(Exception):
    """The hub does not answer now; it may later. ``pause`` is how long it asks to wait, in s."""

    def __init__(self, reason: str, *, quota: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.quota = quota
        self.pause = pause


class UnreachableError(FleetError):
    """No hub can be asked: none answers, or its client is not here."""


# First byte, and the one after the last or None for the end of the file.
Span = tuple[int, int | None]


class Client(Protocol):
    """What is asked of a hub. Raises `UnavailableError`, or `FleetError` when asking is in vain."""

    def describe(
        self, endpoint: str, repository: str, revision: str
    ) -> tuple[str, list[HubFile]]: ...

    def download(
        self,
        endpoint: str,
        repository: str,
        commit: str,
        name: str,
        span: Span,
        sink: Callable[[bytes], None],
    ) -> None: ...


@dataclass(frozen=True)
class Patience:
    """How long a hub is asked again that does not answer, in seconds without any progress."""

    seconds: float
    sleep: Callable[[float], object] | None = None
    clock: Callable[[], float] = time.monotonic


class Part:
    """A file on its way: its bytes on the disk, and how many of each segment are there.

    A large file comes over all connections at once, so that one file after the other is whole:
    what is whole travels on to the other nodes, where eight halves would keep them waiting.
    What a file in one segment has is its size; of several, a record beside it tells, which after
    a kill may be a moment behind.
    """

    def __init__(self, path: Path, size: int, count: int) -> None:
        self.path = path
        # In a quoted name a percent sign is followed by digits: no file of a model is called so.
        self._record = path.with_name(f"{path.name}%segments")
        self._lock = threading.Lock()
        self._noted: float | None = None
        there = path.stat().st_size if path.is_file() else 0
        if there > size:
            path.unlink()
            there = 0
        # Without a record, what is there is a beginning, left by a run with one connection.
        noted = _read_record(self._record) if there else None
        if noted is None:
            # One of a file that is gone says nothing of the next.
            self._record.unlink(missing_ok=True)
        segments = len(noted) if noted else count
        bounds = [size * number // segments for number in range(segments + 1)]
        self._spans = list(itertools.pairwise(bounds))
        self._have = [
            max(0, min(end, there, begin + some) - begin)
            for (begin, end), some in zip(self._spans, noted or [size] * segments)
        ]
        self._open = segments

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self._spans)

    @property
    def have(self) -> int:
        """Bytes that are there."""
        return sum(self._have)

    def received(self, number: int) -> int:
        """Return how many bytes of a segment are there."""
        return self._have[number]

    def missing(self, number: int) -> Span | None:
        """Return what is missing of a segment; None if nothing is."""
        begin, end = self._spans[number]
        position = begin + self._have[number]
        if position == end:
            return None
        return position, None if number == len(self) - 1 else end

    def write(self, number: int, block: bytes) -> int:
        """Take what follows in a segment, and return how much of it belongs there, in bytes."""
        begin, end = self._spans[number]
        position = begin + self._have[number]
        block = block[: end - position]
        self._note_in_time()
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
            file.seek(position)
            file.write(block)
        self._have[number] += len(block)
        return len(block)

    def _note_in_time(self) -> None:
        with self._lock:
            if self._noted is None:
                # Else what is written now would be taken for a beginning.
                self.note()
                return
            if time.monotonic() - self._noted < _NOTE_S:
                return
            self._noted = time.monotonic()
        # The disk may be busy: the other connections go on.
        self.note()

    def note(self) -> None:
        """Write down what is there of each segment."""
        self._noted = time.monotonic()
        if len(self) > 1:
            write_atomically(self._record, json.dumps(self._have))

    def close(self) -> bool:
        """Tell, for one segment after the other, whether it was the last."""
        with self._lock:
            self._open -= 1
            return not self._open

    def discard(self) -> None:
        """Take everything away that is there."""
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self._have = [0] * len(self)
        self._noted = None


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
        commit, listed = self._persist(
            lambda endpoint: self.client.describe(
                endpoint, self.source.repository, commit or self.source.revision
            )
        )
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
        corrupt: dict[str, str] = {}

        def bring(job: tuple[FileEntry, int]) -> None:
            entry, number = job
            part = parts[entry]
            self._bring(manifest, entry, part, number)
            if not part.close():
                return
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
            else:
                self._drop(part)
                corrupt[entry.path] = f"SHA-256 {found[:12]}… instead of {entry.sha256[:12]}…"

        jobs = [(entry, number) for entry, part in parts.items() for number in range(len(part))]
        try:
            self._each(jobs, bring)
        finally:
            for part in parts.values():
                if part.have and part.path.is_file():
                    part.note()
        if corrupt:
            raise _corrupt(corrupt)

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
            self._persist(lambda endpoint: self._download(endpoint, commit, file.path, path))
        if git_blob_id(path) != file.git_oid:
            path.unlink()
            raise _corrupt({file.path: "another git object id"})

    def _download(self, endpoint: str, commit: str, name: str, path: Path) -> None:
        """Bring a small file, from its beginning."""
        with path.open("wb") as sink:

            def take(block: bytes) -> None:
                sink.write(block)
                self._advance(len(block))

            self.client.download(endpoint, self.source.repository, commit, name, (0, None), take)

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
        pause, before = 1.0, progress()
        while True:
            problems: dict[str, UnavailableError] = {}
            for endpoint in self.source.endpoints:
                try:
                    return attempt(endpoint)
                except UnavailableError as problem:
                    problems[endpoint] = problem
                except OSError as error:
                    raise from_os_error(error) from error
            if progress() > before:
                before, pause = progress(), 1.0
                deadline = clock() + self.patience.seconds
            asked = max(problem.pause for problem in problems.values())
            if self._stop.is_set() or clock() + max(pause, asked) > deadline:
                raise _unavailable(self.source, problems, self.patience.seconds)
            (self.patience.sleep or self._stop.wait)(max(pause, asked))
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _check_space(self, folder: Path, wanted: int) -> None:
        short = missing_space(self.free(folder), wanted, self.reserve)
        if short:
            raise short


class HubClient:
    """The hub's own client. It has to be importable; its settings come from the environment."""

    def __init__(self, token: str) -> None:
        try:
            self._hub: Any = importlib.import_module("huggingface_hub")
            self._utils: Any = importlib.import_module("huggingface_hub.utils")
        except ImportError as missing:
            raise UnreachableError(
                "The client of the hub is missing on this host",
                expected="huggingface_hub importable",
                found=str(missing),
                remedy="run playbooks/model.yml, which brings it",
            ) from missing
        self._token: str | bool = token or False

    def describe(self, endpoint: str, repository: str, revision: str) -> tuple[str, list[HubFile]]:
        """Return the commit of a revision and all its files."""
        api = self._hub.HfApi(endpoint=endpoint, token=self._token)
        try:
            info = api.model_info(
                repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
            )
        except (self._transport_error(), OSError) as error:
            raise self._explain(error, endpoint, repository, revision) from error
        files = [
            HubFile(
                path=str(each.rfilename),
                size=int(each.lfs.size if each.lfs else each.size or 0),
                sha256=str(each.lfs.sha256) if each.lfs else "",
                git_oid="" if each.lfs else str(each.blob_id),
            )
            for each in info.siblings or ()
        ]
        return str(info.sha), files

    def download(
        self,
        endpoint: str,
        repository: str,
        commit: str,
        name: str,
        span: Span,
        sink: Callable[[bytes], None],
    ) -> None:
        """Hand over what is in a span of a file, block by block."""
        url = self._hub.hf_hub_url(repository, name, revision=commit, endpoint=endpoint)
        # Compressed on the way, a file could not be continued at an offset.
        headers = {**self._utils.build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
        session = self._utils.get_session()
        begin, end = span
        if span != (0, None):
            headers["Range"] = f"bytes={begin}-" + (str(end - 1) if end else "")
        try:
            with session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as answer:
                if answer.status_code == 416:
                    raise UnavailableError(f"{name} has become shorter")
                self._utils.hf_raise_for_status(answer)
                # A proxy that does not know of ranges sends what lies before as well.
                position = begin if answer.status_code == 206 else 0
                for block in answer.iter_raw(_BLOCK):
                    if end and position >= end:
                        break
                    fresh = block[max(0, begin - position) : end - position if end else None]
                    position += len(block)
                    if fresh:
                        sink(fresh)
        except self._transport_error() as error:
            raise self._explain(error, endpoint, repository, commit) from error

    def _transport_error(self) -> type[Exception]:
        # The client's transport has had several names; its errors share this base.
        base: type[Exception] = self._hub.errors.HfHubHTTPError.__bases__[0]
        return base

    def _explain(
        self, error: Exception, endpoint: str, repository: str, revision: str
    ) -> Exception:
        """Turn an error of the client into one that says whether asking again may help."""
        errors = self._hub.errors
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        # The order matters: a gated repository is also "not found" to the client.
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            return FleetError(
                f"The hub does not let us read {repository}",
                expected=f"access to {repository} on {endpoint}",
                found=f"HTTP {status or 'error'}: gated or private, "
                + ("and the token has no access" if self._token else "and no token was given"),
                remedy="accept its terms on the hub and give a token with access as model_token",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return FleetError(
                "The revision is not on the hub",
                expected=f"{revision} in {repository} on {endpoint}",
                found="the repository exists, the revision does not",
                remedy="correct model_revision; an owner who rewrote the history removes commits",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FleetError(
                "The model repository is not on the hub",
                expected=f"{repository} on {endpoint}",
                found="no such repository, or a private one and no token",
                remedy="correct model_repository, or give model_token",
            )
        if status == 429:
            pause = _asked_pause(response.headers if response is not None else {})
            return UnavailableError("HTTP 429: quota used up", quota=True, pause=pause)
        if status is not None and status < 500 and status != 408:
            return FleetError(
                f"The hub at {endpoint} refuses {repository}",
                expected="an answer with the file",
                found=f"HTTP {status}",
                remedy="correct model_endpoint and model_mirrors; a proxy may answer in its place",
            )
        reason = str(error).splitlines()[0] if str(error) else ""
        return UnavailableError(f"{type(error).__name__}: {reason}".rstrip(": "))


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
        "repository": source.repository,
        "revision": commit,
        "requested": source.revision,
        "endpoint": source.endpoints[0] if source.endpoints else "",
        "include": list(source.include),
        "exclude": list(source.exclude),
    }


def pinned(store: Store, source: Source) -> str:
    """Return the commit that a revision stands for on this host; empty if it was never asked.

    A branch is resolved once: the weights of a fleet never change because somebody pushed.
    """
    if is_commit(source.revision):
        return source.revision
    return str(_pins(store).get(f"{source.repository}@{source.revision}", ""))


def pin(store: Store, source: Source, commit: str) -> None:
    """Record the commit of a branch."""
    pins = _pins(store)
    name = f"{source.repository}@{source.revision}"
    if not is_commit(source.revision) and pins.get(name) != commit:
        store.root.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**pins, name: commit}, indent=1, sort_keys=True)
        write_atomically(_pins_path(store), text + "\n")


def find_published(store: Store, source: Source) -> Manifest | None:
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
    known = [find_published(store, source), *store.published(KIND), *store.plans(KIND)]
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


def folder_manifest(folder: Path, source: Source, given: Path | None, meter: Meter) -> Manifest:
    """Return what a folder should hold, told by what was brought with it.

    ``given`` or ``manifest.json`` in the folder is a manifest of ours, from another fleet;
    else the records that the hub's client leaves beside the files it downloads.
    """
    if given or (folder / MANIFEST).is_file():
        manifest = _given_manifest(given or folder / MANIFEST)
    else:
        manifest = _recorded_manifest(folder, source, meter)
    found = {key: manifest.provenance.get(key) for key in ("repository", "revision")}
    wanted = {"repository": source.repository, "revision": source.revision}
    if not is_commit(source.revision):
        wanted["revision"] = str(found["revision"])
    foreign = [entry.path for entry in manifest.files if not source.selects(entry.path)]
    if found != wanted or foreign:
        raise FleetError(
            "The folder holds another model",
            expected=f"{source.repository} at {source.revision}",
            found=f"{found['repository']} at {found['revision']}"
            + (f", with {', '.join(foreign[:3])}" if foreign else ""),
            remedy="correct model_folder, model_revision, or the patterns",
        )
    provenance = describe(source, wanted["revision"])
    return Manifest(KIND, manifest.id, manifest.files, {**provenance, "endpoint": ""})


def adopt(store: Store, manifest: Manifest, folder: Path, meter: Meter) -> list[Damage]:
    """Take the files of a manifest from a folder, by hard links where that is possible.

    Returns the files that are not there as they should be; the others are staged.
    """
    store.stage(manifest)
    missing = store.missing(manifest)
    work = store.work_path(KIND, manifest.id)
    work.mkdir(parents=True, exist_ok=True)
    meter.what = "verifying the folder"
    meter.total = sum(entry.size for entry in missing)
    meter.start(0)

    def take(entry: FileEntry) -> Damage | None:
        # The client's cache is made of symbolic links to the files.
        path = (folder / entry.path).resolve()
        if not path.is_file():
            return Damage(entry.path, "missing", "no such file")
        size = path.stat().st_size
        if size != entry.size:
            reason = "truncated" if size < entry.size else "changed"
            return Damage(entry.path, reason, f"{size} of {entry.size} bytes")
        part = work / f"{urllib.parse.quote(entry.path, safe='')}.adopted"
        _link_or_copy(path, part)
        digest = store.receive(manifest, entry, part, meter.add)
        if digest == entry.sha256:
            return None
        part.unlink()
        return Damage(entry.path, "changed", f"SHA-256 {digest[:12]}…")

    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return [each for each in pool.map(take, missing) if each]
    except OSError as error:
        raise from_os_error(error) from error


def damaged_folder(folder: Path, damage: Sequence[Damage]) -> FleetError:
    """Return the error for a folder that is not what it should be."""
    return FleetError(
        "The folder does not hold the model",
        expected=f"every file in {folder} with its SHA-256",
        found="; ".join(str(each) for each in damage[:10]),
        remedy="bring these files again, then run again: the others are kept",
        details={"damage": [vars(each) for each in damage]},
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


def _read_record(path: Path) -> list[int] | None:
    try:
        return [int(each) for each in json.loads(path.read_text())]
    except FileNotFoundError:
        return None


def _pins_path(store: Store) -> Path:
    return store.root / ".pins.json"


def _pins(store: Store) -> dict[str, Any]:
    path = _pins_path(store)
    try:
        pins = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        # Asking the hub again could move a fleet to other weights.
        raise FleetError(
            "It cannot be told which commits the branches stand for",
            expected=f"JSON in {path}",
            found=str(error),
            remedy="name a commit as model_revision, and remove that file",
        ) from error
    return dict(pins)


def _given_manifest(path: Path) -> Manifest:
    try:
        return load_manifest(path.parent, path.name)
    except FleetError as error:
        raise FleetError(
            "The manifest that came with the model cannot be used",
            expected=f"a manifest.json of glm-fleet in {path}",
            found=error.found or error.message,
            remedy="bring the manifest.json of a published model, or remove it",
        ) from error


def _recorded_manifest(folder: Path, source: Source, meter: Meter) -> Manifest:
    """Make a manifest of the client's records: commit and digest of each file, line by line."""
    records = {}
    base = folder / CLIENT_RECORDS
    for path in sorted(base.rglob("*.metadata")):
        name = path.relative_to(base).as_posix()[: -len(".metadata")]
        lines = path.read_text().split()
        if source.selects(name) and len(lines) >= 2:
            records[name] = (lines[0], lines[1])
    commits = {commit for commit, _ in records.values()}
    if len(commits) != 1:
        raise FleetError(
            "Nothing tells what the folder should hold",
            expected=f"an answer of the hub, {MANIFEST}, or the client's records of one commit "
            f"in {base}",
            found=f"records of {len(commits)} commits" if commits else "none of them",
            remedy="bring the folder as `hf download --local-dir` leaves it, with its .cache, or "
            "set model_manifest",
        )
    (commit,) = commits
    meter.what = "reading the records of the folder"
    files = []
    wrong = []
    for name, (_, digest) in records.items():
        path = folder / name
        if not path.is_file():
            wrong.append(Damage(name, "missing", "no such file"))
        elif _SHA256.fullmatch(digest):
            files.append(FileEntry(name, path.stat().st_size, digest))
        elif git_blob_id(path) == digest:
            files.append(FileEntry(name, path.stat().st_size, sha256_file(path)))
        else:
            wrong.append(Damage(name, "changed", "another git object id"))
    known = {file.path for file in files}
    index = folder / INDEX
    shards = json.loads(index.read_text())["weight_map"].values() if INDEX in known else ()
    wrong += [
        Damage(name, "missing", f"named by {INDEX}")
        for name in sorted(set(shards) - set(records))
        if source.selects(name)
    ]
    if wrong:
        raise damaged_folder(folder, wrong)
    slug = model_slug(source.repository, commit)
    provenance = describe(source, commit)
    return Manifest(KIND, artifact_id(slug, files), tuple(files), provenance)


def _link_or_copy(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(path, target)


def _corrupt(files: Mapping[str, str]) -> FleetError:
    return FleetError(
        "The hub sends files that are not what its own metadata says",
        expected="the digest of the hub's metadata",
        found="; ".join(f"{name}: {reason}" for name, reason in sorted(files.items())),
        remedy="try again later or another endpoint; a proxy may change what passes",
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


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Return how long a hub asks to wait, in seconds; 0 when it does not say."""
    asked = headers.get("retry-after", "")
    if asked.isdigit():
        return float(asked)
    window = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    return float(window.group(1)) if window else 0.0
