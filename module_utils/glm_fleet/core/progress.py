# SPDX-License-Identifier: Apache-2.0
"""How far something long has come: measured where it happens, shown on the controller.

The process that works keeps a `ProgressFile`; an action plugin reads it over SSH and turns
it into text: a bar on a terminal, a line now and then in a log.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .decode import Amount, Count, Words, parse
from .errors import FleetError
from .files import write_atomically
from .format import duration, human_bytes

# Between two lines of a log: more as it takes longer, for a start or a copy can take an hour.
LOG_EVERY_S = 30.0
_LOG_SHARE = 0.25
_LOG_AT_MOST_S = 300.0
_TERMINAL_EVERY_S = 1.0
# What is over sooner is not worth a word.
_SILENT_S = 3.0
_WINDOW_S = 20.0
_WRITE_EVERY_S = 1.0
_BAR = 20
# Bytes per second below which nobody can know when it ends.
_SLOWEST = 1e-3


@dataclass(frozen=True)
class Progress:
    """What is being done, bytes done and in all (0: not known), and bytes per second."""

    what: Words
    done: Count
    total: Count
    rate: Amount

    @property
    def share(self) -> float:
        """The part that is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at this rate; None when nobody can know."""
        if not self.total or self.rate < _SLOWEST:
            return None
        return max(0, self.total - self.done) / self.rate

    def as_json(self) -> str:
        """Return the content of a progress file."""
        return json.dumps(vars(self))


def from_json(text: str) -> Progress | None:
    """Read a progress file; None when it is empty or from something else."""
    try:
        return parse(Progress, text, what="The progress")
    except FleetError:
        return None


def line(progress: Progress) -> str:
    """Say it in words, for a log."""
    if not progress.total:
        return progress.what
    text = f"{progress.what}: {human_bytes(progress.done)} of {human_bytes(progress.total)}"
    text += f" ({progress.share:.0%})"
    if progress.rate > 0:
        text += f", {human_bytes(progress.rate)}/s"
    left = progress.seconds_left
    return text if left is None else f"{text}, {duration(left)} left"


def bar(progress: Progress) -> str:
    """Draw it, for a terminal."""
    if not progress.total:
        return progress.what
    full = int(progress.share * _BAR)
    left = progress.seconds_left
    words = [
        f"[{'#' * full}{'.' * (_BAR - full)}] {progress.share:4.0%}",
        f"{human_bytes(progress.done)}/{human_bytes(progress.total)}",
        f"{human_bytes(progress.rate)}/s",
        *([] if left is None else [duration(left)]),
        progress.what,
    ]
    return " ".join(words)


class Meter:
    """Counts bytes from any thread; the rate is that of the last seconds."""

    def __init__(
        self, what: str, total: int = 0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what = what
        self.total = total
        self._clock = clock
        self._lock = threading.Lock()
        self._done = 0
        self._seen: deque[tuple[float, int]] = deque([(clock(), 0)])

    def add(self, count: int) -> None:
        """Count bytes; a negative number takes back what has to be done again."""
        with self._lock:
            self._note(self._done + count)

    def set(self, done: int) -> None:
        """Say how many bytes are done."""
        with self._lock:
            self._note(done)

    def start(self, done: int) -> None:
        """Say what was there before the work began: it is done, but not at any rate."""
        with self._lock:
            self._done = done
            self._seen = deque([(self._clock(), done)])

    def read(self) -> Progress:
        """Return how far it has come."""
        with self._lock:
            then, before = self._seen[0]
            elapsed = self._clock() - then
            rate = max(0.0, (self._done - before) / elapsed) if elapsed > 0 else 0.0
            return Progress(self.what, self._done, self.total, rate)

    def _note(self, done: int) -> None:
        now = self._clock()
        self._done = done
        if now - self._seen[-1][0] >= _WRITE_EVERY_S:
            self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()


class ProgressFile:
    """Keeps a meter's state in a file for as long as the block lasts, and no longer."""

    def __init__(self, path: Path | None, meter: Meter) -> None:
        self._path = path
        self._meter = meter
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Meter:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self._meter

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._path:
            self._thread.join()
            self._path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while self._path:
            try:
                write_atomically(self._path, self._meter.read().as_json())
            except OSError:
                # What cannot be shown does not stop the work: the disk may be full.
                self._path.unlink(missing_ok=True)
            if self._end.wait(_WRITE_EVERY_S):
                return


def log_pause(elapsed: float) -> float:
    """Return the seconds between two lines of a log, after this many seconds of work."""
    return min(_LOG_AT_MOST_S, max(LOG_EVERY_S, _LOG_SHARE * elapsed))


class Reporter:
    """Decides when to show progress and as what.

    ``terminal`` says whether a person looks at a screen where one line can be drawn anew;
    otherwise there is a line every half minute, less often later, and one for each phase.
    """

    def __init__(
        self, name: str, *, terminal: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._terminal = terminal
        self._clock = clock
        self._begun = clock()
        self._said: float | None = None
        self._what = ""

    def show(self, progress: Progress) -> str:
        """Return the text to print as it is (with its own line ends), or nothing."""
        now = self._clock()
        every = _TERMINAL_EVERY_S if self._terminal else log_pause(now - self._begun)
        if now - self._begun < _SILENT_S:
            return ""
        # A new phase is worth a line of its own.
        due = self._said is None or now - self._said >= every or progress.what != self._what
        if not due:
            return ""
        self._said, self._what = now, progress.what
        if self._terminal:
            return f"\r\033[K  {self._name} {bar(progress)}"
        return f"  {self._name}: {line(progress)}\n"

    def end(self) -> str:
        """Return what ends the display."""
        return "\r\033[K" if self._terminal and self._said is not None else ""
