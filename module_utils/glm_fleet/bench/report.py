# SPDX-License-Identifier: Apache-2.0
"""Puts the figures of a benchmark beside the reference: table, JSON and warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from .. import __version__
from ..core.decode import Range, Size, Words, decode, read
from ..core.errors import FleetError
from ..core.table import Line, render_table
from .roofline import Shape, limit

SCHEMA = "glm-fleet/benchmark/1"
_Rate = Annotated[float, Range(0.0, 1e12)]


class Spread(TypedDict):
    """Times in milliseconds."""

    median: _Rate
    p95: _Rate
    p99: _Rate


class _LevelOptional(TypedDict, total=False):
    # Not there in what an earlier version wrote.
    limit: _Rate | None


class _Level(_LevelOptional):
    streams: Annotated[int, Range(1, 1e6)]
    decode_per_stream: _Rate
    decode_together: _Rate
    output_rate: _Rate
    reference: _Rate | None
    ttft_ms: Spread
    itl_ms: Spread


class _Prompt(TypedDict):
    prompt_tokens: Annotated[int, Range(1, 1e9)]
    cold: Spread
    warm: Spread


class _TargetOptional(TypedDict, total=False):
    prompts: Annotated[Sequence[_Prompt], Size(1000)]


class _Target(_TargetOptional):
    name: Words
    path: Words
    release: Words
    levels: Annotated[Sequence[_Level], Size(1000)]


class Report(TypedDict):
    """A report as far as another one is compared with it."""

    schema: Literal["glm-fleet/benchmark/1"]
    targets: Annotated[Sequence[_Target], Size(100_000)]


NODE = "node"
GATEWAY = "gateway"


@dataclass(frozen=True)
class Bounds:
    """What figures are held against beside the reference.

    ``ttft_ms`` and ``itl_ms`` are what 95 of 100 requests have to keep for goodput. One of
    ``gpus`` reads ``bytes_per_second`` of its memory, and a sequence has ``context`` tokens on
    average, for the roofline.
    """

    ttft_ms: float = 2000.0
    itl_ms: float = 100.0
    gpus: int = 8
    bytes_per_second: float = 2.039e12
    context: float = 640.0


def judge_target(
    name: str,
    path: str,
    answer: Mapping[str, Any],
    reference: Mapping[int, float],
    min_ratio: float,
    bounds: Bounds = Bounds(),
) -> dict[str, Any]:
    """Return what the report says of one node alone, or of the way through one gateway.

    ``answer`` is the result of ``vllm_bench``; ``reference`` maps streams per node to the
    tokens per second that one node gives them together. Shape: {name, path, release,
    model, levels, clients, prompts, goodput, warnings, error}, each level with ``reference``,
    ``ratio`` and ``limit`` (the roofline, in tokens a second), None where there is none.
    ``goodput`` is {tokens_per_second, streams} of the fastest level within the bounds, {} if none
    is.
    """
    running = answer.get("running") or {}
    target: dict[str, Any] = {
        "name": name,
        "path": path,
        "release": running.get("release", ""),
        "model": running.get("model", ""),
        "levels": [],
        "clients": dict(answer.get("clients") or {}),
        "prompts": list(answer.get("prompts") or []),
        "warnings": [],
        "error": "",
    }
    problem = answer.get("problem") or (
        "" if "levels" in answer else answer.get("msg", "no answer")
    )
    target["error"] = str(problem).strip()
    others: list[str] = []
    shape = _shape(answer)
    for found in answer.get("levels", ()):
        level = _level(found, reference.get(found["per_node"]), shape, bounds)
        target["levels"].append(level)
        at = f"{level['streams']} at once"
        if level["ratio"] is not None and level["ratio"] < min_ratio:
            target["warnings"].append(
                f"{at}: {level['ratio']:.2f} of the reference, {min_ratio:.2f} wanted"
            )
        if not level["all_at_once"]:
            target["warnings"].append(f"{at}: the server did not run all of them at once")
        if level["other_traffic"]:
            others.append(f"{at}: {level['other_traffic']}")
    target["goodput"] = goodput(target["levels"], bounds)
    if others:
        target["warnings"].append(f"other traffic counts in ({'; '.join(others)})")
    return target


def _level(
    found: Mapping[str, Any], expected: float | None, shape: Shape | None, bounds: Bounds
) -> dict[str, Any]:
    """Return a level beside the reference of one node and the roofline."""
    level = {**found, "reference": None, "ratio": None, "limit": None}
    if expected is not None:
        level["reference"] = expected * found["nodes"]
    if level["reference"]:
        level["ratio"] = round(found["decode_together"] / level["reference"], 3)
    if shape:
        most = limit(
            shape,
            streams=found["streams"],
            context=bounds.context,
            gpus=bounds.gpus,
            bytes_per_second=bounds.bytes_per_second,
        )
        level["limit"] = round(most, 1)
    return level


def read_report(path: Path) -> Mapping[str, Any]:
    """Return a report that was written before, {} where there is none; raises `FleetError`."""
    try:
        return read(Report, path)
    except FileNotFoundError:
        return {}


def goodput(levels: Sequence[Mapping[str, Any]], bounds: Bounds) -> dict[str, Any]:
    """Return {tokens_per_second, streams} of the fastest level within the bounds, {} if none is."""
    kept = [
        level
        for level in levels
        if level["ttft_ms"]["p95"] <= bounds.ttft_ms and level["itl_ms"]["p95"] <= bounds.itl_ms
    ]
    if not kept:
        return {}
    best = max(kept, key=lambda level: float(level["output_rate"]))
    return {"tokens_per_second": best["output_rate"], "streams": best["streams"]}


def _shape(answer: Mapping[str, Any]) -> Shape | None:
    try:
        return decode(Shape, answer["shape"], what="The shape of the model")
    except (KeyError, FleetError):
        return None


def benchmark_json(
    targets: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], time: str
) -> dict[str, Any]:
    """Return {schema, made_by, time, settings, targets, summary: {measured, warned, failed}}."""
    failed = sum(bool(each["error"]) for each in targets)
    return {
        "schema": SCHEMA,
        "made_by": f"glm-fleet {__version__}",
        "time": time,
        "settings": dict(settings),
        "targets": list(targets),
        "summary": {
            "measured": len(targets) - failed,
            "warned": sum(bool(each["warnings"]) for each in targets),
            "failed": failed,
        },
    }


def render_benchmark(targets: Sequence[Mapping[str, Any]], width: int) -> list[Line]:
    """Return the table of every level of every target, then what is wrong with whom."""
    heading = (
        "where",
        "at once",
        "tok/s each",
        "together",
        "reference",
        "ratio",
        "first token, ms",
        "between tokens, ms",
    )
    rows, tones, lines = [], [], []
    for target in targets:
        for level in target["levels"]:
            rows.append(
                (
                    _where(target),
                    str(level["streams"]),
                    f"{level['decode_per_stream']:.1f}",
                    f"{level['decode_together']:.1f}",
                    "-" if level["reference"] is None else f"{level['reference']:g}",
                    "-" if level["ratio"] is None else f"{level['ratio']:.2f}",
                    _spread(level["ttft_ms"], 0),
                    _spread(level["itl_ms"], 1),
                )
            )
            tones.append("warning" if _named(target, level) else "")
        if target["clients"]:
            lines.append((_clients_in_words(target), ""))
        text = "; ".join(target["warnings"])
        if text:
            lines.append((f"{_where(target)}: {text}.", "warning"))
        if target["error"]:
            lines.append((f"{_where(target)} was not measured: {target['error']}", "bad"))
    table = render_table(heading, rows, width, tones) if rows else []
    note = [Line("Times are median / p95 / p99.")] if rows else []
    return (
        table
        + note
        + [
            Line(part, tone)
            for text, tone in lines
            for part in textwrap.wrap(text, max(width, 40), subsequent_indent="    ")
        ]
    )


def _clients_in_words(target: Mapping[str, Any]) -> str:
    found = target["clients"]
    return (
        f"{_where(target)}: {found['clients']} clients with short requests one after another: "
        f"{found['output_rate']:.1f} tok/s, a request {_spread(found['request_ms'], 0)} ms."
    )


def _where(target: Mapping[str, Any]) -> str:
    return f"through {target['name']}" if target["path"] == GATEWAY else str(target["name"])


def _named(target: Mapping[str, Any], level: Mapping[str, Any]) -> bool:
    return any(str(each).startswith(f"{level['streams']} at once:") for each in target["warnings"])


def _spread(values: Mapping[str, float], digits: int) -> str:
    return " / ".join(f"{values[name]:.{digits}f}" for name in ("median", "p95", "p99"))
