# SPDX-License-Identifier: Apache-2.0
"""What the attestation of a start found: its checks, and the lines that it keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.check import Check
from .record import read_note

# The last word of a start: the web server's own line, or vLLM's where that one is not logged.
READY = re.compile(r"Application startup complete|Starting vLLM server on")
_WEB_SERVER_IS_UP = re.compile(r"^(\([^()]*\) )?(INFO: +)?Application startup complete\.?$")
EVIDENCE = Path("/run/glm-fleet/attested.json")


def read_evidence(path: Path, invocation: str) -> dict[str, str]:
    """Return {pattern: line} that an earlier attestation of this very start found."""
    known = read_note(path)
    if not invocation or known.pop("invocation", "") != invocation:
        return {}
    return known


def check_journal(
    lines: Sequence[str],
    required: Sequence[str],
    forbidden: Sequence[str],
    known: Mapping[str, str] | None = None,
) -> list[Check]:
    """Check that each required pattern is in the start phase of the journal and no forbidden one.

    The start phase ends where the server says that it is up. What follows holds words of clients:
    a model that somebody asks for can be called like any of these lines. ``known`` holds the lines
    that were there when this start was attested, which decides: the journal of a busy server loses
    its first lines to rotation while the server goes on.
    """
    phase = start_of(lines)
    checks = []
    for pattern in required:
        hit = (known or {}).get(pattern, "")
        hit = hit or next((line for line in phase if re.search(pattern, line)), "")
        checks.append(Check(f"journal has {pattern}", bool(hit), hit[-200:] or "no such line"))
    attested = bool(known) and set(required) <= set(known or ())
    for pattern in forbidden:
        found = (line for line in phase if re.search(pattern, line))
        hit = "" if attested else next(found, "")
        checks.append(
            Check(f"journal has no {pattern}", not hit, hit[-200:] or "no such line, as wanted")
        )
    return checks


def start_of(lines: Sequence[str]) -> Sequence[str]:
    """Return the lines up to the last word of the start; all if it was not said.

    vLLM names its address before the web server's own word, which ends the start where it is
    logged. Only that word as a whole counts then: a client can say it in other words.
    """
    first = next((place for place, line in enumerate(lines) if READY.search(line)), len(lines))
    rest = range(first, len(lines))
    last = next((place for place in rest if _WEB_SERVER_IS_UP.search(lines[place])), first)
    return lines[: last + 1]
