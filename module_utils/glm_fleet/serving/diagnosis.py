# SPDX-License-Identifier: Apache-2.0
"""Crashes that are known: how they look in the journal, and the way out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# The frames of a traceback and their carets, which say less than the error below them.
_FRAME = re.compile(r"\]\s{2,}\S|\^\^\^|Traceback \(most recent")


@dataclass(frozen=True)
class Signature:
    """A crash that people reported or we saw: how it looks, the way out, and whether a lower
    mode of CUDA graphs is that way."""

    pattern: str
    remedy: str
    graphs: bool = False


_SIGNATURES = (
    Signature(
        r"an illegal instruction was encountered",
        "CUDA graphs of this mode do not work here: set serving_cuda_graphs to piecewise, "
        "then to eager",
        graphs=True,
    ),
    Signature(
        r"operation not permitted when stream is capturing",
        "CUDA graph capture fails on this driver: set serving_cuda_graphs to piecewise, "
        "then to eager",
        graphs=True,
    ),
    Signature(
        r"CUDA error.*802|system not yet initialized",
        "the fabric manager is missing or of another version than the driver: install and start "
        "the nvidia-fabricmanager package of the driver's version",
    ),
    Signature(
        r"out of memory|OutOfMemoryError",
        "the GPUs are too full: lower serving_gpu_memory_utilization or serving_max_model_len",
    ),
    Signature(
        r"No available memory for the cache blocks",
        "nothing is left for the KV cache: lower serving_max_model_len",
    ),
    Signature(
        r"is larger than the maximum number of tokens that can be stored in KV cache",
        "the context does not fit into the KV cache: lower serving_max_model_len",
    ),
    Signature(
        r"No package metadata was found for vllm",
        "the wheel of this release is not called vllm: build the release again",
    ),
    Signature(
        r"Timed out waiting for engine|did not start in time|Engine core proc .* timed out",
        "the engine took longer than VLLM_ENGINE_READY_TIMEOUT_S: raise it in "
        "serving_environment, or find out why the weights load slowly",
    ),
    Signature(
        r"vllm serve: error: |unrecognized arguments",
        "this release of vLLM does not know a flag: look at serving_extra_arguments",
    ),
    Signature(
        r"(Xid .*: 74|SXid.* 24007|NCCL error|ncclUnhandledCudaError)",
        "the GPUs lost each other: look at `nvidia-smi nvlink -s` and the driver's version",
    ),
    Signature(
        r"start gate: An earlier",
        "an earlier engine still holds the GPUs: see the line of the start gate",
    ),
    # The frame around every crash of a start: only when nothing better is known.
    Signature(
        r"Engine core initialization failed",
        "the engine died while it started: the first error above it in the journal says why",
    ),
)


def _known_crash(lines: Sequence[str]) -> tuple[Signature, str] | None:
    for signature in _SIGNATURES:
        # From the end: the error itself stands below the line of code that raised it.
        for line in reversed(lines):
            if re.search(signature.pattern, line):
                return signature, line
    return None


def diagnose(lines: Sequence[str]) -> str:
    """Name the known crash that the journal shows, with its remedy; '' if none is known."""
    known = _known_crash(lines)
    return f"{known[1].strip()[-160:]}: {known[0].remedy}" if known else ""


def lower_graphs_help(lines: Sequence[str]) -> bool:
    """Tell whether the journal shows a crash that a lower mode of CUDA graphs avoids."""
    known = _known_crash(lines)
    return known is not None and known[0].graphs


def relevant_lines(lines: Sequence[str], most: int = 12) -> list[str]:
    """Pick the lines a person would look for: errors first, else the end of the journal."""
    errors = [
        line
        for line in lines
        if re.search(r"\bERROR\b|Error:|error:|start gate", line) and not _FRAME.search(line)
    ]
    picked = errors[-most:] if errors else list(lines[-most:])
    return [line[-300:] for line in picked]
