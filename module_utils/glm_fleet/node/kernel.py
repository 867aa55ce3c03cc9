# SPDX-License-Identifier: Apache-2.0
"""What the kernel logged about the GPUs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..core.runner import Runner
from .query import TIMEOUT_S

_XID = re.compile(r"(?P<kind>S?Xid) \(PCI:(?P<device>[0-9A-Fa-f:.]+)\): (?P<code>\d+)")


def read_xids(window_s: int, run: Runner) -> list[dict[str, Any]]:
    """Return the GPU driver's Xid and SXid lines of this boot within the window.

    Each is {kind: Xid|SXid, code, device, time_s, message}.
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
    """Pick the Xid and SXid lines out of the journal's JSON lines."""
    for line in journal.splitlines():
        if "Xid" not in line:
            continue
        entry = json.loads(line)
        message = entry.get("MESSAGE")
        match = _XID.search(message) if isinstance(message, str) else None
        if match:
            yield {
                "kind": match["kind"],
                "code": int(match["code"]),
                "device": match["device"],
                "time_s": int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6,
                "message": message,
            }
