# SPDX-License-Identifier: Apache-2.0
"""The benchmark as one self-contained HTML page.

Here a report becomes what the template draws: words, and paths of charts made of our own numbers.
Its style is that of the health report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..core.chart import HEIGHT, WIDTH, figure, round_up
from ..fleet.page import render
from .report import NODE

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a chart; ``style`` is this, before, limit or reference."""

    name: str
    style: str
    points: Points = field(default=())


def render_page(report: Mapping[str, Any], before: Mapping[str, Any], template: Path) -> str:
    """Return the page of a report; ``before`` is that of the release before, {} if none is kept."""
    return render(template, view(report, before))


def view(report: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the template shows."""
    nodes, old = _nodes(report), _nodes(before)
    settings = report["settings"]
    releases = sorted({str(each["release"]) for each in nodes if each["release"]})
    return {
        "time": str(report["time"]),
        "headline": _headline(nodes),
        "release": ", ".join(releases) or "unknown",
        "before": ", ".join(sorted({str(each["release"]) for each in old})),
        "load": f"{settings['prompt_tokens']} tokens in, {settings['output_tokens']} out",
        "charts": _charts(nodes, old),
        "targets": [_target(each) for each in report["targets"]],
    }


def is_before(known: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    """Tell whether a report is of another release than one that follows it."""

    def releases(found: Mapping[str, Any]) -> set[str]:
        return {str(each["release"]) for each in _nodes(found) if each["release"]}

    return bool(releases(known)) and not releases(known) & releases(report)


def _nodes(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in report.get("targets", ()) if each["path"] == NODE and each["levels"]]


def _headline(nodes: Sequence[Mapping[str, Any]]) -> str:
    if not nodes:
        return "No node was measured"
    most = median(max(level["output_rate"] for level in each["levels"]) for each in nodes)
    one = "" if len(nodes) == 1 else "each of "
    names = nodes[0]["name"] if len(nodes) == 1 else f"{len(nodes)} nodes"
    return f"{figure(most)} tokens a second from {one}{names}"


def _charts(
    nodes: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    def both(key: str, part: str = "") -> list[Curve]:
        return [
            Curve("this release", "this", _over_streams(nodes, key, part)),
            Curve("the one before", "before", _over_streams(old, key, part)),
        ]

    charts = [
        _chart(
            "All streams together, after the first token",
            "tok/s",
            "requests at once",
            [
                *both("decode_together"),
                Curve("memory's limit", "limit", _over_streams(nodes, "limit")),
                Curve("reference", "reference", _over_streams(nodes, "reference")),
            ],
        ),
        _chart("One stream", "tok/s", "requests at once", both("decode_per_stream")),
        _chart("Time to first token, p95", "ms", "requests at once", both("ttft_ms", "p95")),
        _chart("Between tokens, p95", "ms", "requests at once", both("itl_ms", "p95")),
        _chart(
            "Time to first token, one stream, median",
            "ms",
            "tokens of the prompt",
            [
                Curve("prompt is new", "this", _over_prompts(nodes, "cold")),
                Curve("in the prefix cache", "reference", _over_prompts(nodes, "warm")),
                Curve("new, the release before", "before", _over_prompts(old, "cold")),
            ],
        ),
    ]
    return [each for each in charts if each["curves"]]


def _over_streams(targets: Sequence[Mapping[str, Any]], key: str, part: str = "") -> Points:
    """Return the median of the nodes at each level."""
    found: dict[float, list[float]] = {}
    for target in targets:
        for level in target["levels"]:
            value = level.get(key)
            value = value.get(part) if part and value else value
            if value is not None:
                found.setdefault(level["streams"], []).append(float(value))
    return [(streams, median(values)) for streams, values in sorted(found.items())]


def _over_prompts(targets: Sequence[Mapping[str, Any]], key: str) -> Points:
    found: dict[float, list[float]] = {}
    for target in targets:
        for each in target.get("prompts", ()):
            found.setdefault(each["prompt_tokens"], []).append(float(each[key]["median"]))
    return [(tokens, median(values)) for tokens, values in sorted(found.items())]


def _chart(title: str, unit: str, along: str, curves: Sequence[Curve]) -> dict[str, Any]:
    """Draw curves over a logarithmic axis; a limit far above the rest does not set the scale."""
    drawn = [each for each in curves if each.points]
    places = sorted({at for each in drawn for at, _ in each.points})
    first = math.log(places[0]) if places else 0.0
    last = math.log(places[-1]) if places else 0.0
    measured = [value for each in drawn if each.style != "limit" for _, value in each.points]
    highest = max(measured, default=0.0)
    bounds = [value for each in drawn if each.style == "limit" for _, value in each.points]
    top = round_up(min(max([highest, *bounds], default=0.0), 3 * highest or 1.0))

    def x(at: float) -> float:
        if last <= first:
            return WIDTH / 2
        return round((math.log(at) - first) / (last - first) * WIDTH, 1)

    def y(value: float) -> float:
        return round(HEIGHT - min(value / top, 1.1) * HEIGHT, 1)

    return {
        "title": title,
        "unit": unit,
        "along": along,
        "top": figure(top),
        "half": figure(top / 2),
        "ticks": [(x(at), figure(at)) for at in places],
        "curves": [
            {
                "name": each.name,
                "style": each.style,
                "line": "M" + "L".join(f"{x(at)} {y(value)}" for at, value in each.points),
                "dots": [(x(at), y(value), figure(value)) for at, value in each.points],
            }
            for each in drawn
        ]
        if any(each.style == "this" for each in drawn)
        else [],
    }


def _target(target: Mapping[str, Any]) -> dict[str, Any]:
    good = target.get("goodput") or {}
    return {
        "name": target["name"] if target["path"] == NODE else f"through {target['name']}",
        "error": target["error"],
        "warnings": target["warnings"],
        "goodput": f"{good['tokens_per_second']:.0f} tok/s with {good['streams']} at once"
        if good
        else "",
        "rows": [
            [
                str(level["streams"]),
                f"{level['decode_per_stream']:.1f}",
                f"{level['decode_together']:.1f}",
                _share(level["decode_together"], level.get("limit")),
                "-" if level["ratio"] is None else f"{level['ratio']:.2f}",
                f"{level['ttft_ms']['median']:.0f} / {level['ttft_ms']['p95']:.0f}",
                f"{level['itl_ms']['median']:.1f} / {level['itl_ms']['p95']:.1f}",
            ]
            for level in target["levels"]
        ],
    }


def _share(value: float, most: float | None) -> str:
    return f"{value / most:.0%} of {most:.0f}" if most else "-"
