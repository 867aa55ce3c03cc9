# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations

import re


def human_bytes(count: float) -> str:
    """Return a size as disks are sold: ``475.0 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parse_count(text: str) -> int | None:
    """Return a count that a program printed, None for anything else and for more than 2**63."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a dotted version, for comparison."""
    match = re.match(r"[0-9]{1,9}(?:\.[0-9]{1,9})*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def printable(text: str) -> str:
    """Return text as a terminal may have it: what would command the terminal is written out.

    What a host, a client or a file says can hold escapes that move the cursor, fill the clipboard
    or show a fake line. A tab is a space here, and a carriage return alone would hide a line.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _written_out(each) for each in text)


def _written_out(character: str) -> str:
    return " " if character == "\t" else character.encode("unicode_escape").decode()
