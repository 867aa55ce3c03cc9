# SPDX-License-Identifier: Apache-2.0
"""Is a merged tree what the pull request meant? One named check per question.

The checks read the result and the four versions that it came from; they do not ask the
code that resolved the conflicts.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Union

from .dispatch import functions, split_lines
from .errors import FleetError
from .merge import Conflict, Merge, parse_segments

# An `if`, a `raise RuntimeError(`, its message over some lines, and a `)`.
_ERROR_LINES = 8

_FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Check:
    """One question about the result and its answer."""

    name: str
    passed: bool
    detail: str

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "passed": self.passed, "detail": self.detail}


@dataclass(frozen=True)
class FileVersions:
    """One file of one pull request; None where a version does not have it.

    ``before`` and ``after`` are the release without and with the pull request, ``base``
    and ``head`` the pull request's own beginning and end.
    """

    path: str
    pull: int
    before: str | None
    base: str | None
    head: str | None
    after: str | None


@dataclass(frozen=True)
class Expectations:
    """What the result must have. An empty ``backend`` skips the checks about it."""

    backend: str = "TRITON_MLA_SPARSE"
    registry: str = "vllm/v1/attention/backends/registry.py"
    registry_class: str = "AttentionBackendEnum"
    priorities: str = "vllm/platforms/cuda.py"
    priorities_function: str = "_get_backend_priorities"
    capability_major: int = 8
    indexer: str = "vllm/model_executor/layers/sparse_attn_indexer.py"
    indexer_function: str = "sparse_attn_indexer"
    first_test: str = "current_platform.is_xpu()"
    second_test: str = "use_deep_gemm"
    support_call: str = "is_deep_gemm_supported"
    fallback_module: str = "vllm.v1.attention.ops.mqa_logits_triton"
    warning: str = "using Triton fallback"
    generated_modules: tuple[str, ...] = ("vllm._version",)
    allowed_folders: tuple[str, ...] = ("tests/", "docs/")


def verify_tree(
    tree: Path,
    *,
    changed: Sequence[str],
    before: Mapping[str, str | None],
    versions: Sequence[FileVersions],
    expectations: Expectations,
    merge: Merge,
    decided: Collection[str] = (),
) -> list[Check]:
    """Run every check on the result in ``tree``.

    ``changed`` are the paths that differ from the ref and ``before`` their text there;
    ``merge`` is git's three-way merge of (base, before, head). In the conflicts of the files
    in ``decided`` a person may have given up lines of the release, but not made up others.
    """
    plain = [_without_joins(file, expectations) for file in versions]
    python = {
        path: (tree / path).read_bytes().decode(errors="replace")
        for path in changed
        if path.endswith(".py") and (tree / path).is_file()
    }
    checks = [
        _check("only_python_tests_docs", _foreign_files(changed, expectations)),
        _check("every_changed_file_compiles", _not_python(python)),
        _check("no_undefined_names", _undefined_names(python, before)),
        _check("vllm_imports_exist", _missing_imports(tree, python, before, expectations)),
        _check("every_added_line_present", _missing_lines(plain, expectations)),
        _check("nothing_else_changed", _foreign_changes(plain, changed, merge, decided)),
    ]
    if expectations.backend:
        checks += _backend_checks(tree, before, expectations)
    return checks


def _backend_checks(
    tree: Path, before: Mapping[str, str | None], expect: Expectations
) -> list[Check]:
    trees: dict[str, ast.Module] = {}
    for path in (expect.registry, expect.priorities, expect.indexer):
        try:
            trees[path] = ast.parse((tree / path).read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            return [_check("backend_files_readable", [f"{path}: {error}"])]
    registry, priorities, indexer = trees.values()
    dispatch = _Dispatch(indexer, expect, before.get(expect.indexer) or "")
    return [
        _check("backend_registered", _not_registered(tree, registry, expect)),
        _check("backend_in_cuda_priorities", _not_in_priorities(priorities, expect)),
        _check("prefill_dispatch", dispatch.problems("has_prefill", paged=False)),
        _check("decode_dispatch", dispatch.problems("has_decode", paged=True)),
        _check("no_deep_gemm_error", _errors_left(indexer)),
        _check("fallback_warning", _warning_missing(indexer, expect)),
    ]


def _check(name: str, problems: Sequence[str]) -> Check:
    more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
    return Check(name, not problems, "; ".join(problems[:10]) + more if problems else "ok")


def _foreign_files(changed: Sequence[str], expect: Expectations) -> list[str]:
    return [
        f"{path} is neither Python nor a test nor documentation"
        for path in changed
        if not path.endswith((".py", ".md")) and not path.startswith(expect.allowed_folders)
    ]


def _not_python(python: Mapping[str, str]) -> list[str]:
    problems = []
    for path, text in python.items():
        try:
            compile(text, path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            problems.append(f"{path}: {error}")
    return problems


def _undefined_names(python: Mapping[str, str], before: Mapping[str, str | None]) -> list[str]:
    problems = []
    for path, text in python.items():
        # What the release itself has is not the pull request's fault.
        known = Counter(name for name, _ in _pyflakes(before.get(path) or "", path))
        for name, line in _pyflakes(text, path):
            if known[name] > 0:
                known[name] -= 1
            else:
                problems.append(f"{path}:{line}: {name}")
    return problems


def _pyflakes(text: str, path: str) -> list[tuple[str, int]]:
    try:
        from pyflakes import checker, messages  # type: ignore[import-untyped]
    except ImportError as error:
        raise FleetError(
            "The builder cannot look for undefined names",
            expected="the Python package pyflakes",
            found=str(error),
            remedy="install requirements.txt on the builder",
        ) from error
    kinds = (messages.UndefinedName, messages.UndefinedLocal, messages.UndefinedExport)
    try:
        found = checker.Checker(ast.parse(text), filename=path).messages
    except SyntaxError:
        return []
    return [
        (message.message % message.message_args, message.lineno)
        for message in found
        if isinstance(message, kinds)
    ]


class _Modules:
    """Which names a package tree defines, without importing it."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._names: dict[str, set[str] | None] = {}

    def file(self, module: str) -> Path | None:
        stem = self._tree.joinpath(*module.split("."))
        for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            if path.is_file():
                return path
        return None

    def exists(self, module: str) -> bool:
        return self.file(module) is not None or self._tree.joinpath(*module.split(".")).is_dir()

    def has(self, module: str, name: str) -> bool:
        """Tell whether ``from module import name`` finds something."""
        if name == "*" or self.exists(f"{module}.{name}"):
            return True
        names = self._defined(module)
        return names is None or name in names

    def _defined(self, module: str) -> set[str] | None:
        """Return the names of a module; None when it makes them up (``__getattr__``)."""
        if module in self._names:
            return self._names[module]
        self._names[module] = set()
        file = self.file(module)
        if file is None:
            return set()
        names: set[str] | None = set(dir(object)) | {"__name__", "__file__", "__path__"}
        for node in _module_level(ast.parse(file.read_bytes()).body):
            bound = _bound_names(node)
            if "__getattr__" in bound:
                names = None
                break
            assert names is not None  # noqa: S101 - narrowed for the type checker
            names |= bound
            if isinstance(node, ast.ImportFrom) and any(each.name == "*" for each in node.names):
                package = file.name == "__init__.py"
                inner = self._defined(_absolute(node, module, package))
                if inner is None:
                    names = None
                    break
                names |= inner
        self._names[module] = names
        return names


