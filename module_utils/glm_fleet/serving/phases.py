# SPDX-License-Identifier: Apache-2.0
"""Where the time of a cold start went, from its journal.

vLLM stamps its lines to the second. A phase lasts from the end of the one before to the line that
ends it; where several ranks say the same, the latest counts, because all wait for it. A
phase whose line is missing is counted to the one after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

# The name of a phase, and the line that ends it. The words are those of vLLM 0.23.0.
_ENDS: tuple[tuple[str, str], ...] = (
    ("imports", r"non-default args"),
    ("configuration", r"Initializing a V1 LLM engine"),
    ("processes", r"Starting to load model"),
    ("weights", r"Loading weights took"),
    ("repack", r"Model loading took"),
    ("compile", r"torch\.compile took"),
    ("first run", r"Initial profiling/warmup run took"),
    ("memory", r"KV cache size"),
    ("graphs", r"Graph capturing finished"),
    ("engine", r"init engine .* took"),
    ("server", r"Starting vLLM server on"),
)
_STAMP = re.compile(r"\b[A-Z]+ (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d) ")
_SINCE = re.compile(r"(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)")


def start_phases(lines: Sequence[str], active_since: str) -> dict[str, float]:
    """Return {phase: seconds} in their order, {} where the journal does not tell.

    ``active_since`` is systemd's word for when the service was started, in the same local time
    as vLLM's stamps: ``Fri 2026-11-27 13:20:32 UTC``.
    """
    since = _SINCE.search(active_since)
    if not since:
        return {}
    begun = datetime(*(int(part) for part in since.groups()))  # type: ignore[arg-type]
    ends: dict[str, datetime] = {}
    for line in lines:
        stamp = _STAMP.search(line)
        if not stamp:
            continue
        for name, pattern in _ENDS:
            if re.search(pattern, line):
                moment = _moment(stamp.groups(), begun)
                ends[name] = max(moment, ends.get(name, moment))
                break
    phases: dict[str, float] = {}
    before = begun
    for name, _ in _ENDS:
        if name in ends:
            moment = max(ends[name], before)
            phases[name] = (moment - before).total_seconds()
            before = moment
    return phases


def _moment(stamp: Sequence[str], begun: datetime) -> datetime:
    month, day, hour, minute, second = (int(part) for part in stamp)
    found = datetime(begun.year, month, day, hour, minute, second)
    # A start around New Year: the stamps have no year.
    return found if found >= begun - timedelta(days=180) else found.replace(year=begun.year + 1)


def phases_in_words(seconds: Mapping[str, float]) -> str:
    """Say where the time went: ``353 s: imports 31, ...``; '' where nothing is known."""
    if not seconds:
        return ""
    parts = [f"{name} {value:.0f}" for name, value in seconds.items() if round(value)]
    return f"{sum(seconds.values()):.0f} s: {', '.join(parts)}"
