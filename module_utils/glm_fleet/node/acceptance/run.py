# SPDX-License-Identifier: Apache-2.0
"""Runs the trials of an acceptance on a node, and judges what came of them.

The node's own Python does this, as root; what runs on the GPUs is the release's Python with
`release.proof.trial`, as the service's user. It gets its program on its standard input and answers
on its standard output.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ...core.errors import FleetError
from ...core.runner import Runner, as_user
from ...release.conformance import AT_FULL_SIZE, CASES
from ...release.proof import cases, interpret, modules, trial
from ..gpu import Gpu, GpuReport, read_gpus
from ..remote_call import answer_in, program_of
from .answer import (
    GpuTrial,
    Sampled,
    read_kernels,
    read_load,
    read_outcomes,
    read_together,
)
from .dcgm import diagnose
from .judge import judge
from .record import Fingerprint, Record, fingerprint, kernel_digest
from .table import entries, figures

_PACKAGE = "glm_proof"
_CHILDREN = (modules, cases, interpret, trial)
# How much each trial does, by the type of device: see `release.proof.trial`.
SIZES: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "cuda": {
        "kernels": {"seeds": 2},
        "load": {
            "size": 8192,
            "products": 4000,
            "copied_bytes": 4 * 2**30,
            "tested_bytes": 0,
        },
        "together": {"summed": 2**24, "bytes": 2**30, "times": 20, "patience_s": 120},
    },
    "cpu": {
        "kernels": {"seeds": 1},
        "load": {"size": 128, "products": 20, "copied_bytes": 2**20, "tested_bytes": 2**23},
        "together": {"summed": 2**12, "bytes": 2**16, "times": 2, "patience_s": 120},
    },
}
_LIMITS_S = {"kernels": 600.0, "load": 420.0, "together": 300.0}
# What torch may take to be imported, on a node that is busy.
_IMPORT_S = 180.0
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "kernels": read_kernels,
    "load": read_load,
    "together": read_together,
}
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class Settings:
    """How a node is accepted.

    ``python`` is the release's interpreter, ``packages`` its folder of packages, ``cache`` where
    compiled kernels are kept, '' for nowhere. ``limits`` replace those of the boards,
    ``environment`` adds variables, ``dcgm_level`` 0 leaves out NVIDIA's diagnosis.
    """

    python: str
    packages: Path
    release: str
    user: str
    device: str = "cuda"
    backend: str = "TRITON_MLA_SPARSE"
    cache: str = ""
    limits: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    dcgm_level: int = 1

    @property
    def cases(self) -> Sequence[Mapping[str, Any]]:
        """The cases whose kernels this release has."""
        known = CASES if self.device == "cpu" else AT_FULL_SIZE
        return [
            each
            for each in known.get(self.backend, ())
            if self.packages.joinpath(*each["module"].split(".")).with_suffix(".py").is_file()
        ]

    @property
    def modules(self) -> list[str]:
        """The modules whose kernels are tried: of the release, or that it should have."""
        return sorted({each["module"] for each in AT_FULL_SIZE.get(self.backend, ())})


def accept(
    settings: Settings,
    run: Runner,
    *,
    say: Callable[[str], object] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Record:
    """Run all trials and judge. Raises `FleetError` when there are no GPUs to try."""
    begun = clock()
    report = read_report(run)
    trials: list[GpuTrial] = [
        {"index": gpu.index, "uuid": gpu.uuid, "serial": gpu.serial, "name": gpu.name, "errors": {}}
        for gpu in report.gpus
    ]
    count = f"{len(trials)} GPUs" if len(trials) > 1 else "1 GPU"
    say(f"kernels of the release against float32, {count}")
    _try_alone("kernels", trials, settings, run)
    say(f"products, memory and bandwidth, {count}")
    with Sampler(run) as sampler:
        _try_alone("load", trials, settings, run)
    _note_samples(trials, sampler.reports)
    if len(trials) > 1 and all("load" in each for each in trials):
        say(f"all-reduce over {count}")
        _try_together(trials, settings, run)
    dcgm = None
    if settings.dcgm_level:
        say("dcgmi diag")
        dcgm = diagnose(run, settings.dcgm_level)
    judged = judge(
        trials,
        device=settings.device,
        changes=settings.limits,
        links={f"{link.first}-{link.second}": link.kind for link in report.links},
        dcgm=dcgm or (),
    )
    return {
        "schema": 1,
        "time_s": time.time(),
        "seconds": round(clock() - begun, 1),
        "release": settings.release,
        "device": settings.device,
        "passed": judged.passed,
        "fingerprint": fingerprint_now(settings, report),
        "modules": settings.modules,
        "faults": entries(judged),
        "notes": list(judged.notes),
        "figures": [figures(each) for each in trials],
        "gpus": trials,
        "dcgm": dcgm,
    }


def read_report(run: Runner) -> GpuReport:
    """Ask the driver for the GPUs; raises `FleetError` when there is none."""
    report = read_gpus(run)
    if not report.gpus:
        raise FleetError(
            "The driver names no GPU of this node",
            expected="nvidia-smi to list every GPU",
            found=report.error or "none",
            remedy="look at dmesg and lspci; playbooks/preflight.yml says more",
        )
    return report


def fingerprint_now(settings: Settings, report: GpuReport) -> Fingerprint:
    """Return the fingerprint of this node as it is now."""
    boards = [{"uuid": gpu.uuid, "serial": gpu.serial} for gpu in report.gpus]
    digest = kernel_digest(settings.packages, settings.modules)
    return fingerprint(boards, report.driver_version, digest)


# -- the trials, each a program that parts into a process a GPU ----------------------------
def _try_alone(name: str, trials: list[GpuTrial], settings: Settings, run: Runner) -> None:
    """Run a trial on every GPU at once; each sees its own alone."""
    _try(name, trials, [{"visible": each["uuid"]} for each in trials], settings, run)


def _try_together(trials: list[GpuTrial], settings: Settings, run: Runner) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    visible = ",".join(each["uuid"] for each in trials)
    common = {"visible": visible, "world": len(trials), "port": port}
    tasks = [{**common, "rank": rank} for rank in range(len(trials))]
    _try("together", trials, tasks, settings, run)
    peers = trials[0].get("together", {}).get("peers")
    if peers is not None:
        numbers = [each["index"] for each in trials]
        trials[0]["together"]["peers"] = [[numbers[place] for place in pair] for pair in peers]


def _try(
    name: str,
    trials: list[GpuTrial],
    each: Sequence[Mapping[str, Any]],
    settings: Settings,
    run: Runner,
) -> None:
    """Run a trial; what each GPU answers, or what came instead, goes into its figures."""
    task: dict[str, Any] = {
        "trial": name,
        "device": settings.device,
        "limit_s": _LIMITS_S[name],
        **SIZES[settings.device][name],
        "each": each,
    }
    if name == "kernels":
        task.update(tree=str(settings.packages), cases=list(settings.cases))
    try:
        outcomes = read_outcomes(_ask(task, settings, run))
    except FleetError as error:
        outcomes = [{"said": f"{error.message}: {error.found}"} for _ in trials]
    outcomes += [{"said": "nothing came back"}] * (len(trials) - len(outcomes))
    for mine, outcome in zip(trials, outcomes):
        try:
            mine[name] = _READERS[name](outcome["answer"])  # type: ignore[literal-required]
        except (KeyError, FleetError) as error:
            said = outcome.get("said") or str(error)
            mine["errors"] = {**mine.get("errors", {}), name: said[-600:]}


def _ask(task: Mapping[str, Any], settings: Settings, run: Runner) -> Any:
    """Run a trial under the release's Python and return its answer; raises `FleetError`."""
    variables = {
        **settings.environment,
        "HOME": "/nonexistent",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OMP_NUM_THREADS": "2",
        # Between processors nothing leaves the host, whatever its name resolves to.
        **({"GLOO_SOCKET_IFNAME": "lo"} if settings.device == "cpu" else {}),
    }
    if settings.cache:
        variables["TRITON_CACHE_DIR"] = f"{settings.cache}/triton"
    done = run(
        [*as_user(settings.user), settings.python, "-I", "-B", "-"],
        cwd="/",
        env=variables,
        input_text=_program(task),
        timeout=task["limit_s"] + _IMPORT_S,
        check=False,
    )
    answer = answer_in(done.stdout)
    if answer is None:
        said = done.stderr.strip() or done.stdout.strip() or "nothing was said"
        raise FleetError(f"The trial ended with {done.rc} and without an answer", found=said[-500:])
    return answer


