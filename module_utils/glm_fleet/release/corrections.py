# SPDX-License-Identifier: Apache-2.0
"""Corrections of a pull request: small patches from one exact text to another.

A correction is a file that `git diff --unified=0 --full-index` wrote, below these lines:

    Head: full SHA of the pull request's head that it corrects
    Ref: full SHA of a ref that it is for; may be repeated; without it, every ref
    Mends: name of a known fault; may be repeated
    Reason: one sentence for the manifest

There is no context to match and nothing to search: every file is named by the blob that it is
before and the blob that it is afterwards, and both are compared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import FleetError
from .dispatch import split_lines

_HEADER = re.compile(r"(Head|Ref|Mends|Reason): *(.+?)\s*")
_SHA = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_FILE = re.compile(r"diff --git a/(?P<path>.+) b/(?P=path)\n")
_INDEX = re.compile(r"^index ([0-9a-f]{40,64})\.\.([0-9a-f]{40,64})\b", re.MULTILINE)
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


@dataclass(frozen=True)
class Change:
    """One file of a correction: its blob before and after, and the hunks without context."""

    path: str
    before: str
    after: str
    patch: str


@dataclass(frozen=True)
class Correction:
    """A patch with what it is for; ``refs`` is empty where it is for every ref."""

    name: str
    sha256: str
    head: str
    refs: tuple[str, ...]
    mends: tuple[str, ...]
    reason: str
    changes: tuple[Change, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "head": self.head,
            "mends": list(self.mends),
            "reason": self.reason,
            "files": [change.path for change in self.changes],
        }


def read_correction(name: str, text: str, sha256: str) -> Correction:
    """Read the correction ``name``; ``sha256`` is the digest that its text must have.

    Raises `FleetError` for another text, and for one that is not a correction.
    """
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != sha256:
        raise FleetError(
            f"The correction {name} is another text than the one that was pinned",
            expected=f"SHA-256 {sha256}",
            found=f"SHA-256 {found}",
            remedy="review the file; to accept it, pin its SHA-256 in release_patches",
        )
    start = max(text.find("diff --git "), 0)
    headers: dict[str, list[str]] = {}
    for line in text[:start].splitlines():
        match = _HEADER.fullmatch(line)
        if match:
            headers.setdefault(match[1], []).append(match[2])
    heads, refs = headers.get("Head", []), headers.get("Ref", [])
    changes = [_read_change(name, part) for part in _parts(text[start:])] if start else []
    if not changes or len(heads) != 1 or not headers.get("Reason"):
        raise _malformed(name, "no patch, or not one line 'Head:' and one 'Reason:' above it")
    if not all(_SHA.fullmatch(each) for each in heads + refs):
        raise _malformed(name, "a 'Head:' or 'Ref:' that is not a full SHA")
    return Correction(
        name,
        sha256,
        heads[0],
        tuple(refs),
        tuple(headers.get("Mends", [])),
        " ".join(headers["Reason"]),
        tuple(changes),
    )


def _parts(text: str) -> list[str]:
    return [part for part in re.split(r"(?m)^(?=diff --git )", text) if part]


def _read_change(name: str, part: str) -> Change:
    path, blobs = _FILE.match(part), _INDEX.search(part)
    if not (path and blobs):
        raise _malformed(name, f"{part.splitlines()[0]!r} without two full blob ids")
    return Change(path["path"], blobs[1], blobs[2], part)


def fitting(corrections: Sequence[Correction], ref: str, head: str) -> list[Correction]:
    """Return the corrections for one ref (commit) and one head, in their order."""
    return [
        each for each in corrections if each.head == head and (not each.refs or ref in each.refs)
    ]


def blob_id(text: bytes, like: str) -> str:
    """Return git's id of a file's content, with the hash that the id ``like`` was made with."""
    make = hashlib.sha256 if len(like) == 64 else hashlib.sha1
    return make(b"blob %d\0" % len(text) + text).hexdigest()


def correct(correction: Correction, change: Change, content: bytes) -> bytes:
    """Return ``content`` with the change. Raises `FleetError` unless both blobs are the named."""
    found = blob_id(content, change.before)
    if found != change.before:
        raise FleetError(
            f"The correction {correction.name} does not fit {change.path}",
            expected=f"the text {change.before}",
            found=f"the text {found}",
            remedy="name a correction for this ref in release_patches, or take it out and name "
            f"what it mends ({', '.join(correction.mends) or 'nothing'}) in "
            "release_accept_faults if the release can do without",
        )
    made = _replace(correction.name, change, content)
    if blob_id(made, change.after) != change.after:
        raise _malformed(correction.name, f"{change.path} does not become {change.after}")
    return made


def _replace(name: str, change: Change, content: bytes) -> bytes:
    """Apply hunks without context, last first, each at the line that it names."""
    lines = split_lines(content.decode())
    patch = split_lines(change.patch)
    starts = [place for place, line in enumerate(patch) if line.startswith("@@ ")]
    for start, end in reversed(list(zip(starts, [*starts[1:], len(patch)]))):
        hunk = _HUNK.match(patch[start])
        body = patch[start + 1 : end]
        old = [line[1:] for line in body if line.startswith("-")]
        new = [line[1:] for line in body if line.startswith("+")]
        counts = [1 if each is None else int(each) for each in hunk.group(2, 3)] if hunk else []
        if hunk is None or counts != [len(old), len(new)] or len(body) != len(old) + len(new):
            raise _malformed(name, f"{patch[start].strip()!r} is not a hunk without context")
        # A hunk that only adds names the line it stands after.
        first = int(hunk[1]) - (1 if old else 0)
        if lines[first : first + len(old)] != old:
            raise _malformed(name, f"{change.path} has another line {first + 1}")
        lines[first : first + len(old)] = new
    return "".join(lines).encode()


def _malformed(name: str, reason: str) -> FleetError:
    return FleetError(
        f"{name} is not a correction",
        expected="the lines 'Head: SHA', 'Reason: ...' and 'Mends: NAME', then the output of "
        "git diff --unified=0 --full-index",
        found=reason,
        remedy="write it again, or remove it from release_patches",
    )


@dataclass(frozen=True)
class Fault:
    """What is known to be wrong with a pull request, for some refs or for all.

    ``below_capability`` restricts it to GPUs of a lower compute capability (``8.9``).
    """

    name: str
    heads: tuple[str, ...]
    refs: tuple[str, ...]
    below_capability: str
    symptom: str
    remedy: str

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Fault:
        return cls(
            name=str(data["name"]),
            heads=tuple(data["heads"]),
            refs=tuple(data.get("refs") or ()),
            below_capability=str(data.get("below_capability") or ""),
            symptom=str(data["symptom"]),
            remedy=str(data.get("remedy") or ""),
        )

    def concerns(
        self, refs: Sequence[str], heads: Sequence[str], capabilities: Sequence[str]
    ) -> bool:
        """Tell whether a recipe has this fault; ``refs`` are its ref as named and its commit."""
        limit = _capability(self.below_capability) if self.below_capability else None
        return (
            bool(set(self.heads) & set(heads))
            and (not self.refs or bool(set(self.refs) & set(refs)))
            and (limit is None or any(_capability(each) < limit for each in capabilities))
        )


def _capability(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def refuse_faults(
    faults: Sequence[Fault],
    corrections: Sequence[Correction],
    *,
    ref: str,
    sha: str,
    heads: Sequence[str],
    capabilities: Sequence[str],
    accepted: Sequence[str],
) -> list[Fault]:
    """Refuse a recipe with a known fault that nothing mends; return the accepted ones.

    ``ref`` is the ref as named, ``sha`` its commit.
    """
    unknown = sorted(set(accepted) - {fault.name for fault in faults})
    if unknown:
        raise FleetError(
            f"No known fault is called {', '.join(unknown)}",
            expected=f"one of {', '.join(fault.name for fault in faults) or 'none'}",
            found=", ".join(unknown),
            remedy="correct release_accept_faults",
        )
    mended = {name for head in heads for each in fitting(corrections, sha, head)
              for name in each.mends}  # fmt: skip
    left = [
        fault
        for fault in faults
        if fault.concerns((ref, sha), heads, capabilities) and fault.name not in mended
    ]
    open_faults = [fault for fault in left if fault.name not in accepted]
    if open_faults:
        names = ", ".join(fault.name for fault in open_faults)
        raise FleetError(
            f"This recipe has {len(open_faults)} known fault(s): {names}",
            expected="a correction of each in release_patches",
            found="; ".join(f"{fault.name}: {fault.symptom}" for fault in open_faults),
            remedy=" ".join(dict.fromkeys(fault.remedy for fault in open_faults if fault.remedy))
            + f" To build it all the same, name them in release_accept_faults: [{names}]",
            details={"faults": [fault.name for fault in open_faults]},
        )
    return left
