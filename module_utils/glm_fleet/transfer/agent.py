# SPDX-License-Identifier: Apache-2.0
"""The swarm's agent: a node takes an artifact from every other node, and gives it.

The agent runs on a node while an artifact is distributed and ends by itself. Whoever
distributes tells it through a socket which torrents there are, and asks what it made and
how far it has come; see `Agent.answer`. Everything it needs came over SSH: the manifest
decides what is genuine, the torrents what is fetched, the job who takes part.

    python3 -m glm_fleet.swarm agent < job.json      the agent (needs libtorrent)
    python3 -m glm_fleet.swarm ask < request.json    one question to it, one answer
"""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..artifact.manifest import MANIFEST, FileEntry
from ..artifact.store import Store
from ..core.errors import FleetError, from_os_error
from ..core.progress import Meter
from ..core.runner import Runner, run_program
from .session import WINDOW, Job, Travel, priorities, resolve, session_settings
from .torrent import Bundle, bundles, torrent_roots

# A controller that has not asked for this long is gone.
LEASE_S = 45.0
# An agent without a controller ends when no byte moved for this long.
IDLE_S = 60.0
_TICK_S = 0.2
_REST_S = 0.05
_SCAN_S = 2.0
_ATTEMPTS = 3
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
# With less than this free, and more than is free to come, the disk is as good as full.
_LEAST_FREE = 64 * 1024 * 1024
_Result = TypeVar("_Result")


