# SPDX-License-Identifier: Apache-2.0
"""The acceptance's own program, with torch, Triton's interpreter and gloo on the processor.

It needs a Python with torch and Triton. The proofs of a release leave one (`release_root`/proof);
GLM_FLEET_TORCH_PYTHON names another.
"""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.runner import RunResult, run_program
from glm_fleet.node.acceptance.record import Record
from glm_fleet.node.acceptance.run import Settings, accept

from lab import standin
from lab.gpu import default_state

ROOT = Path(__file__).resolve().parents[2]
FAULTY = standin.FAULTY


def torch_python() -> str:
    """Return a Python that has torch and Triton, "" if there is none on this machine."""
    made = sorted(Path.home().glob(".glm-fleet/proof/*/venv/bin/python"))
    for python in (os.environ.get("GLM_FLEET_TORCH_PYTHON", ""), *map(str, made)):
        if not python:
            continue
        seen = subprocess.run([python, "-c", "import torch, triton"], check=False, timeout=120)
        if seen.returncode == 0:
            return python
    return ""


@pytest.fixture(scope="module")
def python() -> str:
    found = torch_python()
    if not found:
        pytest.skip("no Python with torch and Triton: GLM_FLEET_TORCH_PYTHON names one")
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The stand-in pull request's kernels, as the packages of an environment hold them."""
    for path, name in standin.NEW_FILES.items():
        if path.startswith("vllm/v1/attention/ops/"):
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text((standin.FILES / name).read_text())
    return tmp_path


Driver = Callable[..., RunResult]


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """Real programs, but for a driver that names two simulated GPUs."""
    state = default_state("gpu01")
    state["gpus"] = state["gpus"][:2]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(state))

    def run(argv: Sequence[str], **options: Any) -> RunResult:
        if argv[0] == "nvidia-smi":
            argv = [sys.executable, str(ROOT / "lab/node/nvidia-smi"), *argv[1:]]
            options["env"] = {**(options.get("env") or {}), "GLM_LAB_GPU_STATE": str(file)}
        return run_program(argv, **options)

    return run


def accepted(python: str, tree: Path, run: Driver) -> Record:
    settings = Settings(
        python, tree, "r", getpass.getuser(), device="cpu", dcgm_level=0,
        environment={"MASTER_ADDR": "127.0.0.1"},
    )  # fmt: skip
    return accept(settings, run)


def test_the_kernels_of_a_pull_request_that_is_wrong_are_found_and_it_is_not_the_boards(
    python: str, tree: Path, driver: Driver
) -> None:
    # The interpreter takes long over attention, which is right in this pull request.
    (tree / "vllm/v1/attention/ops/triton_mla_sparse_kernel.py").unlink()
    record = accepted(python, tree, driver)
    assert record["passed"] is False
    assert record["faults"]
    for fault in record["faults"]:
        assert fault["check"].startswith("kernel, decode logits")
        assert (fault["where"], fault["of_release"]) == ("all GPUs", True)
        assert "written outside the result" in fault["found"]


def test_the_corrected_kernels_pass_and_every_figure_is_there(
    python: str, tree: Path, driver: Driver
) -> None:
    file = tree / FAULTY
    file.write_text(standin.replace_once(file.read_text(), standin.WRONG, standin.RIGHT))
    record = accepted(python, tree, driver)
    assert record["faults"] == []
    assert record["passed"] is True
    first, second = record["gpus"]
    for each in (first, second):
        assert len(each["kernels"]["rows"]) == 9
        assert all(not row["outside"] and not row["wrong"] for row in each["kernels"]["rows"])
        assert each["load"]["differences"] == each["load"]["memory_wrong"] == 0
        assert each["load"]["memory_tested_bytes"] > 0
        assert each["together"]["wrong"] == 0
        assert each["sampled"]["sm_clock_mhz"] == 1410
    assert first["load"]["digests"] == second["load"]["digests"]
    assert first["serial"] != second["serial"]


def test_a_python_without_torch_is_told_in_its_own_words(tree: Path, driver: Driver) -> None:
    record = accepted("/usr/bin/python3", tree, driver)
    assert record["passed"] is False
    assert any("No module named 'torch'" in each["found"] for each in record["faults"])
