# SPDX-License-Identifier: Apache-2.0
"""What the release compiler costs: repacking, a run that builds nothing, an environment."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.files import sha256_file
from glm_fleet.core.runner import RunResult, run_program
from glm_fleet.release import environment
from glm_fleet.release.proof import environment as proof
from glm_fleet.release.repack import overlay
from glm_fleet.release.wheel import read_wheel
from glm_fleet.release.wheel_lock import Packages, WheelTarget, final_lock, gather

from lab import standin as lab_standin
from lab.settings import CACHE
from tests.release import standin
from tests.release.conftest import ensure, make_upstream
from tests.release.test_play import Builder, make_wheel

from .conftest import Record

ROOT = Path(__file__).resolve().parents[2]
BASE_WHEEL = "vllm-0.23.0-2-cp38-abi3-manylinux_2_28_x86_64.whl"
VERSION = "0.23.0+pr38476.g3740c02"
ROUNDS = 5

_PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from glm_fleet.release.repack import overlay
from glm_fleet.release.wheel import read_wheel
base, patch, dest = (Path(each) for each in sys.argv[2:5])
overlay(read_wheel(base), patch, sys.argv[6:], dest, name="vllm", version=sys.argv[5])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

# Runs one proof in a process of its own: seconds, and MiB of the largest process.
_PROVE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from glm_fleet.core.runner import run_program
from glm_fleet.release.conformance import prove_conformance
from glm_fleet.release.kernel_proof import prove_kernels
from glm_fleet.release.library_proof import prove_libraries
from glm_fleet.release.proof.environment import ProofEnvironment
kind, folder, tree, wheel = sys.argv[2], *(Path(each) for each in sys.argv[3:6])
made = ProofEnvironment(str(folder / "venv/bin/python"), folder, run_program)
backend = "TRITON_MLA_SPARSE"
begin = time.perf_counter()
if kind == "libraries":
    prove_libraries(wheel, ["8.0"])
elif kind == "kernels":
    prove_kernels(
        made, tree, backend=backend, version="0.23.0", capabilities=["8.0"], shapes={}
    )
else:
    prove_conformance(made, tree, backend=backend, capability="8.0")
took = time.perf_counter() - begin
peak = max(resource.getrusage(who).ru_maxrss
           for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps([took, peak / 1024]))
"""


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def test_repacking_the_real_wheel(tmp_path: Path, record: Record) -> None:
    path = ensure(BASE_WHEEL, CACHE / "bench")
    patch = tmp_path / "patch"
    for name, text in standin.NEW_FILES.items():
        (patch / name).parent.mkdir(parents=True, exist_ok=True)
        (patch / name).write_text(text)
    (patch / standin.INDEXER).parent.mkdir(parents=True, exist_ok=True)
    (patch / standin.INDEXER).write_text("changed = True\n")
    changed = [*standin.NEW_FILES, standin.INDEXER]
    base = read_wheel(path)

    def repack(dest: Path) -> Path:
        return overlay(base, patch, changed, dest, name="vllm", version=VERSION)

    ratios = []
    hashes = set()
    for number in range(ROUNDS):
        target = tmp_path / f"copy-{number}.whl"
        copied = seconds(lambda target=target: shutil.copyfile(path, target))
        target.unlink()
        dest = tmp_path / str(number)
        ratios.append(seconds(lambda dest=dest: repack(dest)) / copied)
        (made,) = dest.glob("*.whl")
        hashes.add(sha256_file(made))
        shutil.rmtree(dest)
    assert len(hashes) == 1
    size = f"{path.stat().st_size / 1e6:.0f} MB, median of {ROUNDS}, one SHA-256"
    record("release_repack", statistics.median(ratios), goal=3, unit="times copying", context=size)
    words = [str(ROOT / "module_utils"), str(path), str(patch), str(tmp_path / "peak"), VERSION]
    peak = run_program([sys.executable, "-c", _PEAK, *words, *changed]).stdout
    record("release_repack_memory", float(peak), goal=300, unit="MiB", context=size)
    assert float(peak) < 300


def test_a_run_that_builds_nothing(tmp_path: Path, record: Record) -> None:
    upstream = make_upstream(tmp_path)
    builder = Builder(
        tmp_path / "builder",
        {
            "release_repository": f"file://{upstream.path}",
            "release_pull_requests": [{"number": 38476, "head": upstream.head, "drop": ["csrc"]}],
            "release_base_wheel": str(make_wheel(upstream, "0.23.0", tmp_path)),
            "release_constraints": [],
            "release_expected_torch": "",
            "release_expected_triton": "",
        },
    )
    builder.good()
    took = statistics.median(seconds(builder.good) for _ in range(3))
    context = "playbooks/release.yml as a whole, median of 3"
    record("release_cached", took, goal=5, unit="s", context=context)