class Agent:
    """Fetches what is missing, makes torrents of what is here, publishes what is complete."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        *,
        engine: Any,
        run: Runner = run_program,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._folder = folder
        self._lt = engine
        self._run = run
        self._clock = clock
        self._store = Store(job.root)
        self._manifest = job.manifest
        self._proven = self._store.proven(job.manifest.kind, job.manifest.id)
        self._news = threading.Condition()
        self._wake = threading.Event()
        self._pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1)))
        self._makers = max(1, (os.cpu_count() or 1) // 2)
        self._travels = {each.name: Travel(each) for each in bundles(job.manifest)}
        self._published = False
        self._publishing: Future[None] | None = None
        self._failure: FleetError | None = None
        self._notes: list[str] = []
        self._leases: dict[str, float] = {}
        self._left = False
        self._heals = 0
        self._moved_at = clock()
        self._scanned_at = -_SCAN_S
        self._traffic = (0, 0)
        self._meter = Meter("taking", job.manifest.bytes, clock=clock)
        self._addresses = {
            name: resolve(address) for name, address in job.peers.items() if address != job.address
        }
        self._own = resolve(job.address)
        self._open()
        self._session = self._open_session()

    # -- the engine

    def _open_session(self) -> Any:
        lt = self._lt
        settings = session_settings(
            self._own, self._job.port, self._job.rate_limit, len(self._addresses)
        )
        session = lt.session(settings)
        allowed = lt.ip_filter()
        allowed.add_rule("0.0.0.0", "255.255.255.255", 1)  # noqa: S104 - blocks all
        allowed.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 1)
        for address in self._addresses.values():
            allowed.add_rule(address, address, 0)
        session.set_ip_filter(allowed)
        return session

    def _view(self, folder: Path) -> None:
        """Point the name under which the engine finds the files at their folder of today.

        Publishing renames the folder; through this link the engine never notices.
        """
        link = self._folder / "view" / self._manifest.id
        link.parent.mkdir(mode=0o700, exist_ok=True)
        scratch = link.with_name("new")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(folder)
        scratch.replace(link)

    def _add(self, travel: Travel) -> None:
        lt = self._lt
        parameters = lt.add_torrent_params()
        parameters.ti = lt.torrent_info(lt.bdecode(travel.torrent))
        # A single file at the top is a torrent without a folder.
        entries = travel.bundle.entries
        alone = len(entries) == 1 and "/" not in entries[0].path
        view = self._folder / "view"
        parameters.save_path = str(view / self._manifest.id if alone else view)
        flags = parameters.flags & ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
        if travel.held:
            # Without upload_mode a hash that fails makes the engine fetch, over what is here.
            flags |= lt.torrent_flags.seed_mode | lt.torrent_flags.upload_mode
        parameters.flags = flags
        travel.handle = self._session.add_torrent(parameters)
        travel.moved, travel.done, travel.flushed = self._clock(), 0, False
        travel.takers = set()

    def _remove(self, travel: Travel) -> None:
        if travel.handle is not None:
            self._session.remove_torrent(travel.handle)
            travel.handle = None

    # -- what is here

    def _open(self) -> None:
        """Look at what is here. Whoever fetches into the staging folder goes on doing so."""
        store, manifest = self._store, self._manifest
        self._published = store.is_published(manifest)
        if not self._published:
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
        for travel in self._travels.values():
            travel.held = self._published
        self._view(self._home())

    def _home(self) -> Path:
        place = self._store.published_path if self._published else self._store.staging_path
        return place(self._manifest.kind, self._manifest.id)

    def _missing_bytes(self, staging: Path) -> int:
        """Bytes that the disk has to take yet. The blocks of a file that was begun are taken."""
        missing = 0
        for entry in self._manifest.files:
            path = staging / entry.path
            taken = path.stat().st_blocks * 512 if path.is_file() else 0
            missing += max(0, entry.size - taken)
        # What a fetcher has in part.
        work = self._store.work_path(self._manifest.kind, self._manifest.id)
        begun = [path.stat().st_blocks * 512 for path in work.glob("*") if path.is_file()]
        return max(0, missing - sum(begun))

    def _require_space(self, staging: Path) -> None:
        """Refuse what cannot fit."""
        missing, free = self._missing_bytes(staging), shutil.disk_usage(staging).free
        if missing > free:
            raise FleetError(
                f"The disk cannot take {self._manifest.id}",
                expected=f"{missing / 1e9:.2f} GB free in {self._job.root}",
                found=f"{free / 1e9:.2f} GB",
                remedy="free some space or put artifact_root on a larger disk, then run again",
            )

    def _scan(self) -> None:
        """Find what came by another way: staged before, fetched or pushed here."""
        final = self._store.published_path(self._manifest.kind, self._manifest.id)
        if (final / MANIFEST).is_file() and self._store.is_published(self._manifest):
            self._become_published()
            return
        staging = self._home()
        for travel in self._travels.values():
            if travel.held or travel.handle is not None or travel.check is not None:
                continue
            fresh = []
            for entry in travel.bundle.entries:
                stamp = _stamp(staging / entry.path)
                if stamp and stamp[0] == entry.size and travel.seen.get(entry.path) != stamp:
                    travel.seen[entry.path] = stamp
                    fresh.append(entry)
            if fresh:
                travel.check = self._start(self._verify, staging, fresh)

    def _verify(self, home: Path, entries: Iterable[FileEntry]) -> dict[str, bool]:
        """Our own word on files that look whole: {path: right}. Runs beside the loop."""
        found = {}
        for each in entries:
            try:
                found[each.path] = self._proven.sha256(home, each.path) == each.sha256
            except FileNotFoundError:
                found[each.path] = False
        return found

    def _become_published(self) -> None:
        self._published = True
        self._view(self._home())
        for travel in self._travels.values():
            travel.held = True
        self._news.notify_all()

    # -- one step

    def _start(self, work: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
        """Do something beside the loop, which looks at it as soon as it is done."""
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(lambda _: self._wake.set())
        return future

    def wait(self) -> None:
        """Wait until something happened, or for the next look around."""
        time.sleep(_REST_S)
        self._wake.wait(_TICK_S)
        self._wake.clear()

    def tick(self) -> None:
        """Do what can be done now."""
        with self._news:
            now = self._clock()
            look = now - self._scanned_at >= _SCAN_S
            if look:
                self._scanned_at = now
            if look and not self._published:
                self._scan()
                self._find_full_disk()
            for alert in self._session.pop_alerts():
                self._hear(alert)
            for travel in self._travels.values():
                if travel.check is not None and travel.check.done():
                    self._judge(travel)
                if travel.make is not None and travel.make.done():
                    self._take_torrent(travel)
                if look or not (travel.held and travel.handle):
                    self._move(travel, now)
            self._make_torrents()
            self._publish()
            self._measure(now)
            self._find_stall(now)

    def _judge(self, travel: Travel) -> None:
        """Take the word of our own verification."""
        assert travel.check is not None  # noqa: S101
        found, travel.check = travel.check.result(), None
        travel.right |= {path for path, good in found.items() if good}
        travel.right -= {path for path, good in found.items() if not good}
        if len(travel.right) == len(travel.bundle.entries):
            travel.held = True
            if travel.handle is not None:
                self._believe(travel)
            self._news.notify_all()
        elif travel.handle is not None:
            self._doubt(travel, [path for path, good in found.items() if not good])

    def _believe(self, travel: Travel) -> None:
        """The engine compared every piece with the torrent, and we every file with the manifest.

        So the torrent is right, and from here on nothing is written any more.
        """
        travel.proved = True
        for path, root in travel.roots.items():
            self._proven.add_root(self._home(), path, root)
        travel.handle.set_flags(self._lt.torrent_flags.upload_mode)

    def _is_proved(self, travel: Travel) -> bool:
        """Tell whether a torrent leads to the bytes that are here, from what was hashed before."""
        if not travel.proved and travel.torrent and travel.unsure:
            travel.unsure = False
            home = self._home()
            travel.proved = all(
                self._proven.known(home, entry.path) == entry.sha256
                and travel.roots[entry.path] == (entry.root or self._proven.root(home, entry.path))
                for entry in travel.bundle.entries
            )
        return travel.proved

    def _doubt(self, travel: Travel, wrong: Sequence[str]) -> None:
        """The engine takes a bundle for complete, and it is not what the manifest says."""
        self._remove(travel)
        travel.attempts += 1
        travel.right.clear()
        for path in wrong:
            self._proven.forget(path)
        self._note(f"{', '.join(wrong[:3])} changed on the disk: checked and fetched again")
        if travel.attempts >= _ATTEMPTS:
            for path in wrong:
                (self._home() / path).unlink(missing_ok=True)
            self._fail(
                FleetError(
                    f"The torrent of {', '.join(wrong[:3])} leads to other bytes",
                    expected="the SHA-256 of the manifest",
                    found=f"another one, {travel.attempts} times",
                    remedy="the file was removed here; look at the disk, then run again",
                )
            )

    def _move(self, travel: Travel, now: float) -> None:
        if travel.handle is None:
            idle = travel.check is None and travel.torrent and not self._failure
            ready = self._is_proved(travel) if travel.held else self._on_the_way() < WINDOW
            if idle and ready:
                self._add(travel)
            return
        status = travel.handle.status()
        if status.errc.value():
            self._on_engine_error(travel, status)
            return
        if travel.held:
            if not status.is_seeding and status.state not in self._checking():
                # Publishing moved the folder while the engine looked for the files, and it stopped
                # this torrent without an error; or the disk has lost bytes.
                self._remove(travel)
                self._question(travel)
            return
        done = int(status.total_wanted_done)
        # Checking what is there moves no bytes, and is no standstill.
        if done != travel.done or not status.has_metadata or status.state in self._checking():
            travel.done, travel.moved = done, now
        if status.is_seeding:
            if not travel.flushed:
                # What the engine holds in memory is not on the disk yet.
                travel.handle.flush_cache()
            elif travel.check is None:
                entries = travel.bundle.entries
                travel.check = self._start(self._verify, self._home(), entries)
            return
        peers = travel.handle.get_peer_info()
        self._divide(travel, peers)
        connected = {str(peer.ip[0]) for peer in peers}
        for address in self._addresses.values():
            if address not in connected:
                travel.handle.connect_peer((address, self._job.port))

    def _divide(self, travel: Travel, peers: Iterable[Any]) -> None:
        """Ask first for this node's part of what only a seed has, see `priorities`."""
        seed = self._lt.peer_info.seed
        takers = {self._own, *(str(peer.ip[0]) for peer in peers if not peer.flags & seed)}
        if takers != travel.takers:
            travel.takers = takers
            count = travel.handle.torrent_file().num_pieces()
            travel.handle.prioritize_pieces(priorities(count, takers, self._own))

    def _checking(self) -> tuple[Any, ...]:
        states = self._lt.torrent_status.states
        return (states.checking_files, states.checking_resume_data)

    def _on_the_way(self) -> int:
        return sum(each.handle is not None and not each.held for each in self._travels.values())

    def _on_engine_error(self, travel: Travel, status: Any) -> None:
        code, text = status.errc.value(), status.errc.message()
        if code in _DISK_ERRORS:
            self._fail_disk(OSError(code, f"{text}: {travel.paths}"))
        else:
            # A folder renamed under an open file, or the like: once more from the start.
            self._note(f"{travel.paths}: {text}: checked again")
        self._remove(travel)

    def _find_full_disk(self) -> None:
        """Stop before the disk is full: the engine does not tell of every write that fails."""
        home = self._home()
        free = shutil.disk_usage(home).free
        if free < _LEAST_FREE and any(each.handle for each in self._travels.values()):
            missing = self._missing_bytes(home)
            if missing > free:
                text = f"{free / 1e6:.0f} MB are free, {missing / 1e6:.0f} MB are missing: {home}"
                self._fail_disk(OSError(errno.ENOSPC, text))

    def _fail_disk(self, error: OSError) -> None:
        """Take no more from the others: what the disk loses would be given on to them."""
        for travel in self._travels.values():
            if not travel.held:
                self._remove(travel)
        self._fail(from_os_error(error))

    def _hear(self, alert: Any) -> None:
        kind = type(alert).__name__
        if kind == "listen_failed_alert":
            self._fail(
                FleetError(
                    "This node cannot listen for the other nodes",
                    expected=f"{self._job.address}:{self._job.port} to be its own and free",
                    found=alert.message(),
                    remedy="set artifact_address of this node, or another artifact_port",
                )
            )
        elif kind == "file_error_alert" and alert.error.value() in _DISK_ERRORS:
            self._fail_disk(OSError(alert.error.value(), alert.message()))
        elif kind == "peer_ban_alert":
            who = self._name_of(str(alert.endpoint[0]))
            self._note(f"{who} sent wrong bytes and is not listened to any more")
        elif kind == "hash_failed_alert":
            self._note("wrong bytes arrived and were thrown away")
        elif kind == "cache_flushed_alert":
            for travel in self._travels.values():
                if travel.handle is not None and travel.handle == alert.handle:
                    travel.flushed = True

    def _name_of(self, address: str) -> str:
        names = (name for name, each in self._addresses.items() if each == address)
        return next(names, address)

    # -- torrents of what is here

    def _make_torrents(self) -> None:
        """Have torrents made of what nobody made one of yet.

        Every host begins at another place, so that several that hold all share the work.
        """
        making = sum(each.make is not None for each in self._travels.values())
        names = list(self._travels)
        order = sorted([self._job.address, *self._addresses.values()])
        start = order.index(self._job.address) * len(names) // len(order)
        ordered = [*names[start:], *names[:start]]
        # Last what another host made a torrent of: it is only read to know that this one is right.
        for name in sorted(ordered, key=lambda each: bool(self._travels[each].torrent)):
            travel = self._travels[name]
            if making >= self._makers or self._failure:
                return
            if travel.held and travel.make is None and not self._is_proved(travel):
                travel.make = self._start(self._make_torrent, travel.bundle)
                making += 1

    def _make_torrent(self, bundle: Bundle) -> list[str]:
        """Write the torrent of a bundle; return the files that are not what they should be."""
        wanted = {
            "folder": str(self._folder / "view" / self._manifest.id),
            "name": self._manifest.id,
            "piece_length": bundle.piece_length,
            "entries": [vars(entry) for entry in bundle.entries],
            "target": str(self._target(bundle)),
        }
        folder = Path(str(wanted["folder"]))
        before = {entry.path: _stamp(folder / entry.path) for entry in bundle.entries}
        command = [sys.executable, "-B", "-m", "glm_fleet.transfer.torrent"]
        damaged: list[str] = json.loads(self._run(command, input_text=json.dumps(wanted)).stdout)
        if damaged:
            self._drop(damaged)
            return damaged
        roots = torrent_roots(self._target(bundle).read_bytes(), self._manifest.id, bundle)
        for entry in bundle.entries:
            if _stamp(folder / entry.path) == before[entry.path]:
                self._proven.record(folder, entry.path, entry.sha256, roots[entry.path])
        return []

    def _target(self, bundle: Bundle) -> Path:
        return self._folder / f"{bundle.name}.torrent"

    def _drop(self, damaged: Sequence[str]) -> None:
        """Remove damaged files; a published artifact that lost one is not published any more."""
        with self._store.lock(self._manifest.kind):
            for path in damaged:
                self._proven.forget(path)
                (self._home() / path).unlink(missing_ok=True)
            if self._published:
                staging = self._store.stage(self._manifest)
                self._view(staging)
                self._published = False

    def _take_torrent(self, travel: Travel) -> None:
        assert travel.make is not None  # noqa: S101
        make, travel.make = travel.make, None
        try:
            damaged = make.result()
        except FleetError as error:
            self._fail(error)
            return
        if damaged:
            self._lose(travel)
            self._note(
                f"{', '.join(damaged[:3])} was damaged on this node: removed, fetched from others"
            )
        else:
            own = self._target(travel.bundle).read_bytes()
            if travel.torrent not in (b"", own):
                self._note(f"the torrent that was brought of {travel.paths} leads to other bytes")
                self._remove(travel)
            travel.torrent, travel.proved = own, True
            travel.roots = torrent_roots(own, self._manifest.id, travel.bundle)
        self._news.notify_all()

    def _lose(self, travel: Travel) -> None:
        """Files of a bundle turned out to be damaged: it is here no more."""
        travel.held = travel.proved = False
        travel.right.clear()
        travel.seen.clear()
        self._remove(travel)

    def _question(self, travel: Travel) -> None:
        """Have the files of a published bundle hashed before they are given again."""
        if self._published:
            travel.proved = False
            for entry in travel.bundle.entries:
                self._proven.forget(entry.path)

    # -- the end

    def _publish(self) -> None:
        if self._publishing is not None:
            if not self._publishing.done():
                return
            publishing, self._publishing = self._publishing, None
            try:
                publishing.result()
            except FleetError as error:
                self._unhold(error)
            except OSError as error:
                self._fail(from_os_error(error))
            else:
                self._become_published()
            return
        # Publishing moves the folder, and for a moment no path leads to its files: whoever reads
        # them by name, as the making of a torrent does, has to be through.
        held = all(travel.held and travel.make is None for travel in self._travels.values())
        if held and not self._published and not self._failure:
            self._publishing = self._start(self._publish_now)

    def _publish_now(self) -> None:
        with self._store.lock(self._manifest.kind):
            staging = self._store.staging_path(self._manifest.kind, self._manifest.id)
            for entry in self._manifest.files:
                if not entry.size:
                    (staging / entry.path).parent.mkdir(parents=True, exist_ok=True)
                    (staging / entry.path).touch()
            final = self._store.publish(self._manifest)
            self._view(final)

    def _unhold(self, error: FleetError) -> None:
        """What publishing found damaged is fetched again."""
        damaged = {each["path"] for each in error.details.get("damage", ())}
        self._heals += 1
        if self._heals >= _ATTEMPTS or not damaged:
            self._fail(error)
            return
        for travel in self._travels.values():
            if damaged & {entry.path for entry in travel.bundle.entries}:
                self._lose(travel)
        self._note(f"{', '.join(sorted(damaged)[:3])} changed on the disk: fetched again")

    def _measure(self, now: float) -> None:
        with warnings.catch_warnings():
            # The engine has no other way to ask for this in one call.
            warnings.simplefilter("ignore", DeprecationWarning)
            status = self._session.status()
        traffic = (int(status.total_payload_download), int(status.total_payload_upload))
        if traffic != self._traffic:
            self._traffic, self._moved_at = traffic, now
        self._meter.set(self._done())

    def _done(self) -> int:
        return sum(
            travel.bundle.bytes if travel.held else travel.done for travel in self._travels.values()
        )

    def _find_stall(self, now: float) -> None:
        active = [each for each in self._travels.values() if each.handle and not each.held]
        if not active or self._failure:
            return
        if min(now - each.moved for each in active) > self._job.stall_timeout:
            self._fail(
                FleetError(
                    f"The distribution of {self._manifest.id} stands still on this node",
                    expected=f"bytes within {self._job.stall_timeout:.0f} s",
                    found="; ".join(self._explain(travel) for travel in active),
                    remedy="look at the nodes named, then run again: what arrived is kept",
                )
            )

    def _explain(self, travel: Travel) -> str:
        """Say why a bundle stands still: who is connected, who has what is missing."""
        pieces = travel.handle.status(self._lt.status_flags_t.query_pieces).pieces
        missing = [number for number, have in enumerate(pieces) if not have]
        peers = travel.handle.get_peer_info()
        text = f"{travel.paths}: {len(missing)} of {len(pieces)} pieces are missing"
        if not peers:
            who = ", ".join(self._addresses)
            return f"{text}; none of {who} can be reached on port {self._job.port}"
        holders = {
            self._name_of(str(peer.ip[0])): sum(peer.pieces[number] for number in missing)
            for peer in peers
        }
        if not any(holders.values()):
            return f"{text}; no node holds them any more (connected: {', '.join(sorted(holders))})"
        silent = ", ".join(sorted(name for name, count in holders.items() if count))
        return f"{text}; {silent} holds some and sends nothing"

    def _fail(self, error: FleetError) -> None:
        with self._news:
            self._failure = self._failure or error
            self._news.notify_all()

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    # -- the controller's questions

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Take what the controller brings, and say how far this node is.

        ``run`` names the controller, whose word keeps the agent alive, for ``lease`` seconds
        more than usual; ``torrents`` gives torrents by bundle (Base64); ``have`` names those
        it knows; ``arrived`` maps files it pushed to their paths; ``wait`` is how many seconds
        it waits for news; ``leave`` says that it is done with this agent.
        """
        for number, path in request.get("arrived", {}).items():
            self._take_in(number, path)
        with self._news:
            if "run" not in request:
                return self._state(())
            run = str(request["run"])
            for name, text in request.get("torrents", {}).items():
                travel = self._travels.get(name)
                if travel is not None and not travel.torrent:
                    self._take(travel, text)
            if request.get("leave"):
                self._leases.pop(run, None)
                self._left = True
                self._wake.set()
                return self._state(())
            self._leases[run] = self._clock() + LEASE_S + float(request.get("lease", 0))
            have = set(request.get("have", ()))
            before = self._standing()
            deadline = time.monotonic() + float(request.get("wait", 0))
            while not self._made() - have and self._standing() == before:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._news.wait(left)
            return self._state(self._made() - have)

    def _take(self, travel: Travel, text: str) -> None:
        """Take a torrent that another host made, if it follows from the manifest."""
        try:
            torrent = base64.b64decode(text, validate=True)
            roots = torrent_roots(torrent, self._manifest.id, travel.bundle)
        except (FleetError, ValueError) as error:
            self._note(f"{travel.paths}: {error}")
            return
        travel.torrent, travel.roots, travel.unsure = torrent, roots, True
        self._wake.set()

    def _take_in(self, number: str, path: str) -> None:
        """Give a file that was pushed its place, once it is verified."""
        staging = self._store.staging_path(self._manifest.kind, self._manifest.id)
        entry = next((each for each in self._manifest.files if each.path == path), None)
        source = staging.with_name(f"{staging.name}.incoming") / str(int(number))
        if self._published or entry is None or not source.is_file():
            return
        found = self._store.receive(self._manifest, entry, source)
        if found != entry.sha256:
            source.unlink()
            self._fail(
                FleetError(
                    f"The controller pushed other bytes for {path}",
                    expected=f"SHA-256 {entry.sha256}",
                    found=f"SHA-256 {found}",
                    remedy="remove the artifact on the controller, then run again: it is made anew",
                )
            )
        self._scanned_at = -_SCAN_S
        self._wake.set()

    def _made(self) -> set[str]:
        return {name for name, travel in self._travels.items() if travel.torrent}

    def _standing(self) -> str:
        if self._failure:
            return "failed"
        return "published" if self._published else "working"

    def _state(self, news: Iterable[str]) -> dict[str, Any]:
        travels = self._travels.values()
        lacking = [each for each in travels if not each.held]
        return {
            "artifact": self._manifest.id,
            "leases": len(self._leases),
            "standing": self._standing(),
            "failure": self._failure.as_fail() if self._failure else {},
            "notes": self._notes,
            "progress": vars(self._meter.read()),
            "received": self._traffic[0],
            "sent": self._traffic[1],
            "torrents": {
                name: base64.b64encode(self._travels[name].torrent).decode()
                for name in sorted(news)
            },
            # Bundles that only others can help with, and whether more may come from here.
            "unknown": [each.bundle.name for each in lacking if not each.torrent],
            "busy": any(each.check or each.make for each in travels)
            or any(each.held and not each.torrent for each in travels),
        }

    def ended(self) -> bool:
        """Tell whether nobody needs this agent any more."""
        with self._news:
            now = self._clock()
            self._leases = {run: end for run, end in self._leases.items() if end > now}
            if self._leases:
                return False
            working = any(each.check or each.make for each in self._travels.values())
            return self._left or (now - self._moved_at > IDLE_S and not working)

    def close(self) -> None:
        """Stop everything."""
        self._session.pause()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)
