# SPDX-License-Identifier: Apache-2.0
"""Tables for people and JSON for machines: pure rendering, and one atomic write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.files import write_atomically
from ..core.table import Line, plural, render_table, wrap
from .hardware import ERROR, Problem
from .history import SCHEMA, changes, sentence
from .verdict import HEALTHY, VERDICTS, GatewayHealth, NodeHealth

PREFLIGHT_SCHEMA = "glm-fleet/preflight/1"


def render_preflight(hosts: Sequence[str], problems: Sequence[Problem], width: int) -> list[Line]:
    """Return the table of every problem of every host, errors first within a host."""
    if not problems:
        return [Line(f"Preflight: no problem on {plural(len(hosts), 'host')}.", "good")]
    order = {host: place for place, host in enumerate(hosts)}
    ranked = sorted(problems, key=lambda each: (order[each.host], each.severity != ERROR))
    rows = [
        (
            each.host,
            each.check if each.severity == ERROR else f"{each.check} ({each.severity})",
            each.expected,
            each.found,
            each.remedy,
        )
        for each in ranked
    ]
    tones = ["bad" if each.severity == ERROR else "warning" for each in ranked]
    heading = ("host", "check", "expected", "found", "what to do")
    return [
        *render_table(heading, rows, width, tones),
        Line(""),
        Line(preflight_sentence(hosts, problems), "bad" if _errors(problems) else "warning"),
    ]


def preflight_sentence(hosts: Sequence[str], problems: Sequence[Problem]) -> str:
    """Sum up: how many problems on how many hosts, and that nothing was changed."""
    errors = _errors(problems)
    warnings = len(problems) - len(errors)
    touched = len({each.host for each in errors})
    return (
        f"Preflight: {plural(len(errors), 'problem')} on {touched} of "
        f"{plural(len(hosts), 'host')}, {plural(warnings, 'warning')}. Nothing was changed."
    )


def preflight_json(hosts: Sequence[str], problems: Sequence[Problem], time: str) -> dict[str, Any]:
    """Return {schema, made_by, time, hosts, problems, summary: {errors, warnings}}."""
    errors = len(_errors(problems))
    return {
        "schema": PREFLIGHT_SCHEMA,
        "made_by": f"glm-fleet {__version__}",
        "time": time,
        "hosts": list(hosts),
        "problems": [each.as_dict() for each in problems],
        "summary": {"errors": errors, "warnings": len(problems) - errors},
    }


def render_health(
    nodes: Sequence[NodeHealth],
    gateways: Sequence[GatewayHealth],
    width: int,
    changed: Sequence[Mapping[str, str]] = (),
    since: str = "",
) -> list[Line]:
    """Return the fleet's table, a line for each finding, and what changed ``since``."""
    heading = (
        "node",
        "verdict",
        "GPUs",
        "release",
        "model",
        "engine",
        "attestation",
        "tok/s",
        "load",
        "gateway",
    )
    rows = [
        (
            node.name,
            node.verdict,
            node.gpus,
            node.release or "-",
            node.model or "-",
            engine_words(node.unit, node.engine) or "-",
            node.attestation or "-",
            "-" if node.tokens_per_second is None else f"{node.tokens_per_second:.1f}",
            load_words(node.engine) or "-",
            node.gateway_cell or "-",
        )
        for node in nodes
    ]
    lines = render_table(heading, rows, width, [_TONES[node.verdict] for node in nodes])
    for gateway in gateways:
        version = f" (HAProxy {gateway.version})" if gateway.version else ""
        sent = ", ".join(f"{each['name']} {each['sent']}" for each in gateway.servers)
        text = f"gateway {gateway.name}{version}: {gateway.verdict}, {gateway.up} UP"
        lines.append(Line(text + (f"; sent: {sent}" if sent else ""), _TONES[gateway.verdict]))
        asked = ", ".join(_usage_words(each) for each in gateway.clients)
        lines += wrap(f"  clients since its last reload: {asked}", width, "") if asked else []
    hosts: list[NodeHealth | GatewayHealth] = [*nodes, *gateways]
    for each in hosts:
        for finding in each.findings:
            note = finding.verdict == HEALTHY
            text = f"{each.name} {'note' if note else 'is ' + finding.verdict}: {finding.cause}."
            if finding.next_step:
                text += f" What to do: {finding.next_step}."
            tone = "" if note else _TONES[finding.verdict]
            lines += wrap(text, width, tone)
    if changed:
        lines.append(Line(f"Since {since}:"))
        for change in changed:
            lines += wrap(f"  {sentence(change)}", width, "")
    lines.append(Line(health_sentence(nodes, gateways), _TONES[_worst(hosts)]))
    return lines


def _usage_words(client: Mapping[str, Any]) -> str:
    more = [f"{client[key]} {key}" for key in ("refused", "failed") if client[key]]
    if client.get("tokens_out"):
        more.append(f"{client['tokens_out']} tokens told")
    return f"{client['name']} {client['requests']}" + (f" ({', '.join(more)})" if more else "")


def health_sentence(nodes: Sequence[NodeHealth], gateways: Sequence[GatewayHealth]) -> str:
    """Sum up: how many are healthy."""
    parts = [
        f"{sum(each.verdict == HEALTHY for each in hosts)} of {plural(len(hosts), noun)}"
        for hosts, noun in ((nodes, "node"), (gateways, "gateway"))
    ]
    return f"Health: {' and '.join(parts)} healthy."


def engine_words(unit: str, engine: Mapping[str, Any]) -> str:
    """Say what the engine does: its own state, or the unit's while there is no engine."""
    state = engine.get("state") or ""
    if state == "starting":
        return f"starting: {engine.get('phase')}"
    return unit if state in ("", "down") else str(state)


def load_words(engine: Mapping[str, Any]) -> str:
    """Say what the engine carries: requests that run and wait, and the share of KV cache."""
    if engine.get("running") is None:
        return ""
    return (
        f"{engine['running']:.0f} run, {engine['waiting']:.0f} wait, "
        f"KV {engine['kv_cache_usage'] * 100:.0f}%"
    )


def health_json(
    nodes: Sequence[NodeHealth],
    gateways: Sequence[GatewayHealth],
    time: str,
    previous: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report as docs/health.md describes it, with the changes since ``previous``."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "made_by": f"glm-fleet {__version__}",
        "time": time,
        "previous": (previous or {}).get("time"),
        "nodes": [each.as_dict() for each in nodes],
        "gateways": [each.as_dict() for each in gateways],
        "summary": {"nodes": count_verdicts(nodes), "gateways": count_verdicts(gateways)},
    }
    return {**report, "changes": changes(previous or {}, report)}


def count_verdicts(hosts: Sequence[NodeHealth | GatewayHealth]) -> dict[str, int]:
    """Count hosts by verdict, every verdict named."""
    return {verdict: sum(each.verdict == verdict for each in hosts) for verdict in VERDICTS}


def write_json(path: Path, data: Any, mode: int = 0o600) -> None:
    """Write ``data`` as `write_text` does."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n", mode)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part.

    Reports hold the command lines of whoever uses a GPU: they are for the user who asked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text, mode)


_TONES = {"healthy": "good", "degraded": "warning", "broken": "bad", "unknown": "bad"}


def _worst(hosts: Sequence[NodeHealth | GatewayHealth]) -> str:
    return max((each.verdict for each in hosts), key=VERDICTS.index, default=HEALTHY)


def _errors(problems: Sequence[Problem]) -> list[Problem]:
    return [each for each in problems if each.severity == ERROR]
