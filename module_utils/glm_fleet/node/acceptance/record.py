# SPDX-License-Identifier: Apache-2.0
"""What the acceptance of a node left, and whether it still speaks of this node.

A node was accepted with certain boards, under one driver, with the kernels of one release. When
one of them is another, what was found says nothing of it any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ...core.decode import Amount, Count, Size, Words, read
from ...core.errors import FleetError
from .answer import GpuTrial

RECORD = Path("/var/lib/glm-fleet/acceptance.json")
NEVER = "it was never accepted"
FAILED = "it did not pass"
# Triton compiles the kernels, and torch brings cuBLAS and NCCL: another one is another arithmetic.
_COMPILERS = ("torch-*.dist-info", "triton-*.dist-info")


class Fingerprint(TypedDict):
    """What an acceptance speaks of: serial numbers of the boards by UUID, driver, kernels."""

    gpus: Mapping[str, Words]
    driver: Words
    kernels: Words


class FaultEntry(TypedDict):
    """One thing that was wrong: see `judge.Fault`."""

    check: Words
    where: Words
    expected: Words
    found: Words
    remedy: Words
    gpu: Count | None
    of_release: bool


class Record(TypedDict, total=False):
    """What is kept of an acceptance: how it ended, what it speaks of, and every figure.

    ``time_s`` is when it ended, in seconds since 1970, and ``seconds`` how long it took;
    ``modules`` are what ``kernels`` of the fingerprint was made from. ``notes`` fail nothing,
    ``figures`` are a row for each GPU, ``gpus`` all that was measured.
    """

    schema: Count
    time_s: Amount
    seconds: Amount
    release: Words
    device: Words
    passed: bool
    fingerprint: Fingerprint
    modules: Annotated[Sequence[Words], Size(100)]
    faults: Annotated[Sequence[FaultEntry], Size(1000)]
    notes: Annotated[Sequence[Words], Size(100)]
    figures: Annotated[Sequence[Mapping[str, Any]], Size(1024)]
    gpus: Annotated[Sequence[GpuTrial], Size(1024)]
    dcgm: Annotated[Sequence[Mapping[str, Any]], Size(10_000)] | None


def read_acceptance(path: Path = RECORD) -> Record:
    """Return what was kept, {} if there is nothing that can be used: then nothing is proven."""
    try:
        return read(Record, path)
    except (FileNotFoundError, FleetError):
        return {}


def look(
    gpus: Sequence[Mapping[str, Any]], driver: str | None, home: Path | None, path: Path = RECORD
) -> dict[str, Any]:
    """Say what is known of a node's acceptance: {needed, passed, time_s, release, faults, figures}.

    ``home`` is the environment that the next start runs from, None where there is none.
    """
    record = read_acceptance(path)
    known = record.get("fingerprint")
    kernels = known["kernels"] if known else ""
    if home is not None and record.get("modules"):
        kernels = kernel_digest(site_packages(home), record["modules"])
    return {
        "needed": why_needed(record, fingerprint(gpus, driver, kernels)),
        "passed": record.get("passed"),
        "time_s": record.get("time_s", 0.0),
        "release": record.get("release", ""),
        "faults": list(record.get("faults", ())),
        "figures": list(record.get("figures", ())),
    }


def site_packages(environment: Path) -> Path:
    """Return the folder of packages of an environment; raises `FleetError` without one."""
    found = sorted(environment.glob("lib/python*/site-packages"))
    if not found:
        raise FleetError(
            "There is no environment of a release to accept this node with",
            expected=f"packages in {environment}",
            found="none",
            remedy="run site.yml, which stages the release",
        )
    return found[0]


def kernel_digest(packages: Path, modules: Sequence[str]) -> str:
    """Name the kernels that a release has: its modules, and what compiles and runs them."""
    hashed = hashlib.sha256()
    for module in sorted(modules):
        file = packages.joinpath(*module.split(".")).with_suffix(".py")
        hashed.update(f"{module}\0".encode())
        hashed.update(file.read_bytes() if file.is_file() else b"")
    for pattern in _COMPILERS:
        for folder in sorted(packages.glob(pattern)):
            hashed.update(f"{folder.name}\0".encode())
    return hashed.hexdigest()[:16]


def fingerprint(gpus: Sequence[Mapping[str, Any]], driver: str | None, kernels: str) -> Fingerprint:
    """Put together what an acceptance of these GPUs (uuid, serial) speaks of."""
    boards = {str(gpu["uuid"]): str(gpu.get("serial") or "") for gpu in gpus}
    return {"gpus": boards, "driver": driver or "", "kernels": kernels}


def why_needed(record: Record, now: Fingerprint) -> list[str]:
    """Say why a node has to be accepted: [] when it was, as it is now."""
    known = record.get("fingerprint")
    if known is None:
        return [NEVER]
    reasons = []
    boards = [serial or uuid for uuid, serial in now["gpus"].items() if uuid not in known["gpus"]]
    gone = [serial or uuid for uuid, serial in known["gpus"].items() if uuid not in now["gpus"]]
    if boards:
        reasons.append(f"GPUs are new: {', '.join(boards)}")
    if gone:
        reasons.append(f"GPUs are gone: {', '.join(gone)}")
    if known["driver"] != now["driver"]:
        reasons.append(f"the driver was {known['driver']} and is {now['driver']}")
    if known["kernels"] != now["kernels"]:
        reasons.append("the release has other kernels")
    if not reasons and not record.get("passed"):
        reasons.append(FAILED)
    return reasons
