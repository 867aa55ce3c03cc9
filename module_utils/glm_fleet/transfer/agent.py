# SPDX-License-Identifier: Apache-2.0
"""The swarm's agent: a node takes an artifact from every other node, and gives it.

The agent runs on a node while an artifact is distributed and ends by itself. Whoever
distributes tells it through a socket which torrents there are, and asks what it made and
how far it has come; see `Agent.answer`. Everything it needs came over SSH: the manifest
decides what is genuine, the torrents what is fetched, the job who takes part.
"""

from __future__ import annotations

import base64
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import FleetError, from_os_error
from ..core.progress import Meter
from ..core.runner import Runner, run_program
from .holding import Holding, stamp_of
from .session import WINDOW, Job, Travel, own_order
from .torrent import bundles, torrent_roots
from .wire import Wire

# A controller that has not asked for this long is gone.
LEASE_S = 45.0
# An agent without a controller ends when no byte moved for this long.
IDLE_S = 60.0
_TICK_S = 0.2
_REST_S = 0.05
_SCAN_S = 2.0
_ATTEMPTS = 3
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
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
        self._clock = clock
        self._here = Holding(job, folder, run)
        self._manifest = job.manifest
        self._news = threading.Condition()
        self._wake = threading.Event()
        self._pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1)))
        self._makers = max(1, (os.cpu_count() or 1) // 2)
        self._travels = {each.name: Travel(each) for each in bundles(job.manifest)}
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
        self._here.open()
        for travel in self._travels.values():
            travel.held = self._here.published
        self._wire = Wire(job, engine, self._here.view)

    # -- what is here

    def _scan(self) -> None:
        """Find what came by another way: staged before, fetched or pushed here."""
        if self._here.was_published():
            self._become_published()
            return
        staging = self._here.home
        for travel in self._travels.values():
            if travel.held or travel.handle is not None or travel.check is not None:
                continue
            fresh = []
            for entry in travel.bundle.entries:
                stamp = stamp_of(staging / entry.path)
                if stamp and stamp[0] == entry.size and travel.seen.get(entry.path) != stamp:
                    travel.seen[entry.path] = stamp
                    fresh.append(entry)
            if fresh:
                travel.check = self._start(self._here.verify, staging, fresh)

    def _become_published(self) -> None:
        self._here.become_published()
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
            if look and not self._here.published:
                self._scan()
                self._find_full_disk()
            for alert in self._wire.session.pop_alerts():
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
                self._here.believe(travel)
                self._wire.give_only(travel)
            self._news.notify_all()
        elif travel.handle is not None:
            self._doubt(travel, [path for path, good in found.items() if not good])

    def _doubt(self, travel: Travel, wrong: Sequence[str]) -> None:
        """The engine takes a bundle for complete, and it is not what the manifest says."""
        self._wire.remove(travel)
        travel.attempts += 1
        travel.right.clear()
        for path in wrong:
            self._here.proven.forget(path)
        self._note(f"{', '.join(wrong[:3])} changed on the disk: checked and fetched again")
        if travel.attempts >= _ATTEMPTS:
            for path in wrong:
                (self._here.home / path).unlink(missing_ok=True)
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
            ready = self._here.proves(travel) if travel.held else self._on_the_way() < WINDOW
            if idle and ready:
                self._wire.add(travel, now)
            return
        status = travel.handle.status()
        if status.errc.value():
            self._on_engine_error(travel, status)
            return
        if travel.held:
            if not status.is_seeding and status.state not in self._wire.checking:
                # Publishing moved the folder while the engine looked for the files, and it stopped
                # this torrent without an error; or the disk has lost bytes.
                self._wire.remove(travel)
                self._here.question(travel)
            return
        done = int(status.total_wanted_done)
        # Checking what is there moves no bytes, and is no standstill.
        if done != travel.done or not status.has_metadata or status.state in self._wire.checking:
            travel.done, travel.moved = done, now
        if status.is_seeding:
            if not travel.flushed:
                # What the engine holds in memory is not on the disk yet.
                travel.handle.flush_cache()
            elif travel.check is None:
                entries = travel.bundle.entries
                travel.check = self._start(self._here.verify, self._here.home, entries)
            return
        self._wire.look_for_peers(travel)

    def _on_the_way(self) -> int:
        return sum(each.handle is not None and not each.held for each in self._travels.values())

    def _on_engine_error(self, travel: Travel, status: Any) -> None:
        code, text = status.errc.value(), status.errc.message()
        if code in _DISK_ERRORS:
            self._fail_disk(OSError(code, f"{text}: {travel.paths}"))
        else:
            # A folder renamed under an open file, or the like: once more from the start.
            self._note(f"{travel.paths}: {text}: checked again")
        self._wire.remove(travel)

    def _find_full_disk(self) -> None:
        """Stop before the disk is full: the engine does not tell of every write that fails."""
        full = self._here.full_disk()
        if full and any(each.handle for each in self._travels.values()):
            self._fail_disk(full)

    def _fail_disk(self, error: OSError) -> None:
        """Take no more from the others: what the disk loses would be given on to them."""
        for travel in self._travels.values():
            if not travel.held:
                self._wire.remove(travel)
        self._fail(from_os_error(error))

    def _hear(self, alert: Any) -> None:
        kind = type(alert).__name__
        if kind == "listen_failed_alert":
            self._fail(self._wire.cannot_listen(alert.message()))
        elif kind == "file_error_alert" and alert.error.value() in _DISK_ERRORS:
            self._fail_disk(OSError(alert.error.value(), alert.message()))
        elif kind == "peer_ban_alert":
            who = self._wire.name_of(str(alert.endpoint[0]))
            self._note(f"{who} sent wrong bytes and is not listened to any more")
        elif kind == "hash_failed_alert":
            self._note("wrong bytes arrived and were thrown away")
        elif kind == "cache_flushed_alert":
            for travel in self._travels.values():
                if travel.handle is not None and travel.handle == alert.handle:
                    travel.flushed = True

    # -- torrents of what is here

    def _make_torrents(self) -> None:
        """Have torrents made of what nobody made one of yet."""
        making = sum(each.make is not None for each in self._travels.values())
        ordered = own_order(list(self._travels), self._job.address, self._wire.addresses.values())
        for name in sorted(ordered, key=lambda each: bool(self._travels[each].torrent)):
            travel = self._travels[name]
            if making >= self._makers or self._failure:
                return
            if travel.held and travel.make is None and not self._here.proves(travel):
                travel.make = self._start(self._here.make_torrent, travel.bundle)
                making += 1

    def _take_torrent(self, travel: Travel) -> None:
        assert travel.make is not None  # noqa: S101
        make, travel.make = travel.make, None
        try:
            damaged = make.result()
        except FleetError as error:
            self._fail(error)
            return
        if damaged:
            travel.lose()
            self._wire.remove(travel)
            self._note(
                f"{', '.join(damaged[:3])} was damaged on this node: removed, fetched from others"
            )
        else:
            own = self._here.torrent_path(travel.bundle).read_bytes()
            if travel.torrent not in (b"", own):
                self._note(f"the torrent that was brought of {travel.paths} leads to other bytes")
                self._wire.remove(travel)
            travel.torrent, travel.proved = own, True
            travel.roots = torrent_roots(own, self._manifest.id, travel.bundle)
        self._news.notify_all()

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
        if held and not self._here.published and not self._failure:
            self._publishing = self._start(self._here.publish)

    def _unhold(self, error: FleetError) -> None:
        """What publishing found damaged is fetched again."""
        damaged = {each["path"] for each in error.details.get("damage", ())}
        self._heals += 1
        if self._heals >= _ATTEMPTS or not damaged:
            self._fail(error)
            return
        for travel in self._travels.values():
            if damaged & {entry.path for entry in travel.bundle.entries}:
                travel.lose()
                self._wire.remove(travel)
        self._note(f"{', '.join(sorted(damaged)[:3])} changed on the disk: fetched again")

    def _measure(self, now: float) -> None:
        traffic = self._wire.traffic()
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
                    found="; ".join(self._wire.explain(travel) for travel in active),
                    remedy="look at the nodes named, then run again: what arrived is kept",
                )
            )

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
            wrong = self._here.take_in(int(number), path)
            if wrong:
                self._fail(wrong)
            self._scanned_at = -_SCAN_S
            self._wake.set()
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

    def _made(self) -> set[str]:
        return {name for name, travel in self._travels.items() if travel.torrent}

    def _standing(self) -> str:
        if self._failure:
            return "failed"
        return "published" if self._here.published else "working"

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
        self._wire.session.pause()
        self._pool.shutdown(wait=True, cancel_futures=True)
