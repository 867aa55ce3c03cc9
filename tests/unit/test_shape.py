# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: short functions, short files, and tests that use what is public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("module_utils/glm_fleet", "library", "plugins", "lab")
LONGEST_FUNCTION = 59
LONGEST_FILE = 450
# One list whose order decides: see what stands at its head.
LONGER = {"module_utils/glm_fleet/serving/signatures.py"}


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_a_function_fits_on_a_page() -> None:
    found = [
        f"{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, tree in trees(*CODE)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not found, "divide it into its steps"


def test_a_file_has_one_concern() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / CODE[0]).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert set(found) == LONGER, "divide it where its concerns meet"


def own_names(tree: ast.Module) -> set[str]:
    """Return what a file defines itself: functions, classes, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_tests_use_what_is_public() -> None:
    found = []
    for path, tree in trees("tests"):
        own = own_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom):
                names = (alias.name for alias in node.names if private(alias.name))
                found += [f"{path}:{node.lineno} {name}" for name in names]
    assert not found, "give it a public name where it is an interface, or test through one"
