# SPDX-License-Identifier: Apache-2.0
"""The reports of earlier checks: what changed since, and what to draw over time.

A kept report is the full one without the raw facts and checks of its nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.files import write_atomically

SCHEMA = "glm-fleet/health/1"
_RAW = ("facts", "probe")
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


def load(folder: Path, most: int) -> list[dict[str, Any]]:
    """Return the last ``most`` kept reports, oldest first; what cannot be read is left out."""
    reports = []
    for path in _files(folder)[-most:] if most else []:
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and report.get("schema") == SCHEMA:
            reports.append(report)
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
