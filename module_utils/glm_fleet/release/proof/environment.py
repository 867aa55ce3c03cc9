# SPDX-License-Identifier: Apache-2.0
"""An environment with torch and Triton of a release, on the builder, from the release's wheels.

It is kept beside the downloads under the digest of what it was made of: proving another patch of
the same release installs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import FleetError
from ...core.runner import Runner
from . import cases as cases_module
from . import compile as compile_module
from . import interpret as interpret_module
from . import modules as modules_module

_COMPLETE = "glm-fleet-proof.json"
_CHILDREN = (modules_module, cases_module, compile_module, interpret_module)
_INSTALL_S = 1800.0
# What the children import; their own dependencies come from the same wheels.
_WANTED = ("torch", "triton", "numpy")


@dataclass(frozen=True)
class ProofEnvironment:
    """A Python with the release's torch and Triton, and a folder with the children's source."""

    python: str
    folder: Path
    runner: Runner

    def run(self, child: str, task: Mapping[str, Any], *, timeout: float) -> Any:
        """Run a child with ``task`` on its standard input; return the JSON that it prints."""
        done = self.runner(
            [self.python, "-m", f"glm_proof.{child}"],
            cwd=str(self.folder),
            env={
                "TRITON_CACHE_DIR": str(self.folder / "triton"),
                "PYTHONDONTWRITEBYTECODE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            input_text=json.dumps(task),
            timeout=timeout,
            check=False,
        )
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise FleetError(
                f"The {child} proof of the release ended without a result",
                expected="torch and Triton of the release to be importable on the builder",
                found=(done.stderr.strip() or f"exit status {done.rc}")[-1500:],
                remedy="see what is missing there; release_proofs: false builds without a proof",
            ) from None

    def run_parts(self, child: str, task: Mapping[str, Any], *, timeout: float) -> list[Any]:
        """Run the parts of a task beside each other, one for each processor; join the lists."""
        parts = max(1, min(4, os.cpu_count() or 1))
        tasks = [{**task, "part": part, "parts": parts} for part in range(parts)]
        with ThreadPoolExecutor(parts) as pool:
            found = list(pool.map(lambda each: self.run(child, each, timeout=timeout), tasks))
        return [row for rows in found for row in rows]


def can_prove(wheels: Sequence[Path]) -> bool:
    """Tell whether the wheels hold what a proof runs with."""
    names = {path.name.partition("-")[0].lower() for path in wheels}
    return {"torch", "triton"} <= names


def ensure(
    root: Path, *, wheels: Sequence[Path], python_version: str, uv: str, runner: Runner
) -> ProofEnvironment:
    """Return the environment of these wheels, making it when it is not there.

    The wheel of vLLM itself is not installed: its source is what is proven. Environments of other
    releases are removed.
    """
    usable = sorted(path for path in wheels if not path.name.startswith("vllm"))
    key = hashlib.sha256(
        "\n".join([python_version, *(path.name for path in usable)]).encode()
    ).hexdigest()[:16]
    folder = root / key
    made = ProofEnvironment(str(folder / "venv/bin/python"), folder, runner)
    if not (folder / _COMPLETE).is_file():
        shutil.rmtree(root, ignore_errors=True)
        _install(made, usable, python_version, uv)
        (folder / _COMPLETE).write_text(json.dumps({"wheels": [path.name for path in usable]}))
    _write_children(folder / "glm_proof")
    (folder / "notes").mkdir(exist_ok=True)
    return made


def _install(made: ProofEnvironment, wheels: Sequence[Path], python_version: str, uv: str) -> None:
    links = made.folder / "wheels"
    links.mkdir(parents=True)
    for path in wheels:
        (links / path.name).symlink_to(path)
    names = {path.name.partition("-")[0].lower(): path.name.split("-")[1] for path in wheels}
    wanted = [f"{name}=={names[name]}" for name in _WANTED if name in names]
    variables = {"UV_CACHE_DIR": str(made.folder / "cache"), "UV_NO_CONFIG": "1"}
    steps = [
        [uv, "venv", "--python", python_version, str(made.folder / "venv")],
        [uv, "pip", "install", "--python", made.python, "--no-index",
         "--find-links", str(links), *wanted],
    ]  # fmt: skip
    for step in steps:
        done = made.runner(step, env=variables, timeout=_INSTALL_S, check=False)
        if done.rc != 0:
            raise FleetError(
                "The builder cannot run torch and Triton of the release",
                expected=f"Python {python_version}, the nodes', on the builder, and {wanted} from "
                "the release's wheels",
                found=done.stderr.strip()[-1000:],
                remedy=f"install Python {python_version} on the builder (uv python install "
                f"{python_version}), or build without a proof: release_proofs: false",
            )
    shutil.rmtree(made.folder / "cache", ignore_errors=True)


def _write_children(folder: Path) -> None:
    """Write the children's source where their own interpreter finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("")
    for module in _CHILDREN:
        spec = importlib.util.find_spec(module.__name__)
        source = spec.loader.get_source(module.__name__) if spec and spec.loader else None  # type: ignore[attr-defined]
        if source is None:
            raise FleetError(f"The source of {module.__name__} cannot be read")
        (folder / f"{module.__name__.rpartition('.')[2]}.py").write_text(source)


def unpack_source(wheel: Path, folder: Path) -> Path:
    """Unpack the Python files of a wheel of vLLM into ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as packed:
        for member in packed.namelist():
            if member.startswith("vllm/") and member.endswith(".py") and ".." not in member:
                packed.extract(member, folder)
    return folder
