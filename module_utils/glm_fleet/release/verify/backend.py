# SPDX-License-Identifier: Apache-2.0
"""Is the backend registered, and does the indexer dispatch to it in the right order?"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Union

from ...core.check import Check
from ..dispatch import functions
from .fallback import is_logits_call
from .model import FunctionNode, SourceExpectations, make_check
from .names import Modules, bound_names


def backend_checks(
    tree: Path, before: Mapping[str, str | None], expect: SourceExpectations
) -> list[Check]:
    trees: dict[str, ast.Module] = {}
    for path in (expect.registry, expect.priorities, expect.indexer):
        try:
            trees[path] = ast.parse((tree / path).read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            return [make_check("backend_files_readable", [f"{path}: {error}"])]
    registry, priorities, indexer = trees.values()
    dispatch = _Dispatch(indexer, expect, before.get(expect.indexer) or "")
    return [
        make_check("backend_registered", _not_registered(tree, registry, expect)),
        make_check("backend_in_cuda_priorities", _not_in_priorities(priorities, expect)),
        make_check("prefill_dispatch", dispatch.problems("has_prefill", paged=False)),
        make_check("decode_dispatch", dispatch.problems("has_decode", paged=True)),
        make_check("no_deep_gemm_error", _errors_left(indexer)),
        make_check("fallback_warning", _warning_missing(indexer, expect)),
    ]


def _not_registered(tree: Path, registry: ast.Module, expect: SourceExpectations) -> list[str]:
    for node in registry.body:
        if isinstance(node, ast.ClassDef) and node.name == expect.registry_class:
            for item in node.body:
                if expect.backend in bound_names(item) and isinstance(item, ast.Assign):
                    return _class_missing(tree, item.value, expect)
            return [f"{expect.registry_class} has no {expect.backend}"]
    return [f"{expect.registry} has no {expect.registry_class}"]


def _class_missing(tree: Path, value: ast.expr, expect: SourceExpectations) -> list[str]:
    if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        return [f"{expect.backend} is not a class path"]
    module, _, name = value.value.rpartition(".")
    file = Modules(tree).file(module)
    if file is None:
        return [f"{expect.backend}: there is no module {module}"]
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return []
    return [f"{expect.backend}: {module} has no class {name}"]


def _not_in_priorities(priorities: ast.Module, expect: SourceExpectations) -> list[str]:
    for node in ast.walk(priorities):
        if isinstance(node, FunctionNode) and node.name == expect.priorities_function:
            for part in _reached(node.body, expect.capability_major):
                if isinstance(part, ast.Attribute) and part.attr == expect.backend:
                    return []
            return [
                f"{expect.priorities_function} does not offer {expect.backend} "
                f"for MLA on compute capability {expect.capability_major}.x"
            ]
    return [f"{expect.priorities} has no {expect.priorities_function}"]


def _reached(body: Sequence[ast.stmt], major: int) -> Iterator[ast.AST]:
    """Walk what runs for MLA on a capability; an unknown condition may go either way."""
    for node in body:
        if not isinstance(node, ast.If):
            yield from ast.walk(node)
            continue
        outcome = _known_outcome(node.test, major)
        if outcome is not False:
            yield from _reached(node.body, major)
        if outcome is not True:
            yield from _reached(node.orelse, major)


def _known_outcome(test: ast.expr, major: int) -> bool | None:
    if ast.unparse(test) == "use_mla":
        return True
    if (
        isinstance(test, ast.Compare)
        and ast.unparse(test.left) == "device_capability.major"
        and len(test.ops) == 1
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(test.comparators[0], ast.Constant)
    ):
        return bool(test.comparators[0].value == major)
    return None


_Branch = tuple[Union[ast.expr, None], list[ast.stmt]]


class _Dispatch:
    """The choice between platforms in the indexer: tests in order and what each calls."""

    def __init__(self, indexer: ast.Module, expect: SourceExpectations, before: str) -> None:
        self._expect = expect
        self._function = self._find(indexer)
        self._before = self._find(ast.parse(before))
        self._fallbacks = {
            each.asname or each.name
            for node in ast.walk(indexer)
            if isinstance(node, ast.ImportFrom) and node.module == expect.fallback_module
            for each in node.names
        }

    def _find(self, indexer: ast.Module) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        named = (node for name, node in functions(indexer) if name == self._expect.indexer_function)
        return next(named, None)

    def _needs_first(self, part: str) -> bool:
        """Tell whether the release chooses its other platform in this part."""
        return any(
            test is not None and ast.unparse(test) == self._expect.first_test
            for node in (self._before.body if self._before else [])
            if isinstance(node, ast.If) and ast.unparse(node.test) == part
            for chain in _chains(node.body)
            for test, body in chain
            if "mqa_logits" in ast.unparse(ast.Module(body, []))
        )

    def problems(self, part: str, *, paged: bool) -> list[str]:
        """Tell what is wrong with the dispatch inside ``if <part>:``."""
        expect = self._expect
        if self._function is None:
            return [f"{expect.indexer} has no function {expect.indexer_function}"]
        if expect.support_call not in ast.unparse(self._function):
            return [f"{expect.indexer_function} does not ask {expect.support_call}()"]
        blocks = [
            node
            for node in self._function.body
            if isinstance(node, ast.If) and ast.unparse(node.test) == part
        ]
        chains = [
            chain
            for block in blocks
            for chain in _chains(block.body)
            if any(
                test is not None and ast.unparse(test) == expect.second_test for test, _ in chain
            )
        ]
        if len(chains) != 1:
            return [f"{len(chains)} dispatches on {expect.second_test} inside 'if {part}'"]
        chain = chains[0]
        tests = [ast.unparse(test) if test is not None else "else" for test, _ in chain]
        wanted = [expect.first_test] if self._needs_first(part) else []
        wanted += [expect.second_test, "else"]
        line = getattr(chain[0][0], "lineno", 0)
        if tests != wanted:
            return [f"line {line}: the order is {' -> '.join(tests)}, not {' -> '.join(wanted)}"]
        problems = []
        for test, (_, body) in zip(tests, chain):
            problem = self._wrong_call(test, body, paged)
            if problem:
                problems.append(f"line {line}: in the branch '{test}' {problem}")
        return problems + self._unset(chain)

    def _unset(self, chain: Sequence[_Branch]) -> list[str]:
        """Name what a branch does not set although it is used after the choice.

        A branch must set what every other one sets, unless it was set before; the last one, which
        the pull request brings, what any other one sets.
        """
        assert self._function is not None  # noqa: S101 - `problems` returned without one
        end = max(statement.end_lineno or 0 for _, body in chain for statement in body)
        used = {
            node.id
            for node in ast.walk(self._function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.lineno > end
        }
        first = chain[0][0].lineno if chain[0][0] is not None else 0
        before = {
            node.id
            for node in ast.walk(self._function)
            if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and node.lineno < first
        }
        sets = [_stored(body) & used for _, body in chain]
        problems = []
        for number, (test, _) in enumerate(chain):
            others = [names for place, names in enumerate(sets) if place != number]
            wanted = set.intersection(*others) - before if others else set()
            if number == len(chain) - 1:
                wanted = set.union(*others) if others else set()
            missing = sorted(wanted - sets[number])
            if missing:
                name = ast.unparse(test) if test is not None else "else"
                problems.append(
                    f"line {end}: after the choice {', '.join(missing)} is used, which the branch "
                    f"'{name}' does not set"
                )
        return problems

    def _wrong_call(self, test: str, body: Sequence[ast.stmt], paged: bool) -> str:
        calls = [
            ast.unparse(node.func)
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and is_logits_call(node)
        ]
        if len(calls) != 1:
            return f"{len(calls)} calls compute the logits: {', '.join(calls) or 'none'}"
        call = calls[0]
        if ("paged" in call.rpartition(".")[2]) != paged:
            return f"{call} belongs to the other part"
        is_fallback = call.split(".")[0] in self._fallbacks
        if (test == "else") != is_fallback:
            return f"{call} is {'' if is_fallback else 'not '}the Triton fallback"
        if (test == self._expect.first_test) != ("xpu" in call):
            return f"{call} is the call of another platform"
        if not _assigns(body, "logits"):
            return "no logits are assigned"
        return ""


def _stored(body: Sequence[ast.stmt]) -> set[str]:
    return {
        node.id
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _assigns(body: Sequence[ast.stmt], name: str) -> bool:
    return any(
        name in bound_names(node)
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.stmt)
    )


def _chains(body: Sequence[ast.stmt]) -> Iterator[list[_Branch]]:
    """Yield every if-elif-else below ``body`` as its (test, body) branches."""
    for node in body:
        if isinstance(node, ast.If):
            chain: list[_Branch] = [(node.test, node.body)]
            rest = node.orelse
            while len(rest) == 1 and isinstance(rest[0], ast.If):
                chain.append((rest[0].test, rest[0].body))
                rest = rest[0].orelse
            if rest:
                chain.append((None, rest))
            yield chain
            for _, inner in chain:
                yield from _chains(inner)
        elif not isinstance(node, (*FunctionNode, ast.ClassDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from _chains(getattr(node, part, []))


def _errors_left(indexer: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(indexer):
        if not isinstance(node, ast.If):
            continue
        about = "deep_gemm" in ast.unparse(node.test)
        for statement in node.body:
            if isinstance(statement, ast.Raise) and (about or "DeepGEMM" in ast.unparse(statement)):
                found.append(f"line {statement.lineno}: {ast.unparse(statement)[:80]}")
    return found


def _warning_missing(indexer: ast.Module, expect: SourceExpectations) -> list[str]:
    for node in ast.walk(indexer):
        if isinstance(node, ast.If) and f"not {expect.support_call}()" in ast.unparse(node.test):
            for statement in node.body:
                said = ast.unparse(statement)
                if said.startswith("logger.warning") and expect.warning in said:
                    return []
    return [f"no warning '{expect.warning}' under 'not {expect.support_call}()'"]
