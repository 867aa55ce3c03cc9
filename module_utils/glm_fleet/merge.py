# SPDX-License-Identifier: Apache-2.0
"""Resolving the conflicts of a cherry-pick by structure, never by likeness of text.

A conflicted file is read as a list of segments: text both sides agree on, and conflicts.
Each rule looks at one conflict and what follows it and either gives the joined lines or
says which of its conditions failed. A conflict that no rule takes is refused with both
sides and the rule that came closest.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable, Union

from .errors import FleetError

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
class Resolution:
    """The joined text and the rules that made it."""

    text: str
    joins: tuple[Join, ...]


@dataclass(frozen=True)
class Joined:
    """What a rule gives: the lines that replace ``segments`` segments."""

    lines: tuple[str, ...]
    segments: int = 1


@dataclass(frozen=True)
class _Branches:
    """One ``if ...: ... else: ...`` as lines; ``last`` is its last line in its file."""

    head: str
    body: tuple[str, ...]
    else_line: str
    otherwise: tuple[str, ...]
    depth: int
    last: int


class Miss(Exception):  # noqa: N818 - an answer, not an error
    """A rule does not apply; ``met`` counts the conditions that held before that."""

    def __init__(self, met: int, reason: str) -> None:
        self.met = met
        self.reason = reason
        super().__init__(reason)


def split_lines(text: str) -> list[str]:
    """Return the lines of ``text`` with their ends; only a line feed ends a line."""
    return re.findall(r"[^\n]*\n|[^\n]+\Z", text)


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
        return [line for segment in self.segments for line in _side(segment, side)]

    def span(self, index: int, side: str) -> tuple[int, int]:
        """Return first and last line (from 1) of a segment in the file of ``side``.

        An empty segment has a last line before its first.
        """
        before = sum(len(_side(segment, side)) for segment in self.segments[:index])
        return before + 1, before + len(_side(self.segments[index], side))

    def tree(self, side: str) -> ast.Module | None:
        """Return the syntax tree of the file of ``side``; None when it is not Python."""
        if side not in self._trees:
            try:
                self._trees[side] = ast.parse("".join(self.lines(side)))
            except (SyntaxError, ValueError):
                self._trees[side] = None
        return self._trees[side]


def _side(segment: Segment, side: str) -> tuple[str, ...]:
    if isinstance(segment, Common):
        return segment.lines
    return segment.ours if side == "ours" else segment.theirs


def _code(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.strip()]


@dataclass(frozen=True)
class Resolver:
    """The rules and the names they know.

    ``first_test`` is the condition the release has and the pull request's base lacked;
    ``second_test`` the one the pull request brings; ``optional_dependency`` a word of the
    name of the library whose absence was an error and becomes a warning.
    """

    first_test: str = "current_platform.is_xpu()"
    second_test: str = "use_deep_gemm"
    optional_dependency: str = "deep_gemm"

    def rules(self) -> dict[str, Callable[[Document, Document, int], Joined]]:
        return {
            "dispatch-join": self._dispatch_join,
            "warn-instead-of-error": self._warn_instead_of_error,
            "two-additions": self._two_additions,
        }

    def resolve(self, path: str, merged: str, with_base: str) -> Resolution:
        """Join every conflict of ``merged``.

        ``merged`` is the file as git's style ``merge`` writes it, ``with_base`` the same
        with style ``diff3``. Raises `FleetError` with ``details["conflicts"]`` for what no
        rule takes.
        """
        document = Document(parse_segments(merged))
        ancestry = Document(parse_segments(with_base))
        out: list[str] = []
        joins: list[Join] = []
        refused: list[dict[str, object]] = []
        index = 0
        while index < len(document.segments):
            segment = document.segments[index]
            if isinstance(segment, Common):
                out.extend(segment.lines)
                index += 1
                continue
            line = document.span(index, "ours")[0]
            chosen: tuple[str, Joined] | None = None
            misses: list[tuple[int, str, str]] = []
            for name, rule in self.rules().items():
                try:
                    chosen = (name, rule(document, ancestry, index))
                    break
                except Miss as miss:
                    misses.append((miss.met, name, miss.reason))
            if chosen is None:
                met, closest, reason = max(misses, key=lambda miss: miss[0])
                refused.append(
                    {
                        "path": path,
                        "line": line,
                        "ours": "".join(segment.ours),
                        "theirs": "".join(segment.theirs),
                        "closest_rule": closest,
                        "conditions_met": met,
                        "reason": reason,
                        "rules": {name: why for _, name, why in misses},
                    }
                )
                index += 1
                continue
            name, joined = chosen
            consumed = document.segments[index : index + joined.segments]
            conflicts = sum(isinstance(each, Conflict) for each in consumed)
            joins.append(Join(path, name, line, conflicts))
            out.extend(joined.lines)
            index += joined.segments
        if refused:
            raise _refusal(path, refused)
        text = "".join(out)
        if path.endswith(".py"):
            _require_python(path, text)
        return Resolution(text, tuple(joins))

    def _dispatch_join(self, document: Document, _: Document, index: int) -> Joined:
        """``if A: a else: b`` against ``if B: b else: c``, as git cut them into conflicts.

        Gives ``if A: a elif B: b else: c``. The two statements begin in this conflict and
        end together; where git put the borders between them does not matter.
        """
        ours = self._branches(document, index, "ours", self.first_test, 0)
        theirs = self._branches(document, index, "theirs", self.second_test, 2)
        if ours.depth != theirs.depth:
            raise Miss(4, "the two sides are not indented alike")
        if ours.otherwise != theirs.body:
            raise Miss(5, "the release's 'else' is not what the pull request guards")
        rest, segments = _common_end(document, index, ours.last, theirs.last)
        joined = (
            ours.head,
            *ours.body,
            f"{' ' * theirs.depth}elif {self.second_test}:\n",
            *theirs.body,
            theirs.else_line,
            *theirs.otherwise,
            *rest,
        )
        return Joined(joined, segments)

    def _branches(
        self, document: Document, index: int, side: str, test: str, met: int
    ) -> _Branches:
        tree = document.tree(side)
        if tree is None:
            raise Miss(met, f"the side '{side}' is not Python")
        first = document.span(index, side)[0]
        found = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and node.lineno == first and ast.unparse(node.test) == test
        ]
        if not found:
            raise Miss(met, f"the side '{side}' does not begin with 'if {test}:'")
        node = found[0]
        lines = document.lines(side)
        if not node.orelse:
            raise Miss(met + 1, f"'if {test}' of the side '{side}' has no 'else'")
        between = range(node.body[-1].end_lineno or 0, node.orelse[0].lineno)
        places = [place for place in between if lines[place].strip() == "else:"]
        if len(places) != 1 or node.body[0].lineno == first:
            raise Miss(met + 1, f"'if {test}' of the side '{side}' has no plain 'else:'")
        last = node.end_lineno or 0
        return _Branches(
            head=lines[first - 1],
            body=tuple(lines[first : places[0]]),
            else_line=lines[places[0]],
            otherwise=tuple(lines[places[0] + 1 : last]),
            depth=node.col_offset,
            last=last,
        )

    def _warn_instead_of_error(self, document: Document, _: Document, index: int) -> Joined:
        """A RuntimeError for a missing library against a warning: the warning is taken."""
        ours = self._guard(document, index, "ours", 0)
        if not (len(ours.body) == 1 and _is_raise(ours.body[0], "RuntimeError")):
            raise Miss(2, "the release's branch does more than raise a RuntimeError")
        theirs = self._guard(document, index, "theirs", 3)
        if not (len(theirs.body) == 1 and _is_warning(theirs.body[0])):
            raise Miss(5, "the pull request's branch does more than log a warning")
        segment = document.segments[index]
        assert isinstance(segment, Conflict)  # noqa: S101 - what `resolve` calls rules with
        return Joined(segment.theirs)

    def _guard(self, document: Document, index: int, side: str, met: int) -> ast.If:
        tree = document.tree(side)
        first, last = document.span(index, side)
        if tree is None or last < first:
            raise Miss(met, f"the side '{side}' is empty or not Python")
        around = [
            node
            for node in ast.walk(tree)
            if getattr(node, "lineno", last + 1) <= first and last <= getattr(node, "end_lineno", 0)
        ]
        guards = [
            node
            for node in around
            if isinstance(node, ast.If)
            and self.optional_dependency in ast.unparse(node.test)
            and not node.orelse
        ]
        if not guards:
            raise Miss(
                met, f"the side '{side}' is not one 'if' that asks for {self.optional_dependency}"
            )
        if not any(
            isinstance(node, ast.FunctionDef) and node.name == "__init__" for node in around
        ):
            raise Miss(met + 1, f"the side '{side}' is not inside an __init__")
        return guards[-1]

    def _two_additions(self, document: Document, ancestry: Document, index: int) -> Joined:
        """Both sides add elements to one list, or imports: ours first, then theirs."""
        segment = document.segments[index]
        assert isinstance(segment, Conflict)  # noqa: S101 - what `resolve` calls rules with
        if not _code(segment.ours) or not _code(segment.theirs):
            raise Miss(0, "one side is empty: something was removed")
        for side in ("ours", "theirs"):
            if not (_whole_imports(_side(segment, side)) or _elements(document, index, side)):
                raise Miss(1, f"the side '{side}' is neither elements of one list nor imports")
        whole = _enclosing_conflict(document, ancestry, index)
        if whole is None or whole.base is None:
            raise Miss(2, "the common ancestor of this place is not known")
        if not (_contains(whole.ours, whole.base) and _contains(whole.theirs, whole.base)):
            raise Miss(3, "one side changes or removes lines of the common ancestor")
        extra = [line for line in segment.theirs if line.strip() and line not in segment.ours]
        return Joined((*segment.ours, *extra))


def _common_end(
    document: Document, index: int, ours_last: int, theirs_last: int
) -> tuple[tuple[str, ...], int]:
    """Find where two statements that begin in one conflict end together.

    Gives the lines that follow them in the last segment, and the number of segments.
    """
    for end in range(index, len(document.segments)):
        segment = document.segments[end]
        starts = document.span(end, "ours")[0], document.span(end, "theirs")[0]
        ends = document.span(end, "ours")[1], document.span(end, "theirs")[1]
        if ends == (ours_last, theirs_last):
            return (), end - index + 1
        used = ours_last - starts[0] + 1
        together = used == theirs_last - starts[1] + 1
        if isinstance(segment, Common) and together and 0 < used < len(segment.lines):
            return segment.lines[used:], end - index + 1
        if ends[0] > ours_last or ends[1] > theirs_last:
            break
    raise Miss(6, "the two statements do not end at the same place")


def _is_raise(node: ast.stmt, name: str) -> bool:
    return (
        isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func) == name
    )


def _is_warning(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).startswith("logger.warning")
    )


def _enclosing_conflict(document: Document, ancestry: Document, index: int) -> Conflict | None:
    """Return the conflict of style diff3 that the conflict of style merge was cut from."""
    first, last = document.span(index, "ours")
    for other, segment in enumerate(ancestry.segments):
        start, end = ancestry.span(other, "ours")
        if isinstance(segment, Conflict) and start <= first and last <= end:
            return segment
    return None


def _contains(lines: Sequence[str], part: Sequence[str]) -> bool:
    """Tell whether ``part`` occurs in ``lines`` in its order, with insertions allowed."""
    rest = iter(lines)
    return all(line in rest for line in part)


def _whole_imports(lines: Sequence[str]) -> bool:
    if any(line[:1] == " " for line in lines[:1]):
        return False
    try:
        body = ast.parse("".join(lines)).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def _elements(document: Document, index: int, side: str) -> bool:
    """Tell whether a conflict's lines are whole elements of one list, tuple, set or import."""
    tree = document.tree(side)
    if tree is None:
        return False
    first, last = document.span(index, side)
    lines = _code(_side(document.segments[index], side))
    if not all(line.rstrip().endswith(",") or line.strip().startswith("#") for line in lines):
        return False
    for node in ast.walk(tree):
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            parts: Sequence[ast.expr | ast.alias] = node.elts
        elif isinstance(node, ast.ImportFrom):
            parts = node.names
        else:
            continue
        if not (node.lineno < first and last < (node.end_lineno or 0)):
            continue
        inside = [part for part in parts if first <= part.lineno and (part.end_lineno or 0) <= last]
        crossing = [
            part
            for part in parts
            if part not in inside and part.lineno <= last and (part.end_lineno or 0) >= first
        ]
        if inside and not crossing:
            return True
    return False


def _require_python(path: str, text: str) -> None:
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise FleetError(
            f"The joined {path} is not Python",
            found=f"line {error.lineno}: {error.msg}",
            remedy="this is a shape that the rules do not know: name a rebased pull request",
        ) from error


def _refusal(path: str, refused: list[dict[str, object]]) -> FleetError:
    places = "; ".join(
        f"line {each['line']} (closest rule {each['closest_rule']}: {each['reason']})"
        for each in refused
    )
    first = refused[0]
    return FleetError(
        f"{len(refused)} conflict(s) in {path} have a shape that no rule knows: {places}",
        expected="a dispatch join, a warning instead of an error, or two additions to one list",
        found=f"the release has:\n{_excerpt(first['ours'])}\nthe pull request has:\n"
        f"{_excerpt(first['theirs'])}",
        remedy="name a pull request that was rebased onto this ref, or another ref; "
        "nothing was built",
        details={"conflicts": refused},
    )


def _excerpt(text: object, limit: int = 12) -> str:
    lines = str(text).splitlines() or ["(nothing)"]
    more = [f"... {len(lines) - limit} more lines"] if len(lines) > limit else []
    return "\n".join(lines[:limit] + more)
