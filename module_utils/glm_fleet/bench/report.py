# SPDX-License-Identifier: Apache-2.0
"""Puts the figures of a benchmark beside the reference: table, JSON and warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..core.table import Line, render_table

SCHEMA = "glm-fleet/benchmark/1"
NODE = "node"
GATEWAY = "gateway"


def judge_target(
    name: str,
    path: str,
    answer: Mapping[str, Any],
    reference: Mapping[int, float],
    min_ratio: float,
) -> dict[str, Any]:
    """Return what the report says of one node alone, or of the way through one gateway.

    ``answer`` is the result of ``vllm_bench``; ``reference`` maps streams per node to the
    tokens per second that one node gives them together. Shape: {name, path, release,
    model, levels, clients, warnings, error}, each level with ``reference`` and ``ratio`` (None
    where there is none).
    """
    running = answer.get("running") or {}
    target: dict[str, Any] = {
        "name": name,
        "path": path,
        "release": running.get("release", ""),
        "model": running.get("model", ""),
        "levels": [],
        "clients": dict(answer.get("clients") or {}),
        "warnings": [],
        "error": "",
    }
    problem = answer.get("problem") or (
        "" if "levels" in answer else answer.get("msg", "no answer")
    )
    target["error"] = str(problem).strip()
    others: list[str] = []
    for found in answer.get("levels", ()):
        level = dict(found)
        expected = reference.get(level["per_node"])
        level["reference"] = None if expected is None else expected * level["nodes"]
        level["ratio"] = None
        if level["reference"]:
            level["ratio"] = round(level["decode_together"] / level["reference"], 3)
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
    if others:
        target["warnings"].append(f"other traffic counts in ({'; '.join(others)})")
    return target


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
