# SPDX-License-Identifier: Apache-2.0
"""The reports of earlier checks: what changed since, and what to draw over time.

A kept report is the full one without the raw facts and checks of its nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict

from ..core.decode import Amount, Count, Moment, Range, Words, read
from ..core.errors import FleetError
from ..core.files import write_atomically
from ..serving.probe import Sample
from .verdict import Verdict

SCHEMA = "glm-fleet/health/1"
_RAW = ("facts", "probe")
# Between two samples a figure can fall, too.
Figure = Annotated[float, Range(-1e18, 1e18)]
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ\.json")
# What is told when it differs, and how people call it.
_NODE_FIELDS = {
    "verdict": "verdict",
    "gpus": "GPUs",
    "release": "release",
    "model": "model",
    "gateway": "gateway",
}
_GATEWAY_FIELDS = {"verdict": "verdict", "version": "version", "up": "servers UP"}


class FindingRow(TypedDict):
    """One finding about a host."""

    check: Words
    verdict: Verdict
    cause: Words


class Baseline(TypedDict, total=False):
    """What the next check compares with; {} of a host that never answered."""

    time: Words
    epoch_s: Amount | None
    invocation_id: Words
    n_restarts: Count
    ecc: Mapping[str, Count]
    gpus: Sequence[Words]
    engine: Sample | Mapping[str, NoReturn]
    slow: bool
    sent: Mapping[str, Count]


class EngineRow(TypedDict, total=False):
    """The engine's figures, and since the check before, which may be None."""

    state: Words
    phase: Words
    running: Amount | None
    waiting: Amount | None
    kv_cache_usage: Amount | None
    since: Mapping[str, Figure | None]
    restarts: Count


class NodeRow(TypedDict):
    """One node of a kept report."""

    name: Words
    verdict: Verdict
    reasons: Sequence[Words]
    next_step: Words
    findings: Sequence[FindingRow]
    gpus: Words
    release: Words
    model: Words
    unit: Words
    attestation: Words
    tokens_per_second: Amount | None
    gateway: Mapping[str, Words]
    engine: EngineRow
    baseline: Baseline


class GatewayRow(TypedDict):
    """One gateway of a kept report."""

    name: Words
    verdict: Verdict
    reasons: Sequence[Words]
    next_step: Words
    findings: Sequence[FindingRow]
    version: Words
    up: Count
    baseline: Baseline


class Report(TypedDict):
    """A report of the fleet's health: see docs/health.md."""

    schema: Literal["glm-fleet/health/1"]
    time: Moment
    nodes: Sequence[NodeRow]
    gateways: Sequence[GatewayRow]


def load(folder: Path, most: int, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the last ``most`` kept reports, oldest first.

    What cannot be read is left out, and why is appended to ``damaged``.
    """
    reports = []
    for path in _files(folder)[-most:] if most else []:
        try:
            reports.append(dict(read(Report, path)))
        except FileNotFoundError:
            continue
        except FleetError as error:
            if damaged is not None:
                damaged.append(f"{error.message} ({error.found})")
    return reports


def latest(kept: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the newest report, with the hosts that only earlier ones have.

    A run with ``--limit`` must not make the next one forget the others.
    """
    if not kept:
        return {}
    merged: dict[str, Any] = dict(kept[-1])
    for kind in ("nodes", "gateways"):
        hosts = {host["name"]: host for report in kept for host in report[kind]}
        merged[kind] = list(hosts.values())
    return merged


def save(folder: Path, report: Mapping[str, Any], keep: int) -> None:
    """Keep this report and the ``keep`` - 1 before it."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = [
        {key: value for key, value in node.items() if key not in _RAW} for node in report["nodes"]
    ]
    name = report["time"][:19].replace(":", "-") + "Z.json"
    text = json.dumps({**report, "nodes": nodes}, sort_keys=True) + "\n"
    write_atomically(folder / name, text, 0o600)
    for path in _files(folder)[: -max(keep, 1)]:
        path.unlink(missing_ok=True)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what differs between two reports: {host, what, before, after}.

    A fault that came has no ``before``, one that went no ``after``. [] without ``before``;
    hosts that were not looked at this time are left out.
    """
    if not before:
        return []
    found: list[dict[str, str]] = []
    for kind, names in (("nodes", _NODE_FIELDS), ("gateways", _GATEWAY_FIELDS)):
        old = {each["name"]: each for each in before.get(kind, ())}
        new = {each["name"]: each for each in after.get(kind, ())}
        for name, host in new.items():
            found += [
                {"host": name, "what": what, "before": was, "after": now}
                for what, was, now in _host_changes(old.get(name), host, names)
            ]
    return found


def sentence(change: Mapping[str, str]) -> str:
    """Say one change in words."""
    host, what, was, now = (change[key] for key in ("host", "what", "before", "after"))
    if what == "fault":
        return f"{host}: {'new: ' + now if now else 'no longer: ' + was}"
    return f"{host}: {what} {was or 'none'} -> {now or 'none'}"


def _host_changes(
    old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, names: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    if old is None or new is None:
        return [("verdict", str(old["verdict"]) if old else "", str(new["verdict"]) if new else "")]
    found = [
        (what, _text(old.get(key)), _text(new.get(key)))
        for key, what in names.items()
        # A host that gave no answer tells nothing of what it has.
        if old.get(key) != new.get(key)
        and (key in ("verdict", "gateway") or "unknown" not in (old["verdict"], new["verdict"]))
    ]
    was, now = (
        {each["check"]: each["cause"] for each in host["findings"] if each["verdict"] != "healthy"}
        for host in (old, new)
    )
    found += [("fault", "", cause) for check, cause in now.items() if check not in was]
    found += [("fault", cause, "") for check, cause in was.items() if check not in now]
    return found


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        states = set(value.values())
        if len(states) == 1:
            return str(states.pop())
        return ", ".join(f"{key} {each}" for key, each in sorted(value.items()))
    return "" if value is None else str(value)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
