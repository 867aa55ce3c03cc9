# SPDX-License-Identifier: Apache-2.0
"""What the kernel logged about the GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

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
        if "Xid" not in line and "NVRM" not in line:
            continue
        entry = json.loads(line)
        message = entry.get("MESSAGE")
        found = parse_message(message) if isinstance(message, str) else None
        if found:
            yield {**found, "time_s": int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6}
