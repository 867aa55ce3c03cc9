# SPDX-License-Identifier: Apache-2.0
"""What the kernel logged about the GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..core.decode import parse
from ..core.errors import FleetError
from ..core.format import parse_count
from ..core.runner import Runner
from .query import TIMEOUT_S
from .xid import parse_message


def read_xids(window_s: int, run: Runner) -> list[dict[str, Any]]:
    """Return the GPU driver's Xid and SXid lines of this boot within the window.

    Each is {kind: Xid|SXid|loaded, code, device, instance, time_s, message}; see
    `xid.parse_message`.
    """
    answer = run(
        [
            "journalctl",
            "--boot",
            "--output=json",
            "--output-fields=MESSAGE",
            "--no-pager",
            f"--since=-{window_s}s",
            "SYSLOG_IDENTIFIER=kernel",
        ],
        timeout=TIMEOUT_S,
    )
    return list(parse_xids(answer.stdout))


def parse_xids(journal: str) -> Iterator[dict[str, Any]]:
    """Pick the driver's lines out of the journal's JSON lines."""
    for line in journal.splitlines():
        if not any(word in line for word in ("Xid", "NVRM", "nvidia ")):
            continue
        try:
            entry = parse(dict[str, Any], line, what="A line of the kernel's log")
        except FleetError:
            # One that is damaged must not hide the others.
            continue
        # A message with bytes that are no text comes as a list of numbers.
        message = entry.get("MESSAGE")
        found = parse_message(message) if isinstance(message, str) else None
        if found:
            stamp = parse_count(str(entry.get("__REALTIME_TIMESTAMP", "")))
            yield {**found, "time_s": (stamp or 0) / 1e6}
