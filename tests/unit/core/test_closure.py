# SPDX-License-Identifier: Apache-2.0
"""What travels to a host: programs for its own Python, and the library that its units start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import glm_fleet
import pytest
from glm_fleet.core.closure import ENTRY_POINTS, closure, digest, module_name
from glm_fleet.core.files import differing_files, hashes_of, replace_tree
from glm_fleet.node.remote_call import answer_in, program

PACKAGE = Path(glm_fleet.__file__).parent


def run(text: str) -> subprocess.CompletedProcess[str]:
    """Run a program with a Python that sees nothing of this repository."""
    command = [sys.executable, "-IS", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd="/")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose modules import each other in each of our ways."""
    folder = tmp_path / "small"
    for name, text in {
        "__init__": '"""Näme."""\n',
        "top": "from . import left\nfrom .rooms import right\nfrom .deep import (\n    VALUE,\n)\n"
        "\n\ndef answer(given):\n    from .late import LATE\n\n"
        "    return {'given': given, 'sum': left.ONE + right.TWO + VALUE + LATE}\n",
        "left": "ONE = 1\n",
        "rooms/__init__": "FOUR = 4\n",
        "rooms/right": "from .. import (\n    left,\n)\nfrom ..deep import VALUE\n"
        "from . import FOUR, inner\n\nTWO = left.ONE * 2 + inner.ZERO + FOUR - VALUE\n",
        "rooms/inner/__init__": "from .core import ZERO\n",
        "rooms/inner/core": "ZERO = 0\n",
        "deep": "VALUE = 4\n",
        "late": "LATE = 8\n",
        "apart": "raise RuntimeError\n",
        "rooms/apart": "raise RuntimeError\n",
    }.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_program_carries_what_it_imports_and_nothing_else(package: Path) -> None:
    found = {module_name(file) for file in closure(["top"], package)}
    rooms = {"rooms", "rooms.right", "rooms.inner", "rooms.inner.core"}
    assert found == {"", "top", "left", "deep", "late"} | rooms


def test_no_import_is_missed() -> None:
    # With a parser, where the product looks for the words.
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).parent.parts
        name = module_name(str(path.relative_to(PACKAGE)))
        found = {module_name(file) for file in closure([name] if name else [], PACKAGE)}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = here[: len(here) - node.level + 1]
                base += tuple(node.module.split(".")) if node.module else ()
                wanted = {".".join(base)}
                for alias in node.names:
                    below = PACKAGE.joinpath(*base, alias.name)
                    if below.is_dir() or below.with_suffix(".py").is_file():
                        wanted.add(".".join((*base, alias.name)))
                assert wanted <= found, path


def test_a_digest_changes_with_what_is_imported_alone(package: Path) -> None:
    before = digest(["top"], package)
    (package / "apart.py").write_text("pass\n")
    assert digest(["top"], package) == before
    (package / "rooms/inner/core.py").write_text("ZERO = 0.0\n")
    assert digest(["top"], package) != before


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


def test_the_facts_of_a_node_are_complete_in_a_program() -> None:
    asked = {"gpus": True, "paths": ["/"], "front_door": "127.0.0.1:1", "users": ["root"]}
    node = answer_in(run(program("node.facts", "read", asked, PACKAGE)).stdout)
    assert node["users"]["root"]["exists"]
    assert node["disks"][0]["mount"] == "/"
    assert node["gateway"]["client"]["status"] == 0


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_library_of_a_node_is_complete(tmp_path: Path, entry_point: str) -> None:
    library = tmp_path / "lib"
    replace_tree(library / "glm_fleet", closure(ENTRY_POINTS, PACKAGE))
    # With a file in its place, a module that is missing is not found elsewhere.
    done = subprocess.run(
        [
            sys.executable,
            "-ISc",
            f"import sys; sys.path.insert(0, {str(library)!r}); "
            f"import glm_fleet.{entry_point} as entry; print(entry.main.__module__)",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("glm_fleet.")


def test_what_only_the_controller_uses_restarts_nothing_on_a_node() -> None:
    files = {file for each in ENTRY_POINTS for file in closure([each], PACKAGE)}
    apart = {"core/table.py", "health/html.py", "release/merge.py", "fleet/inventory.py"}
    assert not apart & files
    assert all(isinstance(ast.parse((PACKAGE / file).read_text()), ast.Module) for file in apart)


def test_a_library_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "lib/glm_fleet"
    old = {"__init__.py": "", "artifact.py": "X = 1\n"}
    new = {"__init__.py": "", "artifact/__init__.py": "X = 2\n"}
    assert differing_files(folder, hashes_of(old)) == sorted(old)
    replace_tree(folder, old)
    assert differing_files(folder, hashes_of(old)) == []
    assert differing_files(folder, hashes_of(new)) == ["artifact.py", "artifact/__init__.py"]
    replace_tree(folder, new)
    assert differing_files(folder, hashes_of(new)) == []
    assert [each.name for each in folder.parent.iterdir()] == ["glm_fleet"]
