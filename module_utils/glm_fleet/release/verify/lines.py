# SPDX-License-Identifier: Apache-2.0
"""Is every added line in the result, and nothing else changed?"""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from ..conflict import Conflict, Merge, parse_segments
from ..dispatch import functions, split_lines
from .fallback import is_logits_call, wrong_fallback
from .model import ERROR_LINES, FileVersions, SourceExpectations


def _changed_runs(old: str, new: str) -> list[tuple[list[str], list[str]]]:
    """Return (lines of ``old``, lines of ``new`` in their place) wherever ``new`` adds lines."""
    before, after = split_lines(old), split_lines(new)
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    return [
        (before[first:last], after[start:end])
        for tag, first, last, start, end in matcher.get_opcodes()
        if tag in ("insert", "replace")
    ]


def _plain(line: str, expect: SourceExpectations) -> str:
    """Read ``elif B:`` as ``if B:``: the one word that a dispatch join changes."""
    stripped = line.strip()
    return f"if {expect.second_test}:" if stripped == f"elif {expect.second_test}:" else stripped


@dataclass(frozen=True)
class _Plain:
    """A file whose three-way choices were taken out of head and result, so that what is
    left must be git's plain merge. ``problems`` says where a choice is not the same.
    """

    file: FileVersions
    problems: tuple[str, ...] = ()


def without_joins(
    file: FileVersions, expect: SourceExpectations, *, decided: bool = False
) -> _Plain:
    """Take the pull request's choice out of every ``if A / elif B / else`` of the result.

    The branch ``else`` must be that of the pull request, line by line. Where a person decided, it
    may pass what the release passes now, and must where the pull request's text no longer fits.
    """
    if file.base is None or not file.head or not file.after or not file.path.endswith(".py"):
        return _Plain(file)
    try:
        theirs = _tests_on(file.head, expect.second_test)
        result = _tests_on(file.after, expect.second_test)
    except (SyntaxError, ValueError):
        return _Plain(file)
    if [where for where, _ in theirs] != [where for where, _ in result]:
        return _Plain(file, (f"not every 'if {expect.second_test}' is where it was",))
    head, after = split_lines(file.head), split_lines(file.after)
    problems = []
    for (where, wanted), (_, found) in reversed(list(zip(theirs, result))):
        if not after[found.lineno - 1].lstrip().startswith("elif "):
            continue
        # A pull request that was rebased brings the three-way choice itself.
        if head[wanted.lineno - 1].lstrip().startswith("elif "):
            continue
        if not (wanted.orelse and found.orelse):
            return _Plain(file, (f"{where}: an 'else' is lost at line {found.lineno}",))
        ends = [_divide(head, wanted), _divide(after, found)]
        last = [node.end_lineno or 0 for node in (wanted, found)]
        # As deep as the choice stands in each, and alike within.
        fallback = [
            _code(textwrap.dedent("".join(lines[end:stop])).splitlines())
            for lines, end, stop in zip((head, after), ends, last)
        ]
        if decided:
            said = _decided_fallback(file, expect, where, wanted, found)
            problems += [f"{where}: line {ends[1]}: in the 'else' {each}" for each in said]
        elif fallback[0] != fallback[1] or _shape(wanted.orelse) != _shape(found.orelse):
            problems.append(f"{where}: line {ends[1]}: another 'else' than the pull request's")
        after[found.lineno - 1] = after[found.lineno - 1].split("elif ")[0] + "else:\n"
        del after[ends[1] - 1 : last[1]]
        surplus = wanted.body[0].col_offset - wanted.col_offset
        body = [
            line[surplus:] if line.strip() else line for line in head[wanted.lineno : ends[0] - 1]
        ]
        head[wanted.lineno - 1 : last[0]] = body
    plain = replace(file, head="".join(head), after="".join(after))
    return _Plain(plain, tuple(problems))