@pytest.fixture(scope="module")
def proving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An environment with torch and Triton, and the source of 0.23.0 with the lab's kernels."""
    root = tmp_path_factory.mktemp("proof")
    torch = sorted((CACHE / "wheels").glob("torch-*.whl"))
    if not torch:
        pytest.skip("the lab has not fetched torch yet: python -m lab up")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    uv = str(Path(sys.executable).with_name("uv"))
    packages = Packages(
        runner=run_program,
        uv=uv,
        python=sys.executable,
        target=WheelTarget(python, "x86_64-manylinux_2_36"),
        store=CACHE / "bench",
        find_links=(str(torch[0].parent),),
    )
    locked = packages.compile([f"torch=={torch[0].name.split('-')[1]}", "numpy"])
    triton = packages.compile(["triton==3.6.0"], with_dependencies=False)
    wheels = [*packages.download(locked).values(), *packages.download(triton).values()]
    made = proof.ensure(
        root / "environment", wheels=wheels, python_version=python, uv=uv, runner=run_program
    )
    tree = proof.unpack_source(ensure(BASE_WHEEL, CACHE / "bench"), root / "tree")
    for path, name in lab_standin.NEW_FILES.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text((lab_standin.FILES / name).read_text())
    faulty = tree / lab_standin.FAULTY
    wrong, right = lab_standin.WRONG, lab_standin.RIGHT
    faulty.write_text(lab_standin.replace_once(faulty.read_text(), wrong, right))
    return made.folder, tree


def test_the_proofs(proving: tuple[Path, Path], record: Record) -> None:
    """Seconds and memory of each proof; compiled kernels stay, so the next proof is quick."""
    folder, tree = proving
    wheel = ensure(BASE_WHEEL, CACHE / "bench")

    def prove(kind: str) -> tuple[float, float]:
        words = [str(ROOT / "module_utils"), kind, str(folder), str(tree), str(wheel)]
        took, peak = json.loads(run_program([sys.executable, "-c", _PROVE, *words]).stdout)
        return took, peak

    rows = (
        ("libraries", "libraries", 10),
        ("kernels", "kernels_cold", 60),
        ("kernels", "kernels_again", 5),
        ("conformance", "conformance", 60),
    )
    context = "0.23.0 with the lab's kernels"
    for kind, name, goal in rows:
        took, peak = prove(kind)
        record(f"release_proof_{name}", took, goal=goal, unit="s", context=context)
        memory = f"{context}, the largest process"
        record(f"release_proof_{name}_memory", peak, goal=1500, unit="MiB", context=memory)


def make_artifact(folder: Path) -> Path:
    """Gather a release of some size that this host's Python can install."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = Packages(
        runner=run_program,
        uv=str(Path(sys.executable).with_name("uv")),
        python=sys.executable,
        target=WheelTarget(python, "x86_64-manylinux_2_36"),
        store=CACHE / "bench",
        exclude_newer="2026-10-25",
    )
    locked = packages.compile(["transformers", "openai", "fastapi", "numpy", "scipy", "pandas"])
    wheels = packages.download(locked)
    gather(wheels.values(), folder / "wheels")
    tools = packages.download(packages.compile(["uv"], with_dependencies=False))
    gather(tools.values(), folder / "tools")
    (folder / "lock.txt").write_text(final_lock(locked, wheels))
    (folder / "release.json").write_text(
        json.dumps({"python_version": python, "attention_backend": "NONE"})
    )
    return folder


def without_smoke_check(argv: Sequence[str], **options: Any) -> RunResult:
    """Run everything but the smoke check, which is not part of the comparison."""
    if len(argv) > 1 and argv[1] == "-c":
        return RunResult(0, "{}", "")
    return run_program(argv, **options)


def test_the_environment_against_bare_uv(tmp_path: Path, record: Record) -> None:
    artifact = make_artifact(tmp_path / "artifact")
    uv = str(Path(sys.executable).with_name("uv"))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"

    def bare(home: Path) -> None:
        variables = {"UV_CACHE_DIR": str(home) + ".cache", "UV_OFFLINE": "1", "UV_NO_CONFIG": "1"}
        run_program([uv, "venv", "--python", python, str(home)], env=variables)
        sync = [uv, "pip", "sync", "--python", str(home / "bin/python"), "--no-index"]
        sync += ["--find-links", "wheels", "--require-hashes", "lock.txt"]
        run_program(sync, env=variables, cwd=str(artifact))

    def ours(home: Path) -> None:
        environment.build(without_smoke_check, artifact, home, compile_bytecode=False)

    ratios = []
    for number in range(ROUNDS):
        # In turns, so that neither always finds the other's files in memory.
        taken = {}
        for build in (bare, ours) if number % 2 else (ours, bare):
            home = tmp_path / f"{build.__name__}-{number}"
            taken[build] = seconds(lambda build=build, home=home: build(home))
        ratios.append(taken[ours] / taken[bare])
        for each in tmp_path.glob(f"*-{number}*"):
            shutil.rmtree(each)
    count = len(list((artifact / "wheels").iterdir()))
    context = f"{count} wheels, new cache each time, without the smoke check, median of {ROUNDS}"
    record(
        "release_environment", statistics.median(ratios), goal=1.3, unit="times uv", context=context
    )
