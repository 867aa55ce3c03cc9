# SPDX-License-Identifier: Apache-2.0
"""The health report as one self-contained HTML page.

Here the report becomes what the template draws: words, shares from 0 to 1, and paths of
charts made of our own numbers. What hosts said reaches the page only as text that Jinja2
escapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from ..core.chart import HEIGHT, WIDTH, figure, round_up
from ..core.format import human_bytes
from ..fleet.page import render
from ..node.answer import Facts
from ..serving.rehearsals import for_a_report
from .history import sentence
from .rules import missing_gpus
from .tables import engine_words, load_words
from .verdict import HEALTHY, VERDICTS

RUNS_DRAWN = 96
_GIB = 1024


def render_page(
    report: Mapping[str, Any], kept: Sequence[Mapping[str, Any]], template: Path
) -> str:
    """Return the page of ``report``, with the ``kept`` reports before it drawn over time."""
    return render(template, view(report, kept))


def view(report: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything that the template shows."""
    runs = [*kept, report][-RUNS_DRAWN:]
    hosts = [*report["nodes"], *report["gateways"]]
    return {
        "time": _moment(report["time"]),
        "previous": _moment(report["previous"]) if report["previous"] else "",
        "verdict": max((each["verdict"] for each in hosts), key=VERDICTS.index, default=HEALTHY),
        "headline": _headline(report["nodes"], report["gateways"]),
        "counts": [
            {"verdict": verdict, "count": sum(each["verdict"] == verdict for each in hosts)}
            for verdict in VERDICTS
        ],
        "attention": _by_host(hosts, notes=False),
        "notes": _by_host(hosts, notes=True),
        "changes": [sentence(each) for each in report["changes"]],
        "nodes": [_node(node, runs) for node in report["nodes"]],
        "gateways": [_gateway(gateway) for gateway in report["gateways"]],
        "charts": _charts(runs),
        "runs": len(runs),
    }


def _by_host(hosts: Sequence[Mapping[str, Any]], *, notes: bool) -> list[dict[str, Any]]:
    """Return each host that has findings of this kind, the worst first."""
    found = [
        {
            "name": host["name"],
            "verdict": host["verdict"],
            "findings": [
                each for each in host["findings"] if (each["verdict"] == HEALTHY) == notes
            ],
        }
        for host in sorted(hosts, key=lambda host: -VERDICTS.index(host["verdict"]))
    ]
    return [each for each in found if each["findings"]]


