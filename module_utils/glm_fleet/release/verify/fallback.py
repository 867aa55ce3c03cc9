# SPDX-License-Identifier: Apache-2.0
"""Is the fallback that a person resolved the pull request's, with what the release passes now?

The pull request's own call was written beside the call that its base had. Where the release has
since changed what it passes there, the pull request's text compiles and is wrong: it gives the
kernel rows that the release no longer works on. So every such argument must have been replaced, by
one that the release's own branches pass, and nothing else may differ.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence

from ..dispatch import aliases, named


def wrong_fallback(
    wanted: Sequence[ast.stmt],
    found: Sequence[ast.stmt],
    *,
    base: ast.AST,
    release: ast.If,
    scope: ast.AST,
) -> list[str]:
    """Name what is wrong with the statements ``found`` in the place of the pull request's.

    ``base`` has the call that the pull request guards, ``release`` is the release's own choice
    and ``scope`` the function that it stands in.
    """
    call, theirs = _logits_call(found), _logits_call(wanted)
    if call is None or theirs is None or not _same_slots(call, theirs):
        return ["another call than the pull request's"]
    known = aliases(scope)
    present = _expressions([release, *named([release], known)])
    before = _expressions([base])
    problems = []
    replaced: list[ast.expr] = []
    for mine, other in zip(_arguments(call), _arguments(theirs)):
        stale = _stale(other, before, present)
        meant = named([ast.Expr(mine)], known)[0]
        same = ast.dump(other) in (ast.dump(mine), ast.dump(meant.value))
        if same and stale:
            problems.append(f"it passes {ast.unparse(other)}, which the release no longer does")
        elif not same and not stale:
            problems.append(f"it passes {ast.unparse(mine)} for {ast.unparse(other)}")
        elif not same:
            replaced.append(mine)
    if replaced and not any(_in_order(replaced, each) for each in _calls_of(release)):
        given = ", ".join(ast.unparse(each) for each in replaced)
        problems.append(f"no branch of the release passes {given}")
    return problems + _other_statements(wanted, found, release)


def _other_statements(
    wanted: Sequence[ast.stmt], found: Sequence[ast.stmt], release: ast.If
) -> list[str]:
    """Name statements that are neither the pull request's nor the release's."""
    kinds = [[_without_arguments(node) for node in body] for body in (wanted, found)]
    rest = iter(kinds[1])
    lost = [node for node, kind in zip(wanted, kinds[0]) if kind not in rest]
    own = {ast.dump(node) for node in ast.walk(release) if isinstance(node, ast.stmt)}
    extra = [
        node
        for node, kind in zip(found, kinds[1])
        if kind not in kinds[0] and ast.dump(node) not in own
    ]
    return [f"it lost '{ast.unparse(node)[:80]}'" for node in lost] + [
        f"neither side has '{ast.unparse(node)[:80]}'" for node in extra
    ]


def _without_arguments(node: ast.stmt) -> str:
    """Return a statement without what its call of the logits passes."""
    bare = copy.deepcopy(node)
    call = _logits_call([bare])
    if call is not None:
        call.args, call.keywords = [], []
    return ast.dump(bare)


def is_logits_call(node: ast.AST) -> bool:
    """Tell whether a node calls a kernel of the indexer's logits, the pull request's or another."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).removesuffix("_triton").endswith(
        "mqa_logits"
    )


def _logits_call(body: Sequence[ast.stmt]) -> ast.Call | None:
    calls = [node for statement in body for node in ast.walk(statement) if is_logits_call(node)]
    call = calls[0] if len(calls) == 1 else None
    return call if isinstance(call, ast.Call) else None


def _calls_of(release: ast.If) -> list[ast.Call]:
    return [
        node for node in ast.walk(release) if is_logits_call(node) and isinstance(node, ast.Call)
    ]


def _same_slots(first: ast.Call, second: ast.Call) -> bool:
    """Tell whether two calls are of one function, with as many arguments of the same names."""
    return ast.dump(first.func) == ast.dump(second.func) and (
        len(first.args),
        [each.arg for each in first.keywords],
    ) == (len(second.args), [each.arg for each in second.keywords])


def _arguments(call: ast.Call) -> list[ast.expr]:
    """Return what a call passes, the parts of tuples each by itself."""
    given = [*call.args, *(each.value for each in call.keywords)]
    return [
        part
        for each in given
        for part in (each.elts if isinstance(each, ast.Tuple) else [each])
    ]  # fmt: skip


def _expressions(nodes: Sequence[ast.AST]) -> set[str]:
    return {
        ast.dump(each) for node in nodes for each in ast.walk(node) if isinstance(each, ast.expr)
    }


def _stale(argument: ast.expr, before: set[str], present: set[str]) -> bool:
    """Tell whether the pull request passes what only its base's call had."""
    dump = ast.dump(argument)
    plain = isinstance(argument, ast.Constant)
    return not plain and dump in before and dump not in present


def _in_order(wanted: Sequence[ast.expr], call: ast.Call) -> bool:
    rest = iter([ast.dump(each) for each in _arguments(call)])
    return all(ast.dump(each) in rest for each in wanted)
