# SPDX-License-Identifier: Apache-2.0
"""A file that arrives in segments, and the record of what is there."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path

from ..core.decode import Count, read
from ..core.errors import FleetError
from ..core.files import write_atomically

BLOCK = 1024 * 1024
_NOTE_S = 5.0
# First byte, and the one after the last or None for the end of the file.
Span = tuple[int, int | None]


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
        try:
            noted = _read_record(self._record) if there else None
        except FleetError:
            path.unlink()
            there, noted = 0, None
        if noted is None:
            # A record that is left without its part belongs to a part that was removed.
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
                # The record comes before the first byte. Without one, the next run would take
                # the bytes of all segments for the beginning of the file.
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


def _read_record(path: Path) -> list[int] | None:
    """Return how much is there of each segment, None where nothing was noted.

    Raises `FleetError` where that cannot be told: then nothing of the file can be used.
    """
    try:
        return read(list[Count], path)
    except FileNotFoundError:
        return None
