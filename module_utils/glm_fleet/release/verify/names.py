# SPDX-License-Identifier: Apache-2.0
"""Does every name exist that the changed files use?"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...core.errors import FleetError
from .model import FunctionNode, SourceExpectations


def undefined_names(python: Mapping[str, str], before: Mapping[str, str | None]) -> list[str]:
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
        from pyflakes import checker, messages
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


class Modules:
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
            bound = bound_names(node)
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
            if not isinstance(node, (*FunctionNode, ast.ClassDef)):
                yield from _module_level(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _module_level(handler.body)


def bound_names(node: ast.stmt) -> set[str]:
    if isinstance(node, (*FunctionNode, ast.ClassDef)):
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


def missing_imports(
    tree: Path,
    python: Mapping[str, str],
    before: Mapping[str, str | None],
    expect: SourceExpectations,
) -> list[str]:
    modules = Modules(tree)
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
