# SPDX-License-Identifier: Apache-2.0
"""Whether the model fits the GPUs of the fleet, as rows and a line of the preflight report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from ..core.decode import Matching, Range, Words, decode
from ..fleet.inventory import NODES
from ..model.fit import Fit, ModelSize, Plan, Unknown, fit, read_size, unloadable
from .hardware import ERROR, WARNING, Problem
from .records import read_records

# What other things than weights and cache take is an estimate, good to about a gibibyte.
_MARGIN = 2**30
_MIB = 2**20


class Serving(TypedDict):
    """How the model is to be served, and its size; ``unknown`` says why there is no size."""

    tensor_parallel: Annotated[int, Range(1, 1024)]
    utilisation: Annotated[float, Range(0.01, 1.0)]
    # Tokens; empty takes the longest that the model was made for, as vLLM does.
    context: Annotated[str, Matching("[0-9]{0,9}", "a number of tokens")]
    release: Words
    size: ModelSize | Unknown
    unknown: Words


@dataclass
class Memory:
    """What is wrong, the line that sums it up, and the figures for the JSON report."""

    problems: list[Problem] = field(default_factory=list)
    line: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def judge_memory(
    records: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any], missing: Sequence[str] = ()
) -> Memory:
    """Compare each node's GPUs with what the model takes.

    ``records`` as for `records.read_records`, ``told`` as `Serving`; ``missing`` are the nodes that
    do not have the model yet. Raises `FleetError` for settings that cannot be read.
    """
    serving = decode(Serving, dict(told), what="How the model is to be served")
    size = read_size(serving["size"])
    if size is None:
        return Memory([_unknown(host, serving["unknown"]) for host in missing])
    found = Memory()
    smallest = 0
    for host, record in read_records(records).items():
        gpus = (record.facts.get("gpu") or {}).get("gpus") or ()
        sizes = [each["memory_total_mib"] or 0 for each in gpus]
        if NODES not in record.groups or not record.answered or not all(sizes) or not sizes:
            continue
        plan = _plan(serving, size, min(sizes) * _MIB)
        wanted = fit(size, plan)
        found.problems += _problems(host, size, plan, wanted)
        if not smallest or plan.gpu_bytes < smallest:
            smallest = plan.gpu_bytes
            found.line, found.figures = _sentence(wanted), dict(vars(wanted))
    return found


def _plan(serving: Serving, size: ModelSize, gpu_bytes: int) -> Plan:
    longest = size["config"].get("max_position_embeddings", 1)
    return Plan(
        serving["tensor_parallel"],
        gpu_bytes,
        serving["utilisation"],
        int(serving["context"] or longest),
        serving["release"],
    )


def _problems(host: str, size: ModelSize, plan: Plan, found: Fit) -> list[Problem]:
    reason = unloadable(size, plan.release)
    if reason:
        return [
            Problem(
                host,
                "quantisation",
                f"one that {plan.release} loads",
                reason,
                "choose a newer release_ref, or another model_repository",
            )
        ]
    short = plan.context * found.token - found.cache
    if short <= -_MARGIN:
        return []
    severity = ERROR if short > _MARGIN else WARNING
    expected = (
        f"room for one request of {plan.context:,} tokens "
        f"({_gib(plan.context * found.token)}) beside the weights"
    )
    remedy = f"lower serving_max_model_len to {found.longest:,} or less"
    if not found.longest:
        remedy = "share the model among more GPUs, or choose a smaller one"
    elif plan.utilisation < 0.95:
        remedy += ", or raise serving_gpu_memory_utilization"
    return [Problem(host, "GPU memory", expected, _sentence(found), remedy, severity)]


def _unknown(host: str, reason: str) -> Problem:
    return Problem(
        host,
        "GPU memory",
        "the size of the model, to compare it with the GPUs before it is fetched",
        reason or "it was not asked for",
        "let the controller reach the hub (model_endpoint, model_mirrors, model_proxy), or go on: "
        "the engine's start will tell",
        WARNING,
    )


def _sentence(found: Fit) -> str:
    return (
        f"on each GPU {_gib(found.weights)} of weights, {_gib(found.other)} for the engine, "
        f"{_gib(found.cache)} of KV cache for {found.tokens:,} tokens; "
        f"a context of {found.longest:,} tokens at most"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