def _decided_fallback(
    file: FileVersions, expect: SourceExpectations, where: str, wanted: ast.If, found: ast.If
) -> list[str]:
    """Compare a fallback that a person resolved with both sides of the conflict."""
    scope = dict(functions(ast.parse(file.before or ""))).get(where)
    call = {ast.unparse(node.func) for part in found.body for node in ast.walk(part)
            if is_logits_call(node) and isinstance(node, ast.Call)}  # fmt: skip
    choices = [
        node
        for node in ast.walk(scope or ast.Module([], []))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == expect.first_test
        and call & {ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
    ]
    if scope is None or len(choices) != 1:
        return [f"{len(choices)} choices of the release could be meant"]
    # The call that the pull request guards, as it stood in its base.
    guarded = ast.Module(wanted.body, [])
    return wrong_fallback(
        wanted.orelse, found.orelse, base=guarded, release=choices[0], scope=scope
    )


def _tests_on(text: str, test: str) -> list[tuple[str, ast.If]]:
    """Return (function, node) of every ``if`` or ``elif`` on ``test`` with an ``else``."""
    found: dict[int, tuple[str, ast.If]] = {}
    for name, function in functions(ast.parse(text)):
        for node in ast.walk(function):
            if isinstance(node, ast.If) and ast.unparse(node.test) == test:
                found[node.lineno] = (name, node)
    return [found[line] for line in sorted(found)]


def _divide(lines: Sequence[str], node: ast.If) -> int:
    """Return the line (from 1) of the ``else:`` of a choice."""
    for place in range(node.body[-1].end_lineno or 0, node.orelse[0].lineno):
        if lines[place].strip() == "else:":
            return place + 1
    return node.orelse[0].lineno


def _shape(body: Sequence[ast.stmt]) -> list[str]:
    return [ast.dump(node) for node in body]


def missing_lines(plain: Sequence[_Plain], expect: SourceExpectations) -> list[str]:
    problems = []
    for file in (each.file for each in plain):
        if file.head is None:
            if file.after is not None:
                problems.append(f"{file.path}: the pull request removes it")
            continue
        if file.after is None:
            problems.append(f"{file.path}: missing")
            continue
        have = [_plain(line, expect) for line in split_lines(file.after)]
        position = 0
        for _, run in _changed_runs(file.base or "", file.head):
            for line in run:
                wanted = _plain(line, expect)
                if not wanted:
                    continue
                try:
                    position = have.index(wanted, position) + 1
                except ValueError:
                    problems.append(f"{file.path}: missing or out of order: {wanted}")
    return problems


def foreign_changes(
    plain: Sequence[_Plain],
    changed: Sequence[str],
    merge: Merge,
    decided: Collection[str],
    corrected: Collection[str] = (),
) -> list[str]:
    """Name what differs from git's plain merge outside the joins.

    Files that only a correction changes are in ``corrected``: another check reads those.
    """
    versions = [each.file for each in plain]
    known = {file.path for file in versions if file.head != file.base} | {*corrected}
    problems = [f"{path}: the pull request does not touch it" for path in {*changed} - known]
    for each in plain:
        file = each.file
        problems += [f"{file.path}: {problem}" for problem in each.problems]
        if file.path not in changed and file.before == file.after and file.head != file.base:
            problems.append(f"{file.path}: the pull request changes it, the result does not")
        if file.head is None or file.after is None:
            continue
        if file.before is None and file.base is None:
            if file.after != file.head:
                problems.append(f"{file.path}: differs from the pull request's new file")
        elif file.before is None or file.base is None:
            problems.append(f"{file.path}: only one side has it")
        else:
            merged = merge(file.base, file.before, file.head)[1]
            problems += [
                f"{file.path}: {problem}"
                for problem in _beyond_the_joins(file, merged, file.path in decided)
            ]
    return sorted(problems)


def _beyond_the_joins(file: FileVersions, merged: str, decided: bool) -> list[str]:
    """Compare the result with the plain merge: only its conflicts may look different.

    In the place of a conflict every line must come from one of its sides, and no line of
    the release may be lost that the pull request did not remove.
    """
    result = split_lines(file.after or "")
    imports = _imported(file.before or "") if file.path.endswith(".py") else frozenset()
    position = 0
    problems: list[str] = []
    segments = parse_segments(merged)
    gap: list[Conflict] = []
    for index, segment in enumerate(segments):
        if isinstance(segment, Conflict):
            gap.append(segment)
            continue
        lines = list(segment.lines)
        last = index == len(segments) - 1
        start = _find(result, lines, position, at_end=last, exact=not gap)
        if start is None:
            near = _first_difference(result, lines, position)
            return [*problems, f"changed outside the conflicts, near {near}"]
        problems += _wrong_in_place(result[position:start], gap, decided, imports)
        position = start + len(lines)
        gap = []
    if gap:
        problems += _wrong_in_place(result[position:], gap, decided, imports)
    elif position != len(result):
        problems.append(f"lines after the end: {result[position].strip()}")
    return problems


def _imported(text: str) -> frozenset[str]:
    """Return the lines of a file that are one imported name each."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return frozenset()
    lines = split_lines(text)
    return frozenset(
        lines[name.lineno - 1].rstrip()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if lines[name.lineno - 1].strip() == f"{name.name},"
    )


def _wrong_in_place(
    lines: list[str], gap: list[Conflict], decided: bool, imports: frozenset[str]
) -> list[str]:
    """Name what is wrong in the place of conflicts.

    The result must weave both sides: the release's lines and the pull request's additions each
    in their order and with their indentation, the release's first. Where a person decided,
    only lines that neither side has are named.
    """
    place = _Place(
        *(
            [line for conflict in gap for line in getattr(conflict, side) or ()]
            for side in ("ours", "theirs", "base")
        )
    )
    if decided:
        return place.made_up(lines)
    return place.badly_woven(_code(lines), imports)


def _code(lines: Sequence[str]) -> list[str]:
    return [line.rstrip() for line in lines if line.strip()]


class _Place:
    """The lines of both sides and of their ancestor in the place of conflicts."""

    def __init__(self, ours: list[str], theirs: list[str], base: list[str]) -> None:
        self._ours, self._theirs, self._base = _code(ours), _code(theirs), _code(base)
        runs = _changed_runs("".join(base), "".join(theirs))
        self._runs = [(_code(old), _code(new)) for old, new in runs]
        self._added = Counter(line for _, run in self._runs for line in run)
        # What the pull request removes of the ancestor goes, though the release kept it.
        self._removed = Counter(self._base) - Counter(self._theirs)

    def made_up(self, lines: Sequence[str]) -> list[str]:
        """Name lines that neither side has, whatever their order and indentation."""

        def count(side: Sequence[str]) -> Counter[str]:
            return Counter(line.strip() for line in side)

        sides = count(self._ours) + (count(self._theirs) - count(self._base))
        return [
            f"a line that neither side has here: {line}"
            for line in Counter(each.strip() for each in lines if each.strip()) - sides
        ]

    def badly_woven(self, found: list[str], imports: frozenset[str]) -> list[str]:
        """Name what is lost, moved, indented anew or made up.

        A name that the pull request no longer imports may stay: the release may still use it.
        """
        gone = Counter({line: n for line, n in self._removed.items() if line not in imports})
        allowed = (Counter(self._ours) - gone) + self._added
        problems = [
            f"a line that neither side has here: {line.strip()}"
            for line in Counter(found) - allowed
        ]
        guard = self._guard()
        kept = [line for line, own in zip(self._ours, guard) if not own]
        lost = _out_of_order(_without(kept, self._removed), found)
        problems += [f"a line of the release is lost or moved: {line.strip()}" for line in lost]
        for old, run in self._runs:
            problems += self._misplaced(old, run, found)
        return problems

    def _guard(self) -> list[bool]:
        """Tell which lines of the release are its error, where the pull request warns instead."""
        own = [False] * len(self._ours)
        raised = [n for n, line in enumerate(self._ours) if line.lstrip().startswith("raise Runt")]
        warns = any(line.lstrip().startswith("logger.warning") for line in self._added)
        if len(raised) != 1 or not warns:
            return own
        first = raised[0]
        depth = _depth(self._ours[first])
        # The condition right above it, which may go over several lines.
        for number in range(first - 1, max(-1, first - ERROR_LINES), -1):
            if _depth(self._ours[number]) < depth and self._ours[number].lstrip().startswith("if "):
                first, depth = number, _depth(self._ours[number])
                break
        last = raised[0] + 1
        while last < len(self._ours) and (
            _depth(self._ours[last]) > depth or self._ours[last].strip() in (")", "):")
        ):
            last += 1
        return [first <= number < last for number in range(len(own))]

    def _misplaced(self, old: list[str], run: list[str], found: list[str]) -> list[str]:
        """Tell whether an addition of the pull request is not whole, or not in its place.

        That is the place of the lines that it replaces, else after what the release added.
        """
        wanted = [line for line in run if line not in self._ours] or run
        if not wanted:
            return []
        starts = [
            start
            for start in range(len(found) - len(wanted) + 1)
            if found[start : start + len(wanted)] == wanted
        ]
        if not starts:
            return [f"an addition of the pull request is not whole: {wanted[0].strip()}"]
        before = self._line_before(old)
        if before is not None:
            if any((found[start - 1] if start else "") in before for start in starts):
                return []
            return [f"an addition of the pull request is elsewhere: {wanted[0].strip()}"]
        own = set(self._ours) - set(self._base) - set(self._theirs)
        after = [found[start + len(wanted) :][:1] for start in starts]
        if all(line and line[0] in own for line in after):
            return [
                f"an addition of the pull request stands before the release's: {wanted[0].strip()}"
            ]
        return []

    def _line_before(self, old: list[str]) -> tuple[str, ...] | None:
        """Return what may stand before the lines that come in the place of ``old``.

        None where the release does not have those lines, or has them in several places.
        """
        starts = [
            start
            for start in range(len(self._ours) - len(old) + 1)
            if old and self._ours[start : start + len(old)] == old
        ]
        if len(starts) != 1:
            return None
        # An import that the release still needs stays before the one that replaces it.
        return (self._ours[starts[0] - 1] if starts[0] else "", old[-1])


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _without(lines: Sequence[str], some: Counter[str]) -> list[str]:
    """Return ``lines`` without as many of each as ``some`` counts."""
    left = Counter(some)
    out = []
    for line in lines:
        if left[line] > 0:
            left[line] -= 1
        else:
            out.append(line)
    return out


def _out_of_order(wanted: Sequence[str], found: Sequence[str]) -> list[str]:
    """Return the lines of ``wanted`` that do not stand in ``found`` in their order."""
    position, lost = 0, []
    for line in wanted:
        try:
            position = found.index(line, position) + 1
        except ValueError:
            lost.append(line)
    return lost


def _find(
    result: list[str], lines: list[str], position: int, *, at_end: bool, exact: bool
) -> int | None:
    """Return where ``lines`` stand in ``result`` at or after ``position``."""
    starts: Sequence[int] = range(position, len(result) - len(lines) + 1)
    if exact:
        starts = [position]
    elif at_end:
        starts = [len(result) - len(lines)]
    for start in starts:
        if start >= position and result[start : start + len(lines)] == lines:
            return start
    return None


def _first_difference(result: list[str], lines: list[str], position: int) -> str:
    """Name the first place where ``result`` leaves ``lines``, which begin somewhere in it."""
    matcher = SequenceMatcher(None, lines, result[position:], autojunk=False)
    begun = False
    for tag, first, last, start, end in matcher.get_opcodes():
        if tag == "equal":
            begun = True
        elif begun or tag != "insert":
            there = result[position + start : position + end] or lines[first:last]
            said = next((line.strip() for line in there if line.strip()), "(a blank line)")
            return f"line {position + start + 1}: {said}"
    return f"line {position + 1}"
