# SPDX-License-Identifier: Apache-2.0
"""The model's shards in the page cache before the node is drained.

A start that finds its weights in memory does not wait for the disk, and the disk is read while the
node still serves. Reading is bounded in rate, and is not begun, or ended, where the node needs its
memory for something else: a page that is read in is worth less than one that somebody uses.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from ..core.format import human_bytes

_CHUNK = 2 * 1024 * 1024
_LOOK = 64 * 1024 * 1024
# Of the time, how much some process waited for memory: what Linux calls pressure, in percent.
_MOST_PRESSURE = 5.0


@dataclass(frozen=True)
class Memory:
    """A node's memory in bytes; ``pressure`` in percent over the last ten seconds."""

    total: int
    available: int
    pressure: float


@dataclass
class Warmed:
    """What was done: bytes that were in memory already, and those read from the disk."""

    cached: int = 0
    read: int = 0
    seconds: float = 0.0
    stopped: str = ""

    def as_dict(self) -> dict[str, object]:
        rate = round(self.read / self.seconds) if self.read and self.seconds else 0
        return {
            "cached_bytes": self.cached,
            "read_bytes": self.read,
            "seconds": round(self.seconds, 2),
            "bytes_per_second": rate,
            "stopped": self.stopped,
        }


def pages_in_words(found: Mapping[str, Any]) -> str:
    """Say what was done before a drain, '' where there was nothing to do.

    ``found`` is what `Warmed.as_dict` gives. With a measured rate the least time in which this
    disk gives the whole model stands beside it.
    """
    read, cached = int(found.get("read_bytes") or 0), int(found.get("cached_bytes") or 0)
    rate, stopped = int(found.get("bytes_per_second") or 0), str(found.get("stopped") or "")
    parts = []
    if cached:
        parts.append(f"{human_bytes(cached)} of the model were in memory")
    if read:
        floor = f"; all of it takes this disk {(read + cached) / rate:.0f} s" if rate else ""
        parts.append(f"{human_bytes(read)} were read before the drain{floor}")
    if stopped:
        parts.append(f"not more, because {stopped}" if parts else f"not read ahead: {stopped}")
    return ", ".join(parts)


def read_memory(proc: Path = Path("/proc")) -> Memory:
    """Return the memory of this node. A kernel without pressure figures counts as relaxed."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", (proc / "meminfo").read_text()))
    try:
        found = re.search(r"some avg10=([\d.]+)", (proc / "pressure/memory").read_text())
    except OSError:
        found = None
    return Memory(
        int(fields["MemTotal"]) * 1024,
        int(fields["MemAvailable"]) * 1024,
        float(found[1]) if found else 0.0,
    )


def shards(model: Path) -> dict[Path, int]:
    """Return the files of a model with their sizes in bytes, as a start reads them."""
    files = sorted(path for path in model.rglob("*") if path.is_file())
    return {path: path.stat().st_size for path in files}


def refusal(memory: Memory, wanted: int, reserve: int) -> str:
    """Say why memory does not allow for ``wanted`` more bytes of pages, '' if it does."""
    if memory.pressure > _MOST_PRESSURE:
        return f"processes wait for memory ({memory.pressure:.0f} percent of the time)"
    if memory.available - reserve < wanted:
        return (
            f"{human_bytes(wanted)} and a reserve of {human_bytes(reserve)} do not fit into "
            f"{human_bytes(memory.available)} of free memory"
        )
    return ""


def warm(
    files: Mapping[Path, int],
    *,
    rate: int,
    reserve: int,
    memory: Callable[[], Memory] = read_memory,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Warmed:
    """Bring files into the page cache with at most ``rate`` bytes a second.

    ``reserve`` are bytes that stay available to others. Ends early, and says why, when the
    node gets short of memory. Files that are there already cost next to nothing.
    """
    warmed = Warmed()
    begun = clock()
    warmed.stopped = refusal(memory(), sum(files.values()), reserve)
    looked = 0
    buffer = bytearray(_CHUNK)
    for path, size in files.items():
        if warmed.stopped:
            break
        with path.open("rb", buffering=0) as handle:
            # Without reading ahead: it would be neither counted nor held back.
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            there = resident(handle.fileno(), size) if size else b""
            for offset in range(0, size, _CHUNK):
                length = min(_CHUNK, size - offset)
                pages = there[offset // mmap.PAGESIZE : -(-(offset + length) // mmap.PAGESIZE)]
                missing = min(pages.count(0) * mmap.PAGESIZE, length)
                warmed.cached += length - missing
                if not missing:
                    continue
                os.preadv(handle.fileno(), [memoryview(buffer)[:length]], offset)
                warmed.read += missing
                if warmed.read - looked >= _LOOK:
                    looked = warmed.read
                    warmed.stopped = refusal(memory(), 0, reserve)
                    if warmed.stopped:
                        break
                ahead = warmed.read / rate - (clock() - begun)
                if ahead > 0:
                    sleep(ahead)
    warmed.seconds = clock() - begun
    return warmed


def resident(descriptor: int, size: int) -> bytes:
    """Tell which pages of a file are in memory, a byte each, 1 for those that are.

    Asks without reading: to try a read that must not wait makes Linux read ahead. Where the
    kernel does not tell, nothing counts as in memory; reading again costs only time.
    """
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    # A private copy is the only kind whose address Python gives away; nothing is written to it.
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(start))
        told = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages) == 0
        del start
    return bytes(each & 1 for each in pages) if told else bytes(len(pages))
