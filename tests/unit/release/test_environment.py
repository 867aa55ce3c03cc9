# SPDX-License-Identifier: Apache-2.0
"""The environment of a release: whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult, run_program
from glm_fleet.release import environment, installed

SEEN = {"vllm": "0.23.0+pr1", "torch": "2.11.0", "backend": "a.B"}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifacts" / "rel-0123456789ab"
    (folder / "tools").mkdir(parents=True)
    with zipfile.ZipFile(folder / "tools" / "uv-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("uv-1.data/scripts/uv", "#!program")
    recipe = {"python_version": "3.11", "attention_backend": "TRITON_MLA_SPARSE"}
    (folder / "release.json").write_text(json.dumps(recipe))
    return folder


class Uv:
    """Stands for uv and the new interpreter; fails at the call whose words hold ``fail_at``."""

    def __init__(self, fail_at: str = "") -> None:
        self.fail_at = fail_at
        self.calls: list[list[str]] = []

    def __call__(self, argv: Sequence[str], **options: Any) -> RunResult:
        self.calls.append(list(argv))
        if self.fail_at and self.fail_at in argv:
            if options.get("check", True):
                raise FleetError("uv failed")
            return RunResult(1, "", "ImportError: libcuda.so.1")
        if "venv" in argv:
            Path(argv[-1], "bin").mkdir(parents=True)
            Path(argv[-1], "lib/python3.11/site-packages").mkdir(parents=True)
        return RunResult(0, f"a line of the import\n{json.dumps(SEEN)}\n", "")


def test_it_is_built_offline_from_the_lock_and_checked(artifact: Path, tmp_path: Path) -> None:
    home, uv = tmp_path / "releases" / artifact.name, Uv()
    assert environment.build(uv, artifact, home, user="nobody", compile_bytecode=True) == SEEN
    assert installed.is_complete(home, artifact.name)
    assert not installed.is_complete(home, "rel-000000000000")
    venv, sync, compiled, smoke = uv.calls
    assert venv[1:3] == ["venv", "--relocatable"]
    # Neither a source that is built nor a .pth file of a wheel runs as root.
    assert {"--no-index", "--require-hashes", "lock.txt", "--no-build"} <= set(sync)
    assert "--compile-bytecode" not in sync
    assert compiled[1:5] == ["-I", "-S", "-m", "compileall"]
    assert smoke[-1] == "TRITON_MLA_SPARSE"
    assert [path.name for path in home.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize("step", ["venv", "sync", "TRITON_MLA_SPARSE"])
def test_a_build_that_fails_leaves_nothing(artifact: Path, tmp_path: Path, step: str) -> None:
    home = tmp_path / "releases" / artifact.name
    with pytest.raises(FleetError):
        environment.build(Uv(step), artifact, home, user="nobody", compile_bytecode=False)
    assert list(home.parent.iterdir()) == []


def test_a_failed_build_leaves_the_environment_before_it(artifact: Path, tmp_path: Path) -> None:
    home = tmp_path / "releases" / artifact.name
    home.mkdir(parents=True)
    (home / "in-use").touch()
    with pytest.raises(FleetError):
        environment.build(Uv("sync"), artifact, home, user="nobody", compile_bytecode=False)
    assert (home / "in-use").exists()


def test_an_artifact_without_recipe_or_installer_is_refused(artifact: Path, tmp_path: Path) -> None:
    home = tmp_path / "releases" / artifact.name
    (artifact / "tools" / "uv-1-py3-none-any.whl").unlink()
    with pytest.raises(FleetError, match="lacks its installer"):
        environment.build(Uv(), artifact, home, user="nobody", compile_bytecode=False)
    (artifact / "release.json").write_text("{}")
    with pytest.raises(FleetError, match="no recipe"):
        environment.build(Uv(), artifact, home, user="nobody", compile_bytecode=False)


FAKE_TORCH = """
__version__ = "2.11.0"
class version:
    cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: {available})
    get_device_capability = staticmethod(lambda index: (8, 0))
"""


def smoke(folder: Path, cuda: str | None, available: bool, core: str = "") -> dict[str, str]:
    """Run the real smoke check against packages that only pretend."""
    registry = folder / "vllm/v1/attention/backends/registry.py"
    registry.parent.mkdir(parents=True)
    for package in (registry.parent, *list(registry.parents)[1:4]):
        (package / "__init__.py").write_text("")
    registry.write_text(
        "class Backend:\n    get_class = classmethod(lambda each: each)\n"
        "AttentionBackendEnum = {'TRITON_MLA_SPARSE': Backend}\n"
    )
    (folder / "vllm/_C.py").write_text(core)
    (folder / "torch.py").write_text(FAKE_TORCH.format(cuda=cuda, available=available))
    (folder / "vllm-1.dist-info").mkdir()
    (folder / "vllm-1.dist-info/METADATA").write_text("Name: vllm\nVersion: 1\n")

    def runner(argv: Sequence[str], **options: Any) -> RunResult:
        options["env"] = {**options["env"], "PYTHONPATH": str(folder)}
        code = argv[argv.index("-I") + 1 :]
        return run_program([sys.executable, *code], **options)

    return environment.smoke_check(runner, folder, "TRITON_MLA_SPARSE", "nobody")


def test_nothing_of_a_release_is_imported_as_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []

    def runner(argv: Sequence[str], **options: Any) -> RunResult:
        said.append(list(argv))
        assert options["env"]["HOME"] == "/nonexistent"
        return RunResult(0, json.dumps(SEEN), "")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    environment.smoke_check(runner, tmp_path, "TRITON_MLA_SPARSE", "glm")
    (command,) = said
    assert command[:3] == ["setpriv", "--reuid=glm", "--regid=glm"]
    assert {"--bounding-set=-all", "--no-new-privs"} < set(command)


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs the system's Python")
def test_compiling_runs_no_line_of_a_wheel(tmp_path: Path) -> None:
    subprocess.run(
        ["/usr/bin/python3", "-m", "venv", "--without-pip", tmp_path / "venv"], check=True
    )
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    told = tmp_path / "told"
    (site / "evil.pth").write_text(f"import os; open({str(told)!r}, 'w').close()\n")
    (site / "module.py").write_text("VALUE = 1\n")
    (site / "template.py").write_text("{{ this is no Python }}\n")
    environment.compile_modules(run_program, tmp_path / "venv")
    assert list((site / "__pycache__").glob("module.*.pyc"))
    assert not told.exists()
    # The same interpreter without -S would have.
    subprocess.run([tmp_path / "venv/bin/python", "-I", "-c", ""], check=True)
    assert told.exists()


def test_the_smoke_check_sees_gpu_and_kernels(tmp_path: Path) -> None:
    seen = smoke(tmp_path, "13.0", True)
    assert (seen["vllm"], seen["cuda"], seen["capability"]) == ("1", "13.0", "8.0")


def test_a_build_without_cuda_needs_no_gpu(tmp_path: Path) -> None:
    assert "cuda" not in smoke(tmp_path, None, False, core="raise ImportError")


@pytest.mark.parametrize(
    ("available", "core", "message"),
    [(False, "", "sees no GPU"), (True, "raise ImportError('libcudart.so.13')", "libcudart")],
)
def test_a_build_that_does_not_fit_the_driver(
    tmp_path: Path, available: bool, core: str, message: str
) -> None:
    with pytest.raises(FleetError, match=message):
        smoke(tmp_path, "13.0", available, core)
