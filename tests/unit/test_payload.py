# SPDX-License-Identifier: Apache-2.0
"""Programs for a host's own Python, run by a Python that sees nothing of this repository."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import glm_fleet
import pytest
from glm_fleet.payload import answer_in, program, sources_of

PACKAGE = Path(glm_fleet.__file__).parent


def run(text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-IS", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd="/")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose modules import each other in each of our ways."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name, text in {
        "__init__": '"""Näme."""\n',
        "top": "from . import left, right\nfrom .deep import (\n    VALUE,\n)\n\n\n"
        "def answer(given):\n    from .late import LATE\n\n"
        "    return {'given': given, 'sum': left.ONE + right.TWO + VALUE + LATE}\n",
        "left": "ONE = 1\n",
        "right": "from . import (\n    left,\n)\n\nTWO = left.ONE * 2\n",
        "deep": "VALUE = 4\n",
        "late": "LATE = 8\n",
        "apart": "raise RuntimeError\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_program_carries_what_it_imports_and_nothing_else(package: Path) -> None:
    names = {"small", "small.top", "small.left", "small.right", "small.deep", "small.late"}
    assert set(sources_of("top", package)) == names


def test_a_program_answers_what_the_function_does(package: Path) -> None:
    given = {"text": 'it\'s "ä" \\n \u2028\n{x}', "none": None, "numbers": [1, 2.5, True]}
    text = program("top", "answer", given, package)
    assert text.isascii()
    done = run(text)
    assert answer_in(done.stdout) == {"given": given, "sum": 15}, done.stderr


def test_an_answer_is_found_beside_what_a_shell_writes(package: Path) -> None:
    output = run(program("top", "answer", {}, package)).stdout
    assert answer_in(f"Welcome to gpu01\nno newline{output}bye\n") == {"given": {}, "sum": 15}


def test_no_answer_is_none(package: Path) -> None:
    done = run(program("top", "answer", {}, package).replace("ONE = 1", "ONE = 1 / 0"))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert answer_in(done.stdout) is None
    assert answer_in("glm-fleet answers: {cut off") is None


def test_the_facts_of_a_node_are_complete_in_it() -> None:
    # With a parser, where the product looks for the words: no import may be missed.
    found = sources_of("node", PACKAGE)
    for name, text in found.items():
        for each in ast.walk(ast.parse(text)):
            if isinstance(each, ast.ImportFrom) and each.level:
                modules = [each.module] if each.module else [alias.name for alias in each.names]
                assert {f"glm_fleet.{module}" for module in modules} <= set(found), name
    asked = {"gpus": True, "paths": ["/"], "gateway_url": "http://127.0.0.1:1/", "users": ["root"]}
    node = answer_in(run(program("node", "read", asked, PACKAGE)).stdout)
    assert node["users"]["root"]["exists"]
    assert node["disks"][0]["mount"] == "/"
    assert node["gateway"]["client"]["status"] == 0
