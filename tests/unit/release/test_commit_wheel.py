# SPDX-License-Identifier: Apache-2.0
"""The wheel of a commit, or of an ancestor that compiles to the same."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import run_program
from glm_fleet.release.commit_wheel import CommitWheel, ask_web, find_commit_wheel, read_wheels
from glm_fleet.release.git import Repository
from glm_fleet.release.wheel_lock import WheelTarget

TARGET = WheelTarget("3.12", "x86_64-manylinux_2_35")
NAME = "vllm-0.33.1.dev7+g1234567.cu130-cp38-abi3-manylinux_2_28_x86_64.whl"
ROW = {
    "package_name": "vllm",
    "platform_tag": "manylinux_2_28_x86_64",
    "path": f"../../{NAME.replace('+', '%2B')}",
    "variant": "cu130",
}
INDEX = "https://wheels.example/"


class Source:
    """A repository with one commit after the other, and the wheels of some of them."""

    def __init__(self, folder: Path) -> None:
        self.repository = Repository("https://x.invalid/x", folder, run_program)
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self._git("init", "--quiet", str(self.repository.git_dir), "--bare")
        self.commits: list[str] = []
        self.wheels: dict[str, str] = {}
        self.asked: list[str] = []

    def _git(self, *words: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words],
            cwd=self.work, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def commit(self, files: Mapping[str, str]) -> str:
        tree = ("--git-dir", str(self.repository.git_dir), "--work-tree", str(self.work))
        for path, text in files.items():
            (self.work / path).parent.mkdir(parents=True, exist_ok=True)
            (self.work / path).write_text(text)
        self._git(*tree, "add", "--all")
        parent = ["-p", self.commits[-1]] if self.commits else []
        made = self._git(*tree, "commit-tree", self._git(*tree, "write-tree"), *parent, "-m", "c")
        self.commits.append(made)
        return made

    def ask(self, url: str) -> tuple[int, str]:
        self.asked.append(url)
        commit = url.removeprefix(INDEX).split("/")[0]
        text = self.wheels.get(commit)
        return (200, text) if text is not None else (404, "")

    def find(self, commit: str, *, variant: str = "cu130", depth: int = 10) -> CommitWheel:
        return find_commit_wheel(
            self.repository, commit, index_url=INDEX, variant=variant, target=TARGET,
            compiled=["csrc", "setup.py"], depth=depth, ask=self.ask,
        )  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Source:
    made = Source(tmp_path)
    made.commit({"csrc/a.cu": "1", "vllm/a.py": "1", "setup.py": "1"})
    for number in range(3):
        made.commit({"vllm/a.py": f"{number + 2}"})
    return made


def test_the_wheel_of_the_very_commit(source: Source) -> None:
    last = source.commits[-1]
    source.wheels[last] = json.dumps([ROW])
    found = source.find(last)
    assert found == CommitWheel(f"{INDEX}{last}/{ROW['path'].removeprefix('../../')}", last, 0)
    assert source.asked == [f"{INDEX}{last}/cu130/vllm/metadata.json"]


def test_without_a_variant_the_index_has_one_folder_less(source: Source) -> None:
    last = source.commits[-1]
    source.wheels[last] = json.dumps([{**ROW, "path": NAME}])
    source.find(last, variant="")
    assert source.asked == [f"{INDEX}{last}/vllm/metadata.json"]


def test_the_nearest_ancestor_that_compiles_to_the_same(source: Source) -> None:
    for commit in source.commits[:2]:
        source.wheels[commit] = json.dumps([ROW])
    found = source.find(source.commits[-1])
    assert (found.commit, found.behind) == (source.commits[1], 2)


def test_an_ancestor_before_a_change_of_what_is_compiled_is_not_taken(source: Source) -> None:
    source.wheels[source.commits[0]] = json.dumps([ROW])
    source.commit({"csrc/a.cu": "2"})
    later = source.commit({"vllm/a.py": "9"})
    with pytest.raises(FleetError, match="no published wheel") as caught:
        source.find(later)
    assert "none for 2 commit(s), and before those csrc/a.cu was changed" in caught.value.found
    assert "release_base_wheel" in caught.value.remedy
    # What nothing can be taken of is not asked for.
    assert len(source.asked) == 2


def test_without_any_the_error_says_where_one_would_come_from(source: Source) -> None:
    with pytest.raises(FleetError) as caught:
        source.find(source.commits[-1], depth=2)
    assert caught.value.found == "none for 2 commit(s)"
    assert f"{INDEX}COMMIT/cu130/vllm/metadata.json" in caught.value.expected
    assert "vLLM's own builds of its main line" in caught.value.remedy
    assert len(str(caught.value)) < 800


def test_an_index_that_does_not_answer_is_no_index_without_wheels(source: Source) -> None:
    source.ask = lambda url: (0, "TimeoutError: timed out")  # type: ignore[method-assign]
    with pytest.raises(FleetError, match="cannot be read") as caught:
        source.find(source.commits[-1])
    assert "timed out" in caught.value.found
    source.ask = lambda url: (503, "")  # type: ignore[method-assign]
    with pytest.raises(FleetError, match="status 503"):
        source.find(source.commits[-1])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, f"{INDEX}{NAME.replace('+', '%2B')}"),
        ({"sha256": "ab" * 32}, f"{INDEX}{NAME.replace('+', '%2B')}#sha256={'ab' * 32}"),
        ({"platform_tag": "manylinux_2_17_x86_64.manylinux2014_x86_64"}, INDEX),
        ({"platform_tag": "manylinux_2_28_aarch64"}, ""),
        ({"platform_tag": "manylinux_2_36_x86_64"}, ""),
        ({"package_name": "vllm-more"}, ""),
        ({"path": "../../notes.txt"}, ""),
    ],
)
def test_the_wheel_for_a_node(change: dict[str, str], found: str) -> None:
    said = read_wheels(json.dumps([{**ROW, **change}]), f"{INDEX}c/v/", TARGET)
    assert said.startswith(found) if found else not said


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"sha256": "1"}]', '[{"path": 1}]'])
def test_other_data_is_refused(text: str) -> None:
    with pytest.raises(FleetError, match="index of wheels"):
        read_wheels(text, INDEX, TARGET)


def test_a_path_without_a_name_is_refused() -> None:
    with pytest.raises(FleetError, match="names a file"):
        read_wheels(json.dumps([{**ROW, "path": "../.."}]), f"{INDEX}c/v/", TARGET)


def test_only_the_web_is_asked() -> None:
    assert ask_web("file:///etc/passwd") == (0, "the URL is not one of the web")
    assert ask_web("http://127.0.0.1:9/x")[0] == 0


def test_what_changed_since_comes_from_the_source(source: Source, tmp_path: Path) -> None:
    """Byte for byte, also where lines end otherwise."""
    (source.work / "vllm/b.py").write_bytes(b"a\r\n\xff\r\n")
    last = source.commit({"vllm/sub/c.py": "c"})
    first = source.commits[0]
    changed = source.repository.changed(first, last)
    assert changed == ["vllm/a.py", "vllm/b.py", "vllm/sub/c.py"]
    source.repository.export(last, [*changed, "vllm/gone.py"], tmp_path / "out")
    assert (tmp_path / "out/vllm/b.py").read_bytes() == b"a\r\n\xff\r\n"
    assert (tmp_path / "out/vllm/sub/c.py").read_text() == "c"
    assert not (tmp_path / "out/vllm/gone.py").exists()