def _headline(nodes: Sequence[Mapping[str, Any]], gateways: Sequence[Mapping[str, Any]]) -> str:
    bad = [each for each in (*nodes, *gateways) if each["verdict"] != HEALTHY]
    if not bad:
        return "All is well"
    names = ", ".join(each["name"] for each in bad[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"{names}{more} need{'s' if len(bad) == 1 else ''} attention"


def _node(node: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    facts: Facts = node.get("facts") or Facts()
    engine = node.get("engine") or {}
    since = engine.get("since") or {}
    rows = [
        ("Engine", engine_words(node["unit"], engine)),
        ("Load", load_words(engine)),
        ("Canary", _unit(node["tokens_per_second"], "tok/s")),
        ("Served", _unit(since.get("tokens_per_second"), "tok/s since the last check")),
        ("First token", _pair(since, "first_token")),
        ("Between tokens", _pair(since, "between_tokens")),
        ("Attestation", node["attestation"]),
        ("Rehearsal", for_a_report(facts["rehearsal"]) if "rehearsal" in facts else ""),
        ("Gateway", ", ".join(f"{state} at {name}" for name, state in node["gateway"].items())),
        ("Release", node["release"]),
        ("Model", node["model"]),
        ("Driver", (facts.get("gpu") or {}).get("driver_version")),
        ("Kernel", (facts.get("os") or {}).get("kernel")),
        ("NVLink", _links(facts)),
        ("Disk", _disk(facts)),
        ("Memory", _memory(facts)),
    ]
    series = [_of(run, node["name"]) for run in runs]
    return {
        "name": node["name"],
        "verdict": node["verdict"],
        "reasons": node["reasons"],
        "next_step": node["next_step"],
        "gpus": _gpus(facts, node["baseline"]),
        "gpu_words": node["gpus"],
        "brief": _brief(node),
        "rows": [{"name": name, "value": str(value)} for name, value in rows if value],
        "strip": [
            {
                "verdict": each["verdict"] if each else "none",
                "time": _moment(run["time"]),
            }
            for run, each in zip(runs, series)
        ],
    }


def _brief(node: Mapping[str, Any]) -> str:
    """Say in a tile what matters most: the speed, or else what is there."""
    speed = _unit(node["tokens_per_second"], "tok/s")
    return speed or engine_words(node["unit"], node.get("engine") or {}) or "no answer"


def _gpus(facts: Facts, baseline: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the boards in the order of the bus, lost ones in their place where it is known."""
    boards = []
    for gpu in (facts.get("gpu") or {}).get("gpus", ()):
        total, used = float(gpu["memory_total_mib"] or 0), float(gpu["memory_used_mib"] or 0)
        marks = [
            (gpu.get("remap_failure"), "broken", "remap failed"),
            (gpu.get("volatile_uncorrectable"), "broken", "ECC"),
            (gpu.get("remap_pending"), "degraded", "remap pending"),
            (gpu.get("mig_current") == "Enabled", "degraded", "MIG on"),
            (gpu.get("throttle_reasons"), "degraded", "throttled"),
        ]
        verdict, mark = next(((tone, word) for fault, tone, word in marks if fault), (HEALTHY, ""))
        boards.append(
            {
                "bus": gpu["bus_id"],
                "title": f"GPU {gpu['index']}: {gpu['name']}",
                "label": str(gpu["index"]),
                "verdict": verdict,
                "mark": mark,
                "fill": min(max(used / total, 0.0), 1.0) if total else 0.0,
                "memory": f"{used / _GIB:.0f}/{total / _GIB:.0f} GiB",
                "heat": _heat(gpu.get("temperature_c"), gpu.get("power_draw_w")),
            }
        )
    for bus in missing_gpus(facts, baseline) if facts else []:
        boards.append(
            {
                "bus": bus,
                "title": f"GPU at {bus}: lost",
                "label": "✕",
                "verdict": "lost",
                "mark": "lost",
                "fill": 0.0,
                "memory": bus.rpartition("0000:")[2],
                "heat": "",
            }
        )
    return sorted(boards, key=lambda each: str(each["bus"]))


def _heat(celsius: Any, watts: Any) -> str:
    parts = [
        f"{float(value):.0f} {unit}" for value, unit in ((celsius, "°C"), (watts, "W")) if value
    ]
    return " · ".join(parts)


def _gateway(gateway: Mapping[str, Any]) -> dict[str, Any]:
    sent = sum(int(each.get("sent") or 0) for each in gateway["servers"])
    client = gateway.get("client") or {}
    return {
        "name": gateway["name"],
        "verdict": gateway["verdict"],
        "version": gateway["version"],
        "reasons": gateway["reasons"],
        "client": f"answered in {client.get('seconds', 0.0) * 1000:.0f} ms by "
        f"{client.get('node') or 'a node'}"
        if client.get("status") == 200
        else "",
        "servers": [
            {
                "name": each["name"],
                "status": each["status"],
                "verdict": HEALTHY if each["status"] == "UP" else "degraded",
                "check": each.get("check", ""),
                "now": int(each.get("sessions_current") or 0),
                "sent": int(each.get("sent") or 0),
                "share": int(each.get("sent") or 0) / sent if sent else 0.0,
            }
            for each in gateway["servers"]
        ],
        "clients": [
            {
                **each,
                "received": human_bytes(each["bytes_in"]),
                "answered": human_bytes(each["bytes_out"]),
                "tokens_in": each.get("tokens_in", 0),
                "tokens_out": each.get("tokens_out", 0),
            }
            for each in gateway.get("clients") or ()
        ],
    }


def _charts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the fleet's figures over the runs: each a line, with the nodes' range behind it."""
    times = [datetime.fromisoformat(run["time"]).timestamp() for run in runs]

    def figures(read: Any) -> list[list[float]]:
        return [
            [float(value) for node in run["nodes"] if (value := read(node)) is not None]
            for run in runs
        ]

    def since(key: str) -> Any:
        return lambda node: ((node.get("engine") or {}).get("since") or {}).get(key)

    served = [[sum(values)] if values else [] for values in figures(since("tokens_per_second"))]
    speed = figures(lambda node: node["tokens_per_second"])
    first = figures(since("first_token_p95_s"))
    between = figures(since("between_tokens_p95_s"))
    return [
        _chart("Served by the fleet", "tok/s", times, served),
        _chart("Canary, one stream", "tok/s", times, speed),
        _chart("Time to first token, p95", "ms", times, _scaled(first, 1000)),
        _chart("Between tokens, p95", "ms", times, _scaled(between, 1000)),
    ]


def _chart(
    title: str, unit: str, times: Sequence[float], values: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Draw the median of each run, and the range of its nodes; a run without values is a gap."""
    highest = max((max(each) for each in values if each), default=0.0)
    top = round_up(highest)
    first, last = times[0], times[-1]

    def x(at: float) -> float:
        return round((at - first) / (last - first) * WIDTH, 1) if last > first else WIDTH / 2

    def y(value: float) -> float:
        return round(HEIGHT - value / top * HEIGHT, 1) if top else HEIGHT

    line = ""
    ranges: list[str] = []
    dots: list[tuple[float, float]] = []
    begun: list[tuple[float, float, float, float]] = []
    for at, each in [*zip(times, values), (last, [])]:
        if each:
            begun.append((x(at), y(median(each)), y(max(each)), y(min(each))))
            continue
        if len(begun) == 1:
            dots.append(begun[0][:2])
        elif begun:
            line += "M" + "L".join(f"{left} {middle}" for left, middle, _, _ in begun)
            upper = " ".join(f"{left},{high}" for left, _, high, _ in begun)
            lower = " ".join(f"{left},{low}" for left, _, _, low in reversed(begun))
            ranges.append(f"{upper} {lower}")
        begun = []
    shown = [each for each in values if each]
    now = f"{figure(median(shown[-1]))} {unit}" if shown else "no figures yet"
    return {
        "title": title,
        "now": now,
        "top": figure(top),
        "half": figure(top / 2),
        "line": line,
        "ranges": ranges,
        "dots": dots,
        "empty": not shown,
        "begin": datetime.fromtimestamp(first, timezone.utc).strftime("%d %b %H:%M"),
        "end": datetime.fromtimestamp(last, timezone.utc).strftime("%d %b %H:%M"),
    }


def _scaled(values: Sequence[Sequence[float]], factor: float) -> list[list[float]]:
    return [[each * factor for each in run] for run in values]


def _of(run: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((node for node in run["nodes"] if node["name"] == name), None)


def _unit(value: Any, unit: str) -> str:
    return "" if value is None else f"{float(value):.1f} {unit}"


def _pair(since: Mapping[str, Any], key: str) -> str:
    half, most = since.get(f"{key}_p50_s"), since.get(f"{key}_p95_s")
    if half is None or most is None:
        return ""
    return f"{float(half) * 1000:.0f} ms median, {float(most) * 1000:.0f} ms p95"


def _links(facts: Facts) -> str:
    links = facts.get("gpu", {}).get("nvlink")
    if not links or not links["pairs"]:
        return ""
    return f"{links['pairs'] - len(links['pcie_only'])} of {links['pairs']} pairs"


def _disk(facts: Facts) -> str:
    disks = {disk["device"]: disk for disk in facts.get("disks", ())}
    return "; ".join(
        f"{human_bytes(each['free_bytes'])} of {human_bytes(each['total_bytes'])} free "
        f"at {each['mount']}"
        for each in disks.values()
    )


def _memory(facts: Facts) -> str:
    free, total = facts.get("memory_available_bytes"), facts.get("memory_total_bytes")
    return f"{human_bytes(free)} of {human_bytes(total)} free" if free and total else ""


def _moment(iso: str) -> str:
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M:%S UTC")