def _module_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run in a module's own scope, inside if, try, with, for too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, (*_FunctionNode, ast.ClassDef)):
                yield from _module_level(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _module_level(handler.body)


def _bound_names(node: ast.stmt) -> set[str]:
    if isinstance(node, (*_FunctionNode, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(each.asname or each.name).split(".")[0] for each in node.names}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For)):
        targets = [node.target]
    elif isinstance(node, ast.With):
        targets = [item.optional_vars for item in node.items if item.optional_vars]
    return {
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    }


def _absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (1 if package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _wanted_names(path: str, text: str) -> Iterator[tuple[str, str, int]]:
    """Yield (module, name or "", line) of every import of a file."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    package = path.endswith("/__init__.py")
    own = path[: -len("/__init__.py" if package else ".py")].replace("/", ".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield each.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            for each in node.names:
                yield _absolute(node, own, package), each.name, node.lineno


def _missing_imports(
    tree: Path,
    python: Mapping[str, str],
    before: Mapping[str, str | None],
    expect: Expectations,
) -> list[str]:
    modules = _Modules(tree)
    problems = []
    for path, text in python.items():
        known = {each[:2] for each in _wanted_names(path, before.get(path) or "")}
        for module, name, line in _wanted_names(path, text):
            if module.split(".")[0] != "vllm" or (module, name) in known:
                continue
            if module in expect.generated_modules or f"{module}.{name}" in expect.generated_modules:
                continue
            if not modules.exists(module):
                problems.append(f"{path}:{line}: there is no module {module}")
            elif name and not modules.has(module, name):
                problems.append(f"{path}:{line}: {module} does not define {name}")
    return problems


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


def _without_joins(file: FileVersions, expect: Expectations) -> _Plain:
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


def _missing_lines(plain: Sequence[_Plain], expect: Expectations) -> list[str]:
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


def _foreign_changes(
    plain: Sequence[_Plain], changed: Sequence[str], merge: Merge, decided: Collection[str]
) -> list[str]:
    versions = [each.file for each in plain]
    known = {file.path for file in versions if file.head != file.base}
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
        return problems if len(lost) <= _ERROR_LINES else [*problems, "more than an error is lost"]
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


def _not_registered(tree: Path, registry: ast.Module, expect: Expectations) -> list[str]:
    for node in registry.body:
        if isinstance(node, ast.ClassDef) and node.name == expect.registry_class:
            for item in node.body:
                if expect.backend in _bound_names(item) and isinstance(item, ast.Assign):
                    return _class_missing(tree, item.value, expect)
            return [f"{expect.registry_class} has no {expect.backend}"]
    return [f"{expect.registry} has no {expect.registry_class}"]


def _class_missing(tree: Path, value: ast.expr, expect: Expectations) -> list[str]:
    if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        return [f"{expect.backend} is not a class path"]
    module, _, name = value.value.rpartition(".")
    file = _Modules(tree).file(module)
    if file is None:
        return [f"{expect.backend}: there is no module {module}"]
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return []
    return [f"{expect.backend}: {module} has no class {name}"]


def _not_in_priorities(priorities: ast.Module, expect: Expectations) -> list[str]:
    for node in ast.walk(priorities):
        if isinstance(node, _FunctionNode) and node.name == expect.priorities_function:
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

    def __init__(self, indexer: ast.Module, expect: Expectations, before: str) -> None:
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
        return problems

    def _wrong_call(self, test: str, body: Sequence[ast.stmt], paged: bool) -> str:
        calls = [
            ast.unparse(node.func)
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and "mqa_logits" in ast.unparse(node.func)
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


def _assigns(body: Sequence[ast.stmt], name: str) -> bool:
    return any(
        name in _bound_names(node)
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
        elif not isinstance(node, (*_FunctionNode, ast.ClassDef)):
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


def _warning_missing(indexer: ast.Module, expect: Expectations) -> list[str]:
    for node in ast.walk(indexer):
        if isinstance(node, ast.If) and f"not {expect.support_call}()" in ast.unparse(node.test):
            for statement in node.body:
                said = ast.unparse(statement)
                if said.startswith("logger.warning") and expect.warning in said:
                    return []
    return [f"no warning '{expect.warning}' under 'not {expect.support_call}()'"]
