# SPDX-License-Identifier: Apache-2.0
"""A pull request that only replaces conditions and imported names, merged as syntax trees.

Where a release has rewritten what stands around them, git's lines no longer meet. The syntax
trees of the pull request's own beginning and end say which condition of which function became
which other one, and that is done to the release's function.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Union

from .dispatch import Miss, functions, split_lines

_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_HEADED = (ast.If, ast.While)


@dataclass(frozen=True)
class Condition:
    """One ``if`` or ``while``: ``function`` names its function, ``calls`` what it guards."""

    function: str
    old: str
    text: str
    calls: frozenset[str]


@dataclass(frozen=True)
class Import:
    """Names that one ``from module import`` loses and gains."""

    module: str
    level: int
    lost: tuple[str, ...]
    gained: tuple[str, ...]


Edit = Union[Condition, Import]


@dataclass(frozen=True)
class Replaced:
    """The merged text, and the lines (from 1) of the release's text that were edited."""

    text: str
    lines: tuple[int, ...]


def replace(base: str, ours: str, theirs: str) -> Replaced:
    """Do to ``ours`` what made ``theirs`` of ``base``.

    Raises `Miss` when that is more than conditions and imported names, or when the release has
    no such condition, or several.
    """
    edits = _edits(base, theirs)
    if not edits:
        raise Miss(0, "the pull request changes no code")
    text, lines = ours, []
    for condition in (each for each in edits if isinstance(each, Condition)):
        text, line = _set_condition(text, condition)
        lines.append(line)
    for names in (each for each in edits if isinstance(each, Import)):
        text, line = _set_names(text, names)
        lines.append(line)
    made = _edits(ours, text)
    wanted = [each for each in edits if isinstance(each, Condition)]
    if [(each.function, each.old, each.text) for each in made if isinstance(each, Condition)] != [
        (each.function, each.old, each.text) for each in wanted
    ]:
        raise Miss(5, "the result does not differ from the release as the pull request does")
    return Replaced(text, tuple(sorted(lines)))


def _edits(before: str, after: str) -> list[Edit]:
    """Tell what became of conditions and imports; `Miss` when there is more."""
    try:
        trees = ast.parse(before), ast.parse(after)
    except (SyntaxError, ValueError):
        raise Miss(0, "the file is not Python") from None
    edits: list[Edit] = []
    places: set[int] = set()
    for function, old, new in _pairs(trees[0].body, trees[1].body, ""):
        if isinstance(old, ast.ImportFrom) and isinstance(new, ast.ImportFrom):
            edits.append(_import_edit(old, new))
            places.update(range(new.lineno, (new.end_lineno or 0) + 1))
        elif isinstance(old, _HEADED) and isinstance(new, _HEADED):
            text = ast.get_source_segment(after, new.test) or ""
            edits.append(Condition(function, ast.dump(old.test), text, _calls(old.body)))
            places.update(range(new.lineno, (new.test.end_lineno or 0) + 1))
    _only_there(before, after, places)
    return edits


def _pairs(
    before: Sequence[ast.AST], after: Sequence[ast.AST], function: str
) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Yield (function, old, new) of every statement whose own head differs."""
    if len(before) != len(after):
        raise Miss(0, "the pull request adds or removes statements")
    for old, new in zip(before, after):
        if ast.dump(old) == ast.dump(new):
            continue
        both_import = isinstance(old, ast.ImportFrom) and isinstance(new, ast.ImportFrom)
        if type(old) is not type(new) or not (both_import or hasattr(old, "body")):
            raise Miss(0, "the pull request changes more than conditions and imports")
        if both_import:
            yield function, old, new
            continue
        if _head(old) != _head(new):
            if not isinstance(old, _HEADED):
                raise Miss(0, "the pull request changes more than conditions and imports")
            yield function, old, new
        name = getattr(old, "name", "") if hasattr(old, "decorator_list") else ""
        inside = f"{function}.{name}".strip(".") if name else function
        for part in _BLOCKS:
            yield from _pairs(getattr(old, part, []), getattr(new, part, []), inside)


def _head(node: ast.AST) -> str:
    """Return a statement without what stands inside it."""
    bare = copy.copy(node)
    for part in _BLOCKS:
        if hasattr(bare, part):
            setattr(bare, part, [])
    return ast.dump(bare)


def _import_edit(old: ast.ImportFrom, new: ast.ImportFrom) -> Import:
    if (old.module, old.level) != (new.module, new.level):
        raise Miss(0, "the pull request imports from another module")
    if any(each.asname for each in (*old.names, *new.names)):
        raise Miss(0, "the pull request changes an import with 'as'")
    before, after = [[each.name for each in node.names] for node in (old, new)]
    return Import(
        old.module or "",
        old.level,
        tuple(name for name in before if name not in after),
        tuple(name for name in after if name not in before),
    )


def _calls(body: Sequence[ast.stmt]) -> frozenset[str]:
    return frozenset(
        ast.unparse(node.func)
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    )


def _only_there(before: str, after: str, places: set[int]) -> None:
    """Refuse changed comments and blank lines too: they would be lost without a word."""
    kept = [line for place, line in enumerate(split_lines(after), 1) if place not in places]
    rest = iter(split_lines(before))
    if not all(line in rest for line in kept):
        raise Miss(0, "the pull request changes comments beside conditions and imports")


def _set_condition(text: str, wanted: Condition) -> tuple[str, int]:
    tree = ast.parse(text)
    function = tree if not wanted.function else dict(functions(tree)).get(wanted.function)
    found = [
        node
        for node in ast.walk(function or ast.Module([], []))
        if isinstance(node, _HEADED) and ast.dump(node.test) == wanted.old
    ]
    if len(found) != 1:
        where = wanted.function or "the module"
        raise Miss(2, f"the release has {len(found)} such conditions in {where}")
    node = found[0]
    if not wanted.calls <= _calls(node.body):
        raise Miss(3, "the release's condition guards another call")
    lines = split_lines(text)
    test = node.test
    first, last = test.lineno - 1, (test.end_lineno or 0) - 1
    # Columns of a syntax tree count bytes.
    head = lines[first].encode()[: test.col_offset].decode()
    tail = lines[last].encode()[test.end_col_offset :].decode()
    lines[first : last + 1] = [f"{head}{wanted.text}{tail}"]
    return "".join(lines), node.lineno


def _set_names(text: str, wanted: Import) -> tuple[str, int]:
    """Put the gained names after the lost ones, which stay where the release still uses them."""
    tree = ast.parse(text)
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        and (node.module or "", node.level) == (wanted.module, wanted.level)
    ]
    if len(found) != 1:
        raise Miss(2, f"the release imports from {wanted.module} in {len(found)} places")
    places = {each.name: each.lineno for each in found[0].names}
    if len({*places.values()}) != len(places) or found[0].lineno in places.values():
        raise Miss(3, f"the release's imports from {wanted.module} are not one a line")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lost = [name for name in wanted.lost if name in places]
    if not lost:
        raise Miss(3, f"the release no longer imports {', '.join(wanted.lost) or 'these names'}")
    new = [name for name in wanted.gained if name not in places]
    lines = split_lines(text)
    after = places[lost[-1]]
    indent = lines[after - 1][: len(lines[after - 1]) - len(lines[after - 1].lstrip())]
    lines[after:after] = [f"{indent}{name},\n" for name in new]
    for name in lost:
        if name not in used:
            lines[places[name] - 1] = ""
    return "".join(lines), found[0].lineno
