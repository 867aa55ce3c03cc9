# SPDX-License-Identifier: Apache-2.0
"""What is made of the kernels that were compiled and interpreted."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult, run_program
from glm_fleet.release import conformance, kernel_proof
from glm_fleet.release.conformance import CASES
from glm_fleet.release.kernel_proof import launched, prove_kernels, shared_limit, summary
from glm_fleet.release.proof.entries import BACKENDS, Entry, entries_for, is_listed, sizes
from glm_fleet.release.proof.environment import (
    ProofEnvironment,
    can_prove,
    ensure,
    unpack_source,
)

ROW = {
    "entry": "logits",
    "kernel": "_logits",
    "capability": "8.0",
    "limit": 166_912,
    "shared": 16_384,
    "registers": 72,
    "spill_stores": 0,
    "spill_loads": 4,
}


# -- the judgement -------------------------------------------------------------------------
def test_a_kernel_that_does_not_compile_is_named_with_its_line() -> None:
    failed = {
        "entry": "queries",
        "kernel": "_fused_q",
        "file": "/b/tree/vllm/x.py",
        "line": 188,
        "capability": "8.0",
        "error": "CompilationError: type fp8e4nv not supported in this architecture",
    }
    with pytest.raises(FleetError, match="1 kernel") as caught:
        kernel_proof.judge([ROW, failed, failed], Path("/b/tree"))
    assert "_fused_q (vllm/x.py:188) for capability 8.0: " in caught.value.found
    assert "fp8e4nv not supported" in caught.value.found
    assert "release_patches" in caught.value.remedy


def test_a_kernel_above_the_shared_memory_is_refused() -> None:
    with pytest.raises(FleetError, match="do not run") as caught:
        kernel_proof.judge([{**ROW, "shared": 166_913}], Path("/b"))
    assert "needs 166913 bytes of shared memory, a block has 166912" in caught.value.found
    assert "name another ref with its wheel" in caught.value.remedy
    kernel_proof.judge([{**ROW, "shared": 166_912}], Path("/b"))


def test_an_entry_that_is_gone_is_refused() -> None:
    gone = {"entry": "old way in", "capability": "8.0", "error": "ModuleNotFoundError: vllm.x"}
    with pytest.raises(FleetError, match="do not run") as caught:
        kernel_proof.judge([gone], Path("/b"))
    assert "the entry 'old way in' for capability 8.0: ModuleNotFoundError" in caught.value.found
    assert "name another ref with its wheel" in caught.value.remedy


def test_the_manifest_tells_the_worst_of_all_configurations() -> None:
    rows = [ROW, {**ROW, "shared": 20_000, "registers": 40, "spill_stores": 8}]
    assert summary(rows) == [
        {
            "kernel": "_logits",
            "capability": "8.0",
            "configurations": 2,
            "shared_bytes": 20_000,
            "registers": 72,
            "spilled_bytes": 12,
        }
    ]


def test_an_unknown_capability_is_refused() -> None:
    assert shared_limit("8.0") == 166_912
    with pytest.raises(FleetError, match=r"capability 8.1 is not known"):
        shared_limit("8.1")


def test_a_wrong_kernel_is_told_by_case_and_order() -> None:
    good = {"case": "a", "order": "first", "outside": 0, "wrong": 0, "of": 9}
    bad = {"case": "b", "order": "last", "outside": 28, "wrong": 3, "of": 9}
    conformance.judge([good])
    with pytest.raises(FleetError, match="something else in 2 places") as caught:
        conformance.judge([good, bad])
    assert "b (last): 28 values written outside the result" in caught.value.found
    assert "b (last): 3 of 9 values are wrong" in caught.value.found
    with pytest.raises(FleetError, match="KeyError"):
        conformance.judge([{"case": "c", "order": "first", "error": "KeyError: x"}])


# -- which kernels are launched ------------------------------------------------------------
GATED = Entry("q", "vllm.m", "f", {}, gate=("vllm/model.py", "use_fused"))


@pytest.mark.parametrize(
    ("condition", "on_80", "on_90"),
    [
        ("current_platform.is_cuda()", True, True),
        ("current_platform.is_rocm()", False, False),
        ("current_platform.is_cuda() and self.dim == 128", True, True),
        ("current_platform.is_cuda() and current_platform.has_device_capability(89)", False, True),
        ("not current_platform.has_device_capability(89) or self.x", True, True),
        ("current_platform.is_rocm() or current_platform.is_xpu()", False, False),
        ("self.scale is not None", True, True),
    ],
)
def test_the_condition_of_the_release_decides(
    condition: str, on_80: bool, on_90: bool, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/model.py").write_text(
        f"class M:\n    def __init__(self):\n        self.use_fused = ({condition})\n"
    )
    assert launched(GATED, tmp_path, "8.0") is on_80
    assert launched(GATED, tmp_path, "9.0") is on_90


def test_a_gate_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"vllm/model.py of the release cannot be read"):
        launched(GATED, tmp_path, "8.0")


IMPORTED = Entry("q", "vllm.m", "f", {}, gate=("vllm/model.py", "from .nvidia.model"))


@pytest.mark.parametrize(
    ("condition", "on_80", "on_90"),
    [
        ("current_platform.is_cuda()", True, True),
        ("current_platform.is_cuda() and current_platform.has_device_capability(89)", False, True),
        ("current_platform.is_rocm()", False, False),
        ("envs.ANYTHING", True, True),
    ],
)
def test_the_condition_of_an_import_decides(
    condition: str, on_80: bool, on_90: bool, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/model.py").write_text(
        f"if {condition}:\n    from .nvidia.model import M\nelse:\n    from .other import M\n"
    )
    assert launched(IMPORTED, tmp_path, "8.0") is on_80
    assert launched(IMPORTED, tmp_path, "9.0") is on_90


def test_entries_are_of_a_range_of_releases() -> None:
    names = {
        version: {entry.function for entry in entries_for("TRITON_MLA_SPARSE", version)}
        for version in ("0.24.0", "0.25.1")
    }
    assert names["0.25.1"] - names["0.24.0"] == {"fused_indexer_q_rope_quant"}
    assert entries_for("", "0.24.0") == []
    assert is_listed("0.27.1")
    assert not is_listed("0.28.0")
    later = {entry.function for entry in entries_for("TRITON_MLA_SPARSE", "0.32.0")}
    assert {"fused_indexer_q_rope_quant", "fused_q"} < later


def test_a_build_for_the_cpu_has_the_kernels_of_the_pull_request_alone() -> None:
    found = entries_for("TRITON_MLA_SPARSE", "0.32.0+cpu.pr38476.g1234567")
    assert len(found) == 3
    assert entries_for("TRITON_MLA_SPARSE", "0.24.0+pr38476.g1234567") == entries_for(
        "TRITON_MLA_SPARSE", "0.24.0"
    )


def test_every_size_that_an_entry_names_is_known() -> None:
    known = sizes({})

    def check(spec: Any) -> None:
        if isinstance(spec, dict):
            for kind, value in spec.items():
                if kind == "tensor":
                    assert all(isinstance(each, int) or each in known for each in value[1])
                elif kind == "size":
                    assert value in known
                elif kind == "name":
                    assert len(value) == 2
                else:
                    check(value)
        elif isinstance(spec, list):
            for each in spec:
                check(each)

    for entries in BACKENDS.values():
        for entry in entries:
            check(dict(entry.arguments))
    assert sizes({"heads": 16})["heads"] == 16


def test_every_backend_with_entries_has_cases() -> None:
    assert set(CASES) == set(BACKENDS)
    for cases in CASES.values():
        assert len({case["name"] for case in cases}) == len(cases)


# -- the environment -----------------------------------------------------------------------
def test_a_lock_without_triton_cannot_be_proven() -> None:
    torch, triton = Path("torch-2.11.0-cp312.whl"), Path("triton-3.6.0-cp312.whl")
    assert can_prove([torch, triton])
    assert not can_prove([torch])


class Uv:
    """Answers as uv does, and keeps what it was asked."""

    def __init__(self, rc: int = 0) -> None:
        self.calls: list[list[str]] = []
        self._rc = rc

    def __call__(self, argv: Sequence[str], **options: Any) -> RunResult:
        self.calls.append(list(argv))
        assert options["env"]["UV_NO_CONFIG"] == "1"
        return RunResult(self._rc, "", "no interpreter found" if self._rc else "")


WHEELS = [
    Path("/d/torch-2.11.0-cp312-cp312-linux.whl"),
    Path("/d/triton-3.6.0-cp312-cp312-linux.whl"),
    Path("/d/nvidia_cublas-13-py3-none-linux.whl"),
    Path("/d/vllm-0.24.0+x-py3-none-any.whl"),
]


def test_the_environment_is_made_once_for_the_same_wheels(tmp_path: Path) -> None:
    uv = Uv()

    def make(wheels: Sequence[Path] = WHEELS) -> ProofEnvironment:
        return ensure(tmp_path / "proof", wheels=wheels, python_version="3.12", uv="uv", runner=uv)

    made = make()
    assert len(uv.calls) == 2
    assert uv.calls[1][-2:] == ["torch==2.11.0", "triton==3.6.0"]
    assert "--no-index" in uv.calls[1]
    assert make() == made
    assert make([*WHEELS[:3], Path("/d/vllm-0.24.0+y-py3-none-any.whl")]) == made
    assert len(uv.calls) == 2
    other = make([*WHEELS, Path("/d/numpy-2.2.0-cp312-cp312-linux.whl")])
    assert other.folder != made.folder
    assert not made.folder.exists()


def test_a_builder_without_the_nodes_python_is_told(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="cannot run torch and Triton") as caught:
        ensure(tmp_path, wheels=WHEELS, python_version="3.12", uv="uv", runner=Uv(1))
    assert "no interpreter found" in caught.value.found
    assert "uv python install 3.12" in caught.value.remedy
    assert "release_proofs: false" in caught.value.remedy


def test_the_children_can_be_started_where_they_are_written(tmp_path: Path) -> None:
    """Without torch they end with an error that says so, and the proof says what to do."""
    made = ensure(tmp_path, wheels=WHEELS, python_version="3.12", uv="uv", runner=Uv())
    environment = ProofEnvironment(sys.executable, made.folder, run_program)
    with pytest.raises(FleetError, match="ended without a result") as caught:
        prove_kernels(
            environment,
            tmp_path,
            backend="TRITON_MLA_SPARSE",
            version="0.24.0",
            capabilities=["8.0"],
            shapes={},
        )
    assert "No module named 'torch'" in caught.value.found


def test_only_the_source_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "vllm-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for name in ("vllm/a.py", "vllm/_C.so", "vllm-1.dist-info/RECORD", "other/b.py"):
            packed.writestr(name, "")
    tree = unpack_source(path, tmp_path / "tree")
    assert [str(each.relative_to(tree)) for each in tree.rglob("*") if each.is_file()] == [
        "vllm/a.py"
    ]


# -- modules without the rest of vLLM ------------------------------------------------------
LOADED = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
for name in ("torch", "triton", "triton.language", "numpy"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].float8_e4m3fn = "fp8"
sys.modules["torch"].finfo = lambda kind: types.SimpleNamespace(min=-448.0, max=448.0)
for name in ("triton.language.extra", "triton.language.extra.libdevice"):
    sys.modules[name] = types.ModuleType(name)
from pathlib import Path
from glm_proof import modules
modules.prepare(Path(sys.argv[2]), ["vllm.under.proof"], (8, 0))
found = modules.function("vllm.under.proof", "Kernels.call")(types.SimpleNamespace(), 2)
try:
    modules.function("vllm.under.proof", "gone")
except AttributeError as error:
    gone = str(error)
try:
    import flint
    optional = "found"
except ImportError:
    optional = "missing"
print(json.dumps([found, gone, optional]))
"""
UNDER_PROOF = """
import not_installed
from vllm.far import PAD, Base, helper, registered
from vllm.platforms import current_platform

@registered("x")
class Kernels(Base):
    def call(self, number):
        old = current_platform.has_device_capability(89)
        return [PAD * number, bool(helper), old, current_platform.is_rocm(), repr(helper())]
"""


def test_a_module_is_loaded_without_the_rest_of_vllm(tmp_path: Path) -> None:
    made = ensure(tmp_path / "p", wheels=WHEELS, python_version="3.12", uv="uv", runner=Uv())
    tree = tmp_path / "tree"
    (tree / "vllm/under").mkdir(parents=True)
    (tree / "vllm/under/proof.py").write_text(UNDER_PROOF)
    (tree / "vllm/far.py").write_text("PAD = -1\nimport nothing_that_exists\n")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(made.folder), str(tree)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, gone, optional = json.loads(done.stdout)
    assert found == [-2, False, False, False, "<blank vllm.far.helper()>"]
    assert "has no attribute 'gone'" in gone
    assert optional == "missing"
