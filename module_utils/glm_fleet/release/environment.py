# SPDX-License-Identifier: Apache-2.0
"""The Python environment of a release, built on a node from the artifact alone."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any, TypedDict

from ..artifact.store import Store
from ..core.decode import parse, read
from ..core.errors import FleetError
from ..core.files import exclusive
from ..core.runner import Runner, as_user
from .installed import find_damage, is_complete, seal


class _Recipe(TypedDict):
    python_version: str
    attention_backend: str


def is_whole(environment: Path, release: str) -> bool:
    """Tell whether the environment was built to its end from this release, and is as it was."""
    return is_complete(environment, release) and not find_damage(environment)


def ensure(
    runner: Runner, artifact: Path, environment: Path, *, user: str, compile_bytecode: bool
) -> dict[str, str]:
    """Build the environment unless it is whole; return what the smoke check saw, {} for nothing.

    What is there goes only when the new one is complete: an engine that still runs from it keeps
    what it has open.
    """
    with exclusive(environment.parent / ".lock"):
        # Whoever had the lock may have built it.
        if is_whole(environment, artifact.name):
            return {}
        # Its installer is about to run as root.
        Store(artifact.parents[1]).require_proven("release", artifact.name)
        return build(runner, artifact, environment, user=user, compile_bytecode=compile_bytecode)


def read_recipe(artifact: Path) -> tuple[str, str]:
    """Return (Python version, attention backend) from ``release.json`` of the artifact."""
    try:
        recipe = read(_Recipe, artifact / "release.json")
        return recipe["python_version"], recipe["attention_backend"]
    except (FileNotFoundError, FleetError) as error:
        raise FleetError(
            "The release artifact has no recipe",
            expected=f"python_version and attention_backend in {artifact / 'release.json'}",
            found=f"{type(error).__name__}: {error}",
            remedy="build the release again with this version of glm-fleet",
        ) from error


def extract_uv(artifact: Path, folder: Path) -> Path:
    """Take the uv program out of its wheel in the artifact; return its path."""
    wheels = sorted((artifact / "tools").glob("uv-*.whl"))
    if not wheels:
        raise FleetError(
            "The release artifact lacks its installer",
            expected=f"tools/uv-*.whl in {artifact}",
            found="none",
            remedy="build the release again",
        )
    with zipfile.ZipFile(wheels[-1]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".data/scripts/uv"))
        target = folder / "uv"
        with wheel.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    target.chmod(0o755)
    return target


def build(
    runner: Runner, artifact: Path, environment: Path, *, user: str, compile_bytecode: bool
) -> dict[str, str]:
    """Build the environment with no network and show that the backend is in it.

    Everything happens beside the final place, which one rename fills: a build that is
    killed leaves nothing that looks complete. Nothing of the release is run as root: ``user`` is
    who tries it. Returns what the smoke check saw.
    """
    python_version, backend = read_recipe(artifact)
    partial = environment.with_name(f".{environment.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        uv = str(extract_uv(artifact, partial))
        # The cache lies on the same file system, so that uv links files instead of copying
        # them, and goes when the build ends.
        variables = {"UV_CACHE_DIR": str(partial / "cache"), "UV_NO_CONFIG": "1", "UV_OFFLINE": "1"}
        home = partial / "venv"
        # Relocatable: the scripts find the interpreter beside them after the rename.
        runner(
            [uv, "venv", "--relocatable", "--python", python_version,
             "--no-python-downloads", str(home)],
            env=variables,
        )  # fmt: skip
        install = [uv, "pip", "sync", "--python", str(home / "bin" / "python"), "--no-index",
                   "--find-links", "wheels", "--require-hashes", "--no-build",
                   "lock.txt"]  # fmt: skip
        runner(install, env=variables, cwd=str(artifact))
        if compile_bytecode:
            compile_modules(runner, home)
        seen = smoke_check(runner, home, backend, user)
        # The cache goes first: files that were linked from it count as touched by that.
        shutil.rmtree(partial / "cache", ignore_errors=True)
        seal(home, {"release": artifact.name, "compile_bytecode": compile_bytecode, **seen})
        home.chmod(0o755)
        if environment.is_dir():
            shutil.rmtree(environment)
        home.rename(environment)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return seen


def compile_modules(runner: Runner, home: Path) -> None:
    """Compile what was installed, without running any of it.

    An interpreter that starts in the environment runs the .pth files of its wheels, also when uv
    starts it to compile; with -S it does not. Some wheels hold templates that are no Python: a
    file that does not compile is left to whoever imports it.
    """
    for folder in sorted((home / "lib").glob("python*/site-packages")):
        runner(
            [str(home / "bin" / "python"), "-I", "-S", "-m", "compileall", "-q", "-j", "0",
             str(folder)],
            cwd="/",
            check=False,
        )  # fmt: skip


_SMOKE = """
import importlib.metadata, importlib.util, json, sys
from vllm.v1.attention.backends.registry import AttentionBackendEnum
backend = AttentionBackendEnum[sys.argv[1]].get_class()
import torch
seen = {
    "vllm": importlib.metadata.version("vllm"),
    "torch": torch.__version__,
    "backend": f"{backend.__module__}.{backend.__name__}",
}
if torch.version.cuda:
    if importlib.util.find_spec("vllm._C"):
        import vllm._C
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} is built for CUDA {torch.version.cuda} "
                 "and sees no GPU: the driver is older than that, or does not answer")
    seen["cuda"] = torch.version.cuda
    seen["capability"] = ".".join(str(part) for part in torch.cuda.get_device_capability(0))
print(json.dumps(seen))
"""


def smoke_check(runner: Runner, home: Path, backend: str, user: str) -> dict[str, str]:
    """Import what the release is made for, as the interpreter of the environment sees it.

    As ``user``, the service's: what is imported is not run as root.

    Returns vllm, torch and backend; of a CUDA build also cuda and the capability of GPU 0.
    """
    answer = runner(
        [*as_user(user), str(home / "bin" / "python"), "-I", "-c", _SMOKE, backend],
        env={
            "HOME": "/nonexistent",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        },
        cwd="/",
        timeout=600,
        check=False,
    )
    if answer.rc != 0:
        raise FleetError(
            f"The new environment cannot import the backend {backend}",
            expected=f"AttentionBackendEnum.{backend} to resolve to a class",
            found=answer.stderr.strip()[-1500:],
            remedy="compare the node's driver and libraries with what the release was built for",
        )
    said = answer.stdout.splitlines()[-1:] or [""]
    found = parse(dict[str, Any], said[0], what="What the environment says of itself")
    return {key: str(value) for key, value in found.items()}
