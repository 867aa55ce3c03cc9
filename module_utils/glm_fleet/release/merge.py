# SPDX-License-Identifier: Apache-2.0
"""Resolving the conflicts of a cherry-pick by structure, never by likeness of text.

A conflicted file is read as a list of segments: text both sides agree on, and conflicts.
Each rule looks at one conflict and what surrounds it and either gives the joined lines or
says which of its conditions failed. A conflict that no rule takes is refused with both
sides and the rule that came closest. Choices between implementations are joined apart,
whatever git makes of them: see `dispatch`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

from .conflict import (
    Common,
    Conflict,
    Document,
    Join,
    Joined,
    Merge,
    RefusedError,
    Versions,
    code_lines,
    parse_segments,
    refuse_file,
    require_python,
    side_text,
)
from .dispatch import Choice, Match, Miss, choices, functions, match, split_lines, unwrap, wrap
from .replacement import replace

_DISPATCH = "dispatch-join"
_REPLACED = "replaced-in-tree"


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

    def rules(self) -> dict[str, Callable[[Document, Document, int], tuple[str, ...]]]:
        return {
            "warn-instead-of-error": self._warn_instead_of_error,
            "two-additions": self._two_additions,
            "addition-after-change": self._addition_after_change,
        }

    def resolve(self, path: str, versions: Versions, merge: Merge) -> Joined:
        """Join every conflict of a file.

        ``merge`` is git's three-way merge. Raises `FleetError` with ``details["conflicts"]``
        for what no rule takes.
        """
        dispatch = _Dispatch.find(path, versions, self.first_test, self.second_test)
        texts = merge(versions.base, versions.ours, dispatch.theirs)
        document, ancestry = (Document(parse_segments(text)) for text in texts)
        out: list[str] = []
        joins: list[Join] = []
        refused: list[dict[str, object]] = []
        for index, segment in enumerate(document.segments):
            if isinstance(segment, Common):
                out.extend(segment.lines)
                continue
            line = document.span(index, "ours")[0]
            try:
                name, joined = self._apply(document, ancestry, index, dispatch)
            except RefusedError as refusal:
                refused.append({"path": path, "line": line, **refusal.report})
                continue
            out.extend(joined)
            joins.append(Join(path, name, line, 1))
        if refused:
            return self._replaced(path, versions, dispatch, refused)
        text = "".join(out)
        share = _share(versions.conflicts - len(joins), len(dispatch.matches))
        for join, conflicts in zip(dispatch.matches, share):
            try:
                text = wrap(
                    text, self.first_test, self.second_test, join, split_lines(versions.theirs)
                )
            except (Miss, SyntaxError) as miss:
                raise refuse_file(path, [_dispatch_report(path, join, versions, miss)]) from miss
            # What the other branch gets and the pull request's does not is named by the rule.
            rule = f"{_DISPATCH} without {', '.join(join.gained)}" if join.gained else _DISPATCH
            joins.append(Join(path, rule, join.ours.first, conflicts))
        if path.endswith(".py"):
            require_python(path, text)
        return Joined(text, tuple(sorted(joins, key=lambda join: join.line)))

    @staticmethod
    def _replaced(
        path: str, versions: Versions, dispatch: _Dispatch, refused: list[dict[str, object]]
    ) -> Joined:
        """Merge a file as syntax trees, whose conflicts no rule takes; else refuse it."""
        if not dispatch.python or dispatch.matches or dispatch.misses:
            raise refuse_file(path, refused)
        try:
            done = replace(versions.base, versions.ours, versions.theirs)
        except Miss as miss:
            for each in refused:
                each["rules"] = {**_reasons(each), _REPLACED: miss.reason}
                if miss.met > 1:
                    each |= {"closest_rule": _REPLACED, "reason": miss.reason}
            raise refuse_file(path, refused) from miss
        share = _share(versions.conflicts, len(done.lines))
        joins = (Join(path, _REPLACED, *each) for each in zip(done.lines, share))
        return Joined(done.text, tuple(joins))

    def _apply(
        self, document: Document, ancestry: Document, index: int, dispatch: _Dispatch
    ) -> tuple[str, tuple[str, ...]]:
        """Give the first rule that takes a conflict, and what it makes of it."""
        if not dispatch.python:
            raise RefusedError(document.segments[index], [(0, "none", "the file is not Python")])
        misses = [dispatch.miss_at(document, index)]
        for name, rule in self.rules().items():
            try:
                return name, rule(document, ancestry, index)
            except Miss as miss:
                misses.append((miss.met, name, miss.reason))
        raise RefusedError(document.segments[index], misses)

    def _warn_instead_of_error(
        self, document: Document, ancestry: Document, index: int
    ) -> tuple[str, ...]:
        """A RuntimeError for a missing library against a warning: the warning is taken.

        What the release added before the error stays.
        """
        ours = self._guard(document, index, "ours", 0)
        if not (len(ours.body) == 1 and _is_raise(ours.body[0], "RuntimeError")):
            raise Miss(2, "the release's branch does more than raise a RuntimeError")
        theirs = self._guard(document, index, "theirs", 3)
        if not (len(theirs.body) == 1 and _is_warning(theirs.body[0])):
            raise Miss(5, "the pull request's branch does more than log a warning")
        segment = document.segments[index]
        assert isinstance(segment, Conflict)  # noqa: S101 - what `resolve` calls rules with
        first = document.span(index, "ours")[0]
        before = segment.ours[: ours.lineno - first]
        whole = _enclosing_conflict(document, ancestry, index)
        if code_lines(before) and (whole is None or whole.base is None):
            raise Miss(5, "the common ancestor of this place is not known")
        if (
            whole is not None
            and whole.base
            and any(line in whole.base for line in code_lines(before))
        ):
            raise Miss(5, "the release moves lines of the common ancestor")
        return (*before, *segment.theirs)

    def _guard(self, document: Document, index: int, side: str, met: int) -> ast.If:
        tree = document.tree(side)
        first, last = document.span(index, side)
        if tree is None or last < first:
            raise Miss(met, f"the side '{side}' is empty or not Python")
        inside = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If)
            and first <= node.lineno <= last
            and last <= (node.end_lineno or 0)
            and self.optional_dependency in ast.unparse(node.test)
            and not node.orelse
        ]
        if not inside:
            raise Miss(
                met, f"the side '{side}' is not one 'if' that asks for {self.optional_dependency}"
            )
        guard = inside[0]
        if side == "theirs":
            lines = document.lines(side)[first - 1 : guard.lineno - 1]
            if any(line.strip() and not line.strip().startswith("#") for line in lines):
                raise Miss(met, "the pull request has other code before its 'if'")
        if not any(
            name.endswith("__init__") and node.lineno < first and last <= (node.end_lineno or 0)
            for name, node in functions(tree)
        ):
            raise Miss(met + 1, f"the side '{side}' is not inside an __init__")
        return guard

    def _two_additions(self, document: Document, ancestry: Document, index: int) -> tuple[str, ...]:
        """Both sides add elements to one list, or imports: ours first, then theirs."""
        segment = document.segments[index]
        assert isinstance(segment, Conflict)  # noqa: S101 - what `resolve` calls rules with
        if not code_lines(segment.ours) or not code_lines(segment.theirs):
            raise Miss(0, "one side is empty: something was removed")
        for side in ("ours", "theirs"):
            if not (_whole_imports(side_text(segment, side)) or _elements(document, index, side)):
                raise Miss(1, f"the side '{side}' is neither elements of one list nor imports")
        whole = _enclosing_conflict(document, ancestry, index)
        if whole is None or whole.base is None:
            raise Miss(2, "the common ancestor of this place is not known")
        if not (_contains(whole.ours, whole.base) and _contains(whole.theirs, whole.base)):
            raise Miss(3, "one side changes or removes lines of the common ancestor")
        extra = [line for line in segment.theirs if line.strip() and line not in segment.ours]
        return (*segment.ours, *extra)

    def _addition_after_change(
        self, document: Document, ancestry: Document, index: int
    ) -> tuple[str, ...]:
        """The release rewrites a place, the pull request only adds statements after it.

        Both are kept when neither touches a name that the other one gives.
        """
        whole = _enclosing_conflict(document, ancestry, index)
        segment = document.segments[index]
        assert isinstance(segment, Conflict)  # noqa: S101 - what `resolve` calls rules with
        if whole is None or not whole.base or whole.theirs[: len(whole.base)] != whole.base:
            raise Miss(0, "the pull request does more than add lines after unchanged ones")
        if (whole.ours, whole.theirs) != (segment.ours, segment.theirs):
            raise Miss(1, "git cuts this place in more than one way")
        added = whole.theirs[len(whole.base) :]
        extra, changed = _statements(added), _statements(whole.ours)
        if not extra or not changed:
            raise Miss(2, "one side is not made of whole statements")
        if extra[0].col_offset != changed[-1].col_offset:
            raise Miss(3, "the two sides are not indented alike")
        # Where the release leaves early, what follows does not miss the additions either.
        if any(isinstance(node, _LEAVING) for each in extra for node in ast.walk(each)):
            raise Miss(4, "the pull request leaves the function or the loop")
        if _names(extra, stored=True) & _names(changed) or _names(changed, stored=True) & _names(
            extra
        ):
            raise Miss(5, "one side uses a name that the other one changes")
        return (*whole.ours, *added)


@dataclass(frozen=True)
class _Dispatch:
    """The choices of a pull request that are joined apart from git's merge.

    ``theirs`` is its text without them; ``misses`` says, in the order of the file, why the
    others could not be matched with one of the release.
    """

    theirs: str
    second_test: str
    python: bool = False
    matches: tuple[Match, ...] = ()
    misses: tuple[Miss, ...] = ()

    @classmethod
    def find(cls, path: str, versions: Versions, first_test: str, second_test: str) -> _Dispatch:
        try:
            base, ours, theirs = (
                ast.parse(text) for text in (versions.base, versions.ours, versions.theirs)
            )
        except (SyntaxError, ValueError):
            return cls(versions.theirs, second_test)
        if not path.endswith(".py"):
            return cls(versions.theirs, second_test)
        options = choices(split_lines(versions.ours), ours, first_test)
        lines = split_lines(versions.theirs)
        matches: list[Match] = []
        misses: list[Miss] = []
        for choice in choices(lines, theirs, second_test):
            try:
                found = match(choice, options, theirs=theirs, base=base, ours=ours)
            except Miss as miss:
                misses.append(miss)
                continue
            if found:
                matches.append(found)
            else:
                misses.append(
                    Miss(4, f"the release has no 'if {first_test}:' around the same call")
                )
        without = "".join(unwrap(lines, [each.theirs for each in matches]))
        return cls(without, second_test, True, tuple(matches), tuple(misses))

    def miss_at(self, document: Document, index: int) -> tuple[int, str, str]:
        """Tell why the choice in a conflict could not be joined: (met, rule, reason)."""
        tree = document.tree("theirs")
        first, last = document.span(index, "theirs")
        left = choices(document.lines("theirs"), tree, self.second_test) if tree else []
        for choice, miss in zip(left, self.misses):
            if choice.first <= last and first <= choice.last:
                return miss.met, _DISPATCH, miss.reason
        reason = f"there is no 'if {self.second_test}:' with an 'else:' of the pull request"
        return 0, _DISPATCH, reason


def _reasons(conflict: dict[str, object]) -> dict[str, object]:
    rules = conflict["rules"]
    return dict(rules) if isinstance(rules, dict) else {}


def _share(total: int, parts: int) -> list[int]:
    """Divide the conflicts that git left among the choices that resolve them together."""
    return [max(0, total) // parts + (place < total % parts) for place in range(parts)]


def _dispatch_report(
    path: str, join: Match, versions: Versions, miss: Exception
) -> dict[str, object]:
    def part(text: str, choice: Choice) -> str:
        return "".join(split_lines(text)[choice.first - 1 : choice.last])

    return {
        "path": path,
        "line": join.ours.first,
        "ours": part(versions.ours, join.ours),
        "theirs": part(versions.theirs, join.theirs),
        "closest_rule": _DISPATCH,
        "conditions_met": 6,
        "reason": str(miss),
        "rules": {_DISPATCH: str(miss)},
    }


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


_LEAVING = (ast.Return, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom, ast.Await)


def _statements(lines: Sequence[str]) -> list[ast.stmt]:
    """Read lines that are whole statements of one block; [] when they are not."""
    code = [line for line in code_lines(lines) if not line.strip().startswith("#")]
    if not code:
        return []
    depth = len(code[0]) - len(code[0].lstrip(" "))
    try:
        body = ast.parse("if True:\n" + "".join(_deeper(lines, depth))).body[0]
    except SyntaxError:
        return []
    assert isinstance(body, ast.If)  # noqa: S101 - written in the line above
    return body.body


def _deeper(lines: Sequence[str], depth: int) -> list[str]:
    return [" " + line if depth == 0 else line for line in lines]


def _names(body: Sequence[ast.stmt], *, stored: bool = False) -> set[str]:
    """Return the names that statements use; with ``stored`` only those they may change."""
    found = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not (stored and isinstance(node.ctx, ast.Load)):
                found.add(node.id)
            elif stored and isinstance(node, (ast.Subscript, ast.Attribute)):
                root: ast.AST = node
                while isinstance(root, (ast.Subscript, ast.Attribute)):
                    root = root.value
                if isinstance(root, ast.Name) and not isinstance(node.ctx, ast.Load):
                    found.add(root.id)
    return found


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
    lines = code_lines(side_text(document.segments[index], side))
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
