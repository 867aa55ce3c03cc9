# SPDX-License-Identifier: Apache-2.0
"""What the attestation of a start found: its checks, and the lines that it keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .record import read_note

EVIDENCE = Path("/run/glm-fleet/attested.json")


@dataclass(frozen=True)
class Check:
    """One point of the attestation: its name, outcome and the value that decided."""

    name: str
    passed: bool
    detail: str


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
    """Check that each required pattern is in the journal of this start and no forbidden one.

    ``known`` holds lines that were there when the start was attested: the journal of a busy
    server loses its first lines to rotation while the server goes on.
    """
    checks = []
    for pattern in required:
        hit = next((line for line in lines if re.search(pattern, line)), "")
        hit = hit or (known or {}).get(pattern, "")
        checks.append(Check(f"journal has {pattern}", bool(hit), hit[-200:] or "no such line"))
    for pattern in forbidden:
        hit = next((line for line in lines if re.search(pattern, line)), "")
        checks.append(
            Check(f"journal has no {pattern}", not hit, hit[-200:] or "no such line, as wanted")
        )
    return checks
