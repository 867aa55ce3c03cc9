# SPDX-License-Identifier: Apache-2.0
"""A file with conflict markers as data, and how a conflict may be resolved or refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable, Union

from ..core.errors import FleetError
from .dispatch import split_lines

# Longer than git's default of seven, so that no line of a document looks like a marker.
MARKER_SIZE = 31


@dataclass(frozen=True)
class Common:
    """Lines that both sides agree on, each with its line end."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Conflict:
    """Lines of the release (``ours``), of the pull request (``theirs``), and of their ancestor.

    ``base`` is None when the text was written without it.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    base: tuple[str, ...] | None = None


Segment = Union[Common, Conflict]


@dataclass(frozen=True)
class Join:
    """How one rule resolved a place: ``line`` counts from 1 in the release's text."""

    path: str
    rule: str
    line: int
    conflicts: int

    def as_dict(self) -> dict[str, object]:
        return {
            "path": self.path,
            "rule": self.rule,
            "line": self.line,
            "conflicts": self.conflicts,
        }


@dataclass(frozen=True)
class Joined:
    """The joined text and the rules that made it."""

    text: str
    joins: tuple[Join, ...]


@dataclass(frozen=True)
class Versions:
    """A conflicted file: the pull request's own beginning and end, and the release's text.

    ``conflicts`` is how many git left in it.
    """

    base: str
    ours: str
    theirs: str
    conflicts: int = 1


# Merges (base, ours, theirs) as git does: the text in style merge, and in style diff3.
Merge = Callable[[str, str, str], "tuple[str, str]"]


def parse_segments(text: str, marker_size: int = MARKER_SIZE) -> list[Segment]:
    """Read text with conflict markers (style merge, diff3 or zdiff3).

    Raises `FleetError` when the markers are not balanced.
    """
    marks = {char: re.compile(re.escape(char * marker_size) + r"(?: .*)?\n?\Z") for char in "<|=>"}
    segments: list[Segment] = []
    state = ""
    parts: dict[str, list[str]] = {"": [], "<": [], "|": [], "=": []}
    has_base = False
    allowed = {"<": ("",), "|": ("<",), "=": ("<", "|"), ">": ("=",)}
    for line in split_lines(text):
        mark = next((char for char, pattern in marks.items() if pattern.match(line)), None)
        if mark is None:
            parts[state].append(line)
            continue
        if state not in allowed[mark]:
            raise FleetError(
                "The conflict markers of git are not balanced",
                expected=f"one of {allowed[mark]!r} before {mark!r}",
                found=f"{state!r}",
                remedy="resolve this file by hand",
            )
        if mark == "<":
            if parts[""]:
                segments.append(Common(tuple(parts[""])))
            parts = {"": [], "<": [], "|": [], "=": []}
            has_base = False
        elif mark == "|":
            has_base = True
        elif mark == ">":
            segments.append(
                Conflict(
                    ours=tuple(parts["<"]),
                    theirs=tuple(parts["="]),
                    base=tuple(parts["|"]) if has_base else None,
                )
            )
        state = "" if mark == ">" else mark
    if state:
        raise FleetError("The last conflict of the file has no end marker")
    if parts[""]:
        segments.append(Common(tuple(parts[""])))
    return segments


@dataclass
class Document:
    """A conflicted file as segments, and the two files that one-sided choices would give."""

    segments: list[Segment]
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def lines(self, side: str) -> list[str]:
        """Return the file with every conflict decided for ``side`` (``ours``, ``theirs``)."""
        return [line for segment in self.segments for line in side_text(segment, side)]

    def span(self, index: int, side: str) -> tuple[int, int]:
        """Return first and last line (from 1) of a segment in the file of ``side``.

        An empty segment has a last line before its first.
        """
        before = sum(len(side_text(segment, side)) for segment in self.segments[:index])
        return before + 1, before + len(side_text(self.segments[index], side))

    def tree(self, side: str) -> ast.Module | None:
        """Return the syntax tree of the file of ``side``; None when it is not Python."""
        if side not in self._trees:
            try:
                self._trees[side] = ast.parse("".join(self.lines(side)))
            except (SyntaxError, ValueError):
                self._trees[side] = None
        return self._trees[side]


def side_text(segment: Segment, side: str) -> tuple[str, ...]:
    if isinstance(segment, Common):
        return segment.lines
    return segment.ours if side == "ours" else segment.theirs


def code_lines(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.strip()]


class RefusedError(Exception):
    def __init__(self, segment: Segment, misses: Sequence[tuple[int, str, str]]) -> None:
        met, closest, reason = max(misses, key=lambda miss: miss[0])
        self.report: dict[str, object] = {
            "ours": "".join(side_text(segment, "ours")),
            "theirs": "".join(side_text(segment, "theirs")),
            "closest_rule": closest,
            "conditions_met": met,
            "reason": reason,
            "rules": {name: why for _, name, why in misses},
        }
        super().__init__(reason)


def require_python(path: str, text: str) -> None:
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise FleetError(
            f"The joined {path} is not Python",
            found=f"line {error.lineno}: {error.msg}",
            remedy="this is a shape that the rules do not know: name a rebased pull request",
        ) from error


def refuse_file(path: str, refused: list[dict[str, object]]) -> FleetError:
    places = "; ".join(
        f"line {each['line']} (closest rule {each['closest_rule']}: {each['reason']})"
        for each in refused
    )
    return FleetError(
        f"{len(refused)} conflict(s) in {path} have a shape that no rule knows: {places}",
        expected="a choice joined with the release's, a warning instead of an error, two "
        "additions to one list or to imports, or an addition after changed lines",
        found="\n".join(_both_sides(each) for each in refused),
        remedy="name a pull request that was rebased onto this ref, or another ref, or resolve it "
        "by hand and record that in release_resolutions; nothing was built",
        details={"conflicts": refused},
    )


def _both_sides(conflict: dict[str, object]) -> str:
    """Show a conflict as a person has to resolve it: whole, with its place."""
    sides = (("the release has", conflict["ours"]), ("the pull request has", conflict["theirs"]))
    shown = "\n".join(f"{name}:\n{str(text).rstrip() or '(nothing)'}" for name, text in sides)
    return f"{conflict['path']}, line {conflict['line']}:\n{shown}"