def _program(task: Mapping[str, Any]) -> str:
    """Return the program of a trial: the modules of `release.proof`, in one text."""
    sources = {_PACKAGE: ""}
    for module in _CHILDREN:
        spec = importlib.util.find_spec(module.__name__)
        # Also out of the archive that Ansible makes of a module.
        text = spec.loader.get_source(module.__name__) if spec and spec.loader else None  # type: ignore[attr-defined]
        if text is None:
            raise FleetError(f"The source of {module.__name__} cannot be read")
        sources[f"{_PACKAGE}.{module.__name__.rpartition('.')[2]}"] = text
    return program_of(sources, [_PACKAGE], _PACKAGE, "trial", "run", json.loads(json.dumps(task)))


# -- what the driver says meanwhile --------------------------------------------------------
class Sampler:
    """Asks the driver again and again while the block lasts; ``reports`` are (time, GPUs)."""

    def __init__(self, run: Runner) -> None:
        self.reports: list[tuple[float, Sequence[Gpu]]] = []
        self._run = run
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _ask(self) -> None:
        while True:
            asked = time.time()
            gpus = read_gpus(self._run).gpus
            if gpus:
                self.reports.append(((asked + time.time()) / 2, gpus))
            if self._end.wait(_SAMPLE_S):
                return


def _note_samples(trials: list[GpuTrial], reports: Sequence[tuple[float, Sequence[Gpu]]]) -> None:
    """Give every GPU what the driver said of it while all of them were under load."""
    loads = [each["load"] for each in trials if "load" in each]
    first = max((each["begun"] for each in loads), default=0.0)
    last = min((each["ended"] for each in loads), default=0.0)
    under = [gpus for moment, gpus in reports if first <= moment <= last]
    # A load that was over too soon: what was said around it is better than nothing.
    for each in trials:
        mine = [gpu for gpus in under or [gpus for _, gpus in reports] for gpu in gpus]
        each["sampled"] = _summed_up([gpu for gpu in mine if gpu.uuid == each["uuid"]])


def _summed_up(seen: Sequence[Gpu]) -> Sampled:
    clocks = [gpu.sm_clock_mhz for gpu in seen if gpu.sm_clock_mhz is not None]
    most = [gpu.sm_clock_max_mhz for gpu in seen if gpu.sm_clock_max_mhz is not None]
    degrees = [gpu.temperature_c for gpu in seen if gpu.temperature_c is not None]
    watts = [gpu.power_draw_w for gpu in seen if gpu.power_draw_w is not None]
    return {
        "samples": len(seen),
        "sm_clock_mhz": int(median(clocks)) if clocks else None,
        "sm_clock_max_mhz": max(most, default=None),
        "temperature_c": max(degrees, default=None),
        "power_w": max(watts, default=None),
        "throttle_reasons": sorted({reason for gpu in seen for reason in gpu.throttle_reasons}),
    }
