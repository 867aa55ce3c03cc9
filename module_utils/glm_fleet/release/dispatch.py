# SPDX-License-Identifier: Apache-2.0
"""Joining two choices between implementations of one call, as syntax trees.

The release chooses ``if A: a else: b``, the pull request ``if B: b else: c``, and both grew
from a plain ``b``. Which lines git calls a conflict there depends on its diff algorithm and
on what else moved, so the choice of the pull request is taken out before git merges the
file, and put around the release's ``b`` afterwards.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]


def split_lines(text: str) -> list[str]:
    """Return the lines of ``text`` with their ends; only a line feed ends a line."""
    return re.findall(r"[^\n]*\n|[^\n]+\Z", text)


class Miss(Exception):  # noqa: N818 - an answer, not an error
    """A rule does not apply; ``met`` counts the conditions that held before that."""

    def __init__(self, met: int, reason: str) -> None:
        self.met = met
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Choice:
    """One ``if test: body else: otherwise`` of a function, as lines of its file.

    ``first`` and ``last`` are its lines (from 1), ``divide`` is the line of ``else:``,
    ``depth`` its indentation in columns.
    """

    function: str
    node: ast.If
    first: int
    divide: int
    last: int
    depth: int


@dataclass(frozen=True)
class Match:
    """A choice of the pull request and the choice of the release it is joined with.

    ``gained`` are the keyword arguments that the release's call has since gained, and that the
    pull request's own branch therefore does not get.
    """

    theirs: Choice
    ours: Choice
    gained: tuple[str, ...] = ()


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield (qualified name, node) of every function, in the order of the file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def choices(lines: Sequence[str], tree: ast.Module, test: str) -> list[Choice]:
    """Find every ``if <test>:`` with a plain ``else:``, in the order of the file."""
    found = []
    for name, function in functions(tree):
        for node in ast.walk(function):
            if not isinstance(node, ast.If) or not node.orelse or ast.unparse(node.test) != test:
                continue
            if (
                lines[node.lineno - 1].strip() != f"if {test}:"
                or node.body[0].lineno == node.lineno
            ):
                continue
            between = range(node.body[-1].end_lineno or 0, node.orelse[0].lineno - 1)
            places = [place for place in between if lines[place].strip() == "else:"]
            if len(places) == 1:
                last = node.end_lineno or node.lineno
                found.append(Choice(name, node, node.lineno, places[0] + 1, last, node.col_offset))
    # A function inside another is seen twice; its own name is the longer one.
    unique = {choice.first: choice for choice in sorted(found, key=lambda each: each.function)}
    return [unique[first] for first in sorted(unique)]


def match(
    choice: Choice,
    options: Sequence[Choice],
    *,
    theirs: ast.Module,
    base: ast.Module,
    ours: ast.Module,
) -> Match | None:
    """Find the choice among ``options`` of the release that guards the same statements.

    A call there may have gained keyword arguments. None when the release has these statements
    without a choice: then nothing has to be joined. Raises `Miss` with the condition that failed.
    """
    wanted = _dumps(choice.node.body, aliases(dict(functions(theirs))[choice.function]))
    in_base = dict(functions(base)).get(choice.function)
    if in_base is None or _count_runs(in_base, wanted) != 1:
        raise Miss(3, "what the pull request guards is not what its base had")
    function = dict(functions(ours)).get(choice.function)
    if function is None:
        raise Miss(3, f"the release has no function {choice.function}")
    near = [option for option in options if option.function == choice.function]
    known = aliases(function)
    same = [option for option in near if _dumps(option.node.orelse, known) == wanted]
    if len(same) == 1:
        return Match(choice, same[0])
    if same:
        raise Miss(5, f"the release guards it in {len(same)} places")
    if _count_runs(function, wanted) == 1:
        return None
    plain = named(choice.node.body, aliases(dict(functions(theirs))[choice.function]))
    grown = [(option, _gained(named(option.node.orelse, known), plain)) for option in near]
    found = [(option, more) for option, more in grown if more]
    if len(found) == 1:
        return Match(choice, *found[0])
    raise Miss(5, "the release's 'else' is not what the pull request guards")


def unwrap(lines: Sequence[str], found: Sequence[Choice]) -> list[str]:
    """Replace each choice by its body, one level less deep."""
    out = list(lines)
    for choice in sorted(found, key=lambda each: -each.first):
        body = lines[choice.first : choice.divide - 1]
        depth = choice.node.body[0].col_offset
        out[choice.first - 1 : choice.last] = shift(body, choice.depth - depth)
    return out


def wrap(
    text: str, first_test: str, second_test: str, join: Match, their_lines: Sequence[str]
) -> str:
    """Put the pull request's test and its ``else`` around the release's ``else``.

    ``text`` is the file merged without the choice. Raises `Miss` when the release's choice
    is no longer in it, or when another indentation would change a string.
    """
    lines = split_lines(text)
    wanted = ast.dump(join.ours.node)
    places = [
        choice
        for choice in choices(lines, ast.parse(text), first_test)
        if choice.function == join.ours.function and ast.dump(choice.node) == wanted
    ]
    if len(places) != 1:
        raise Miss(6, "another change touches the release's choice")
    place = places[0]
    indent = " " * place.depth
    otherwise = shift(
        their_lines[join.theirs.divide : join.theirs.last], place.depth - join.theirs.depth
    )
    lines[place.divide - 1] = f"{indent}elif {second_test}:\n"
    lines[place.last : place.last] = [f"{indent}else:\n", *otherwise]
    joined = "".join(lines)
    after = [each for each in ast.walk(ast.parse(joined)) if isinstance(each, ast.If)]
    chain = next(each for each in after if each.lineno == place.first)
    second = chain.orelse[0]
    assert isinstance(second, ast.If)  # noqa: S101 - written two lines above
    if _dumps(second.orelse) != _dumps(join.theirs.node.orelse):
        raise Miss(6, "another indentation changes what the pull request's 'else' means")
    return joined


def shift(lines: Sequence[str], columns: int) -> list[str]:
    """Indent lines by ``columns``, or dedent when negative; blank lines stay."""
    out = []
    for line in lines:
        if columns >= 0:
            out.append(" " * columns + line if line.strip() else line)
        elif line.strip() and line[:-columns].strip():
            raise Miss(6, "a line is less deep than the choice it belongs to")
        else:
            out.append(line[-columns:] if line.strip() else line)
    return out


def named(body: Sequence[ast.stmt], known: dict[str, ast.expr]) -> list[Any]:
    """Return copies of statements with every alias replaced by what it stands for."""
    names = _Names(known)
    return [names.visit(copy.deepcopy(node)) for node in body]


def _dumps(body: Sequence[ast.stmt], known: dict[str, ast.expr] | None = None) -> list[str]:
    return [ast.dump(node) for node in named(body, known or {})]


def _gained(ours: Sequence[ast.stmt], theirs: Sequence[ast.stmt]) -> tuple[str, ...]:
    """Return the keyword arguments that calls of ``theirs`` gained in ``ours``.

    Empty when there is another difference, or none.
    """
    if len(ours) != len(theirs):
        return ()
    gained: list[str] = []
    for mine, other in zip(ours, theirs):
        mine = copy.deepcopy(mine)
        for number, known in enumerate(_calls(other)):
            # Looked up anew: a new argument may have brought calls of its own, which are gone now.
            call = next(iter(_calls(mine)[number:]), None)
            if call is None:
                return ()
            names = {each.arg for each in known.keywords}
            new = [each for each in call.keywords if each.arg and each.arg not in names]
            call.keywords = [each for each in call.keywords if each not in new]
            gained += [str(each.arg) for each in new]
        if ast.dump(mine) != ast.dump(other):
            return ()
    return tuple(gained)


def _calls(node: ast.AST) -> list[ast.Call]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Call)]


def _count_runs(function: Function, wanted: Sequence[str]) -> int:
    """Count where these statements stand one after the other in a function."""
    known = aliases(function)
    count = 0
    for node in ast.walk(function):
        for part in ("body", "orelse", "finalbody"):
            block = getattr(node, part, None)
            if isinstance(block, list):
                dumps = _dumps(block, known)
                spots = range(len(dumps) - len(wanted) + 1)
                count += sum(dumps[at : at + len(wanted)] == list(wanted) for at in spots)
    return count


class _Names(ast.NodeTransformer):
    def __init__(self, known: dict[str, ast.expr]) -> None:
        self._known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = self._known.get(node.id) if isinstance(node.ctx, ast.Load) else None
        return copy.deepcopy(known) if known is not None else node


def aliases(function: ast.AST) -> dict[str, ast.expr]:
    """Return the names that stand for one attribute all through a function.

    ``x = a.b`` counts when neither ``x`` nor ``a`` is bound again and no ``.b`` is set.
    """
    bound: dict[str, int] = {}
    stored = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound[node.id] = bound.get(node.id, 0) + 1
        elif isinstance(node, ast.arg):
            bound[node.arg] = bound.get(node.arg, 0) + 1
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            stored.add(node.attr)
    found: dict[str, ast.expr] = {}
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and bound[node.targets[0].id] == 1
            and bound.get(node.value.value.id, 0) == 1
            and node.value.attr not in stored
        ):
            found[node.targets[0].id] = node.value
    return found
