# SPDX-License-Identifier: Apache-2.0
"""Is every added line in the result, and nothing else changed?"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from ..conflict import Conflict, Merge, parse_segments
from ..dispatch import functions, split_lines
from .model import ERROR_LINES, Expectations, FileVersions


def _added_runs(old: str, new: str) -> list[list[str]]:
    """Return the runs of lines that ``new`` adds to ``old``, without blank lines at the ends."""
    before, after = split_lines(old), split_lines(new)
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    return [
        after[start:end]
        for tag, _, _, start, end in matcher.get_opcodes()
        if tag in ("insert", "replace")
    ]


def _plain(line: str, expect: Expectations) -> str:
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


def without_joins(file: FileVersions, expect: Expectations) -> _Plain:
    """Take the pull request's choice out of every ``if A / elif B / else`` of the result.

    The branch ``else`` must be that of the pull request, line by line.
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
        if not (wanted.orelse and found.orelse):
            return _Plain(file, (f"{where}: an 'else' is lost at line {found.lineno}",))
        ends = [_divide(head, wanted), _divide(after, found)]
        last = [node.end_lineno or 0 for node in (wanted, found)]
        fallback = [
            [line.strip() for line in lines[end:stop] if line.strip()]
            for lines, end, stop in zip((head, after), ends, last)
        ]
        if fallback[0] != fallback[1] or _shape(wanted.orelse) != _shape(found.orelse):
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


def missing_lines(plain: Sequence[_Plain], expect: Expectations) -> list[str]:
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
        for run in _added_runs(file.base or "", file.head):
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
                for problem in _beyond_the_joins(merged, file.after, file.path in decided)
            ]
    return sorted(problems)


def _beyond_the_joins(merged: str, after: str, decided: bool) -> list[str]:
    """Compare the result with the plain merge: only its conflicts may look different.

    In the place of a conflict every line must come from one of its sides, and no line of
    the release may be lost that the pull request did not remove.
    """
    result = split_lines(after)
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
        problems += _wrong_in_place(result[position:start], gap, decided)
        position = start + len(lines)
        gap = []
    if gap:
        problems += _wrong_in_place(result[position:], gap, decided)
    elif position != len(result):
        problems.append(f"lines after the end: {result[position].strip()}")
    return problems


def _wrong_in_place(lines: list[str], gap: list[Conflict], decided: bool) -> list[str]:
    have = Counter(line.strip() for line in lines if line.strip())
    ours, theirs, base = (
        Counter(
            line.strip()
            for conflict in gap
            for line in getattr(conflict, side) or ()
            if line.strip()
        )
        for side in ("ours", "theirs", "base")
    )
    # What the pull request only kept counts for the release, which may have removed it.
    foreign = have - (ours + (theirs - base))
    problems = [f"a line that neither side has here: {line}" for line in foreign]
    lost = ours - have - base
    if decided:
        return problems
    # The one thing that a warning may replace is the error about the same library.
    if any(line.startswith("logger.warning") for line in theirs - base) and any(
        line.startswith("raise RuntimeError") for line in ours
    ):
        return problems if len(lost) <= ERROR_LINES else [*problems, "more than an error is lost"]
    return problems + [f"a line of the release is lost: {line}" for line in lost]


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
