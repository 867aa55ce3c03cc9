# SPDX-License-Identifier: Apache-2.0
"""Conflicts that a person resolved, recorded as patches that fit one ref and one head.

A recorded resolution is a file that `git diff --full-index REF -- FILE` wrote, below these
lines, with full SHAs:

    Ref: the commit of the ref
    Head: the head of the pull request

It is taken for no other pair, and only when the text it starts from is the very one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FleetError

_HEADER = re.compile(r"(Ref|Head): *([0-9a-f]{40}(?:[0-9a-f]{24})?)\s*")
_FILE = re.compile(r"diff --git a/(?P<path>.+) b/(?P=path)\n")
_INDEX = re.compile(r"^index ([0-9a-f]{40,64})\.\.", re.MULTILINE)


@dataclass(frozen=True)
class Recorded:
    """One file of a recorded resolution: the blob it starts from, and its patch."""

    source: str
    path: str
    blob: str
    patch: str


@dataclass(frozen=True)
class Resolution:
    """A patch file with what it is for."""

    name: str
    ref: str
    head: str
    sha256: str
    files: tuple[Recorded, ...]


def read_resolution(file: Path) -> Resolution:
    """Read a recorded resolution. Raises `FleetError` when it is not one."""
    try:
        content = file.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _malformed(file, str(error)) from error
    start = text.find("diff --git ")
    found = (_HEADER.fullmatch(line) for line in text[: max(start, 0)].splitlines())
    headers = {match[1]: match[2] for match in found if match}
    if start < 0 or set(headers) != {"Ref", "Head"}:
        raise _malformed(file, "no patch, or no line 'Ref:' or 'Head:' with a full SHA above it")
    files = []
    for part in re.split(r"(?m)^(?=diff --git )", text[start:]):
        name, index = _FILE.match(part), _INDEX.search(part)
        if part and not (name and index):
            raise _malformed(file, f"{part.splitlines()[0]!r} without a full blob id")
        if name and index:
            files.append(Recorded(file.name, name["path"], index.group(1), part))
    digest = hashlib.sha256(content).hexdigest()
    return Resolution(file.name, headers["Ref"], headers["Head"], digest, tuple(files))


def fitting(resolutions: Sequence[Resolution], ref: str, head: str) -> dict[str, Recorded]:
    """Return the recorded files for one ref and one head by path."""
    found: dict[str, Recorded] = {}
    for resolution in resolutions:
        if (resolution.ref, resolution.head) != (ref, head):
            continue
        for recorded in resolution.files:
            if recorded.path in found:
                raise FleetError(
                    f"{recorded.path} is resolved twice for the same ref and head",
                    expected="one recorded resolution",
                    found=f"{found[recorded.path].source} and {recorded.source}",
                    remedy="remove one of them from release_resolutions",
                )
            found[recorded.path] = recorded
    return found


def _malformed(file: Path, reason: str) -> FleetError:
    return FleetError(
        f"{file} is not a recorded resolution",
        expected="the lines 'Ref: SHA' and 'Head: SHA', then the output of "
        "git diff --full-index REF -- FILE",
        found=reason,
        remedy="record it again, or remove it from release_resolutions",
    )
