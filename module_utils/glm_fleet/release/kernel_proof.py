# SPDX-License-Identifier: Apache-2.0
"""Does every Triton kernel that serving launches compile for the fleet's GPUs, and fit them?

Triton compiles for a GPU that is not there, so the builder can tell. The release's own launchers
are called as `proof.entries` says, under its own torch and Triton.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from .proof.entries import Entry, entries_for, is_listed, sizes
from .proof.environment import ProofEnvironment

# Shared memory that one block can have, in bytes, by compute capability (CUDA's programming
# guide, "shared memory per thread block").
SHARED_BYTES = {
    "8.0": 166_912,
    "8.6": 101_376,
    "8.7": 166_912,
    "8.9": 101_376,
    "9.0": 232_448,
    "10.0": 232_448,
    "10.3": 232_448,
    "12.0": 101_376,
    "12.1": 101_376,
}
_TIMEOUT_S = 1200.0


def prove_kernels(
    environment: ProofEnvironment,
    tree: Path,
    *,
    backend: str,
    version: str,
    capabilities: Sequence[str],
    shapes: Mapping[str, int],
) -> dict[str, Any]:
    """Compile every kernel for every capability; return the figures for the manifest.

    Raises `FleetError` with every kernel that does not compile or does not fit.
    """
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    for capability in capabilities:
        limit = shared_limit(capability)
        entries = [
            entry for entry in entries_for(backend, version) if launched(entry, tree, capability)
        ]
        found = environment.run_parts(
            "compile",
            {
                "tree": str(tree),
                "capability": capability,
                "entries": [entry.as_dict() for entry in entries],
                "sizes": sizes(shapes),
                "notes": str(environment.folder / "notes"),
            },
            timeout=_TIMEOUT_S,
        )
        rows += [{**row, "capability": capability, "limit": limit} for row in found]
    judge(rows, tree)
    return {
        "compiled": len(rows),
        "seconds": round(time.monotonic() - begun, 1),
        # Of later versions the entries know some of the release's own kernels, not all.
        "of_release": is_listed(version),
        "largest_shared_bytes": max((row["shared"] for row in rows), default=0),
        "kernels": summary(rows),
    }


def shared_limit(capability: str) -> int:
    """Return the shared memory of a block in bytes; `FleetError` for an unknown capability."""
    try:
        return SHARED_BYTES[capability]
    except KeyError:
        raise FleetError(
            f"The compute capability {capability} is not known",
            expected=f"one of {', '.join(SHARED_BYTES)}",
            found=capability,
            remedy="correct release_compute_capabilities",
        ) from None


def judge(rows: Sequence[Mapping[str, Any]], tree: Path) -> None:
    """Refuse kernels that do not compile or need more shared memory than a block can have."""
    problems = []
    for row in rows:
        where = _where(row, tree)
        if "error" in row:
            problems.append(f"{where}: {row['error']}")
        elif row["shared"] > row["limit"]:
            problems.append(
                f"{where} needs {row['shared']} bytes of shared memory, a block has {row['limit']}"
            )
    if problems:
        different = list(dict.fromkeys(problems))
        raise FleetError(
            f"{len(different)} kernel(s) of this release do not run on the fleet's GPUs",
            expected="every Triton kernel that serving launches to compile and to fit",
            found="; ".join(different[:10]),
            remedy="name another ref with its wheel, a pull request that was rebased, or a "
            "correction in release_patches",
            details={"kernels": [dict(row) for row in rows if "error" in row]},
        )


def _where(row: Mapping[str, Any], tree: Path) -> str:
    """Name the kernel, its place, and the GPU."""
    file = str(row.get("file", "")).replace(f"{tree}/", "")
    place = f" ({file}:{row['line']})" if row.get("line") else f" ({file})" if file else ""
    kernel = row.get("kernel", f"the entry '{row.get('entry')}'")
    return f"{kernel}{place} for capability {row['capability']}"


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the configurations of each kernel: the most shared memory, registers and spills."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        each = found.setdefault(
            (row["capability"], row["kernel"]),
            {
                "kernel": row["kernel"],
                "capability": row["capability"],
                "configurations": 0,
                "shared_bytes": 0,
                "registers": 0,
                "spilled_bytes": 0,
            },
        )
        each["configurations"] += 1
        each["shared_bytes"] = max(each["shared_bytes"], row["shared"])
        each["registers"] = max(each["registers"], row["registers"])
        spilled = row["spill_stores"] + row["spill_loads"]
        each["spilled_bytes"] = max(each["spilled_bytes"], spilled)
    return [found[key] for key in sorted(found)]


def launched(entry: Entry, tree: Path, capability: str) -> bool:
    """Tell whether the release launches an entry on such a GPU.

    The release decides by a condition that it keeps in an attribute, or under which it imports a
    module; what the condition asks and is not known here may be true.
    """
    path, attribute = entry.gate
    if not attribute:
        return True
    try:
        module = ast.parse((tree / path).read_bytes())
    except (OSError, SyntaxError) as error:
        raise FleetError(f"{path} of the release cannot be read", found=str(error)) from error
    if attribute.startswith("from "):
        return _imported(module.body, attribute.removeprefix("from "), capability) is not False
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Attribute) and target.attr == attribute
            for target in node.targets
        ):
            return _truth(node.value, capability) is not False
    return True


def _imported(body: Sequence[ast.stmt], name: str, capability: str) -> bool | None:
    """Tell whether ``from <name>`` is reached; None where a condition asks something else."""
    found: bool | None = False
    for node in body:
        if isinstance(node, ast.ImportFrom) and "." * node.level + (node.module or "") == name:
            return True
        if isinstance(node, ast.If):
            truth = _truth(node.test, capability)
            for part, taken in ((node.body, truth is not False), (node.orelse, truth is not True)):
                inside = _imported(part, name, capability) if taken else False
                if inside is True and truth is not None:
                    return True
                found = None if inside is not False else found
    return found


def _truth(test: ast.expr, capability: str) -> bool | None:
    """Evaluate a condition on the platform; None where it asks something else."""
    if isinstance(test, ast.BoolOp):
        parts = [_truth(each, capability) for each in test.values]
        decisive = isinstance(test.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand, capability)
        return None if inner is None else not inner
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute):
        name = test.func.attr
        if name in ("is_cuda", "is_cuda_alike"):
            return True
        if name.startswith("is_") and not test.args:
            return False
        if name == "has_device_capability" and len(test.args) == 1:
            wanted = test.args[0]
            if isinstance(wanted, ast.Constant) and isinstance(wanted.value, int):
                return int(capability.replace(".", "")) >= wanted.value
    return None
