# SPDX-License-Identifier: Apache-2.0
"""The clock of a file system, which stands still for some milliseconds at a time."""

from __future__ import annotations

from pathlib import Path


def next_tick(folder: Path) -> None:
    """Return when what is written now gets a later time than what was written before."""
    probe = folder / "tick"
    probe.write_text("")
    begun = probe.stat().st_mtime_ns
    while probe.stat().st_mtime_ns == begun:
        probe.write_text("")
    probe.unlink()
