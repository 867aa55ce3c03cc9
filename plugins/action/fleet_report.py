# SPDX-License-Identifier: Apache-2.0
"""Judges and prints what was gathered from all hosts: see library/fleet_report.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ROOT, ControllerAction
from glm_fleet.core.errors import FleetError, from_os_error
from glm_fleet.core.table import Line, wrap
from glm_fleet.health import history
from glm_fleet.health.exposition import exposition, targets
from glm_fleet.health.hardware import ERROR
from glm_fleet.health.html import RUNS_DRAWN, render_page
from glm_fleet.health.judge import judge_fleet
from glm_fleet.health.memory import Memory, judge_memory
from glm_fleet.health.preflight import judge_hosts, without_model
from glm_fleet.health.records import LEFT
from glm_fleet.health.tables import (
    health_json,
    preflight_json,
    preflight_sentence,
    render_health,
    render_preflight,
    write_json,
    write_text,
)
from glm_fleet.health.verdict import GatewayHealth, Limits, NodeHealth
from glm_terminal import plain, show, width

_FAILING = {
    "never": (),
    "broken": ("broken", "unknown"),
    "degraded": ("degraded", "broken", "unknown"),
}
_TEMPLATE = ROOT / "roles/health/templates/fleet.html.j2"


class ActionModule(ControllerAction):
    """Runs on the controller; touches no host."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Judge the records, print the table, write the JSON, and fail once if need be."""
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "kind": {"type": "str", "required": True, "choices": ["preflight", "health"]},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "record": {"type": "str", "required": True},
                "dest": {"type": "path"},
                "keep": {"type": "int", "default": 300},
                "limits": {"type": "dict", "default": {}},
                "memory": {
                    "type": "dict",
                    "options": {
                        "tensor_parallel": {"type": "int", "required": True},
                        "utilisation": {"type": "float", "required": True},
                        "context": {"type": "str", "default": ""},
                        "release": {"type": "str", "required": True},
                        "size": {"type": "dict", "default": {}},
                        "unknown": {"type": "str", "default": ""},
                    },
                },
                "textfile_dir": {"type": "str", "default": ""},
                "fail_on": {"type": "str", "default": "degraded", "choices": list(_FAILING)},
            }
        )
        hosts: list[str] = arguments["hosts"]
        alive = variables["ansible_play_hosts"]
        records = _records(hosts, alive, arguments["record"], variables["hostvars"])
        dest = Path(arguments["dest"]) if arguments["dest"] else None
        try:
            if arguments["kind"] == "preflight":
                lines, report, failure = _preflight(records, arguments["memory"])
                if dest and not self._task.check_mode:
                    write_json(dest, report)
            else:
                folder = dest.with_name("history") if dest else None
                kept, damaged = _kept(folder)
                limits = Limits.from_dict(arguments["limits"])
                failing = _FAILING[arguments["fail_on"]]
                lines, report, failure = _health(records, failing, limits, kept)
                lines += damaged
                if dest and folder and not self._task.check_mode:
                    write_json(dest, report)
                    write_text(dest.with_suffix(".html"), render_page(report, kept, _TEMPLATE))
                    history.save(folder, report, arguments["keep"])
                    text = exposition(report)
                    write_text(dest.with_suffix(".prom"), text, 0o644)
                    if arguments["textfile_dir"]:
                        write_text(Path(arguments["textfile_dir"], "glm_fleet.prom"), text, 0o644)
                    found = targets(variables["hostvars"], *_groups(records))
                    write_json(dest.with_name("targets.json"), found, 0o644)
        except FleetError as error:
            raise AnsibleActionFail(str(error)) from error
        except OSError as error:
            raise AnsibleActionFail(str(from_os_error(error))) from error
        show(lines)
        if failure:
            raise AnsibleActionFail(failure)
        return {"changed": False, "summary": report["summary"]}


def _preflight(
    records: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any] | None
) -> tuple[list[Line], dict[str, Any], str]:
    memory = judge_memory(records, told, without_model(records)) if told else Memory()
    problems = [*judge_hosts(records), *memory.problems]
    hosts = list(records)
    failed = any(each.severity == ERROR for each in problems)
    lines = render_preflight(hosts, problems, width())
    if memory.line:
        lines += wrap(f"The model takes {memory.line}.", width(), "")
    return (
        lines,
        {**preflight_json(hosts, problems, _now()), "memory": memory.figures},
        preflight_sentence(hosts, problems) if failed else "",
    )


def _health(
    records: Mapping[str, Mapping[str, Any]],
    failing: Sequence[str],
    limits: Limits,
    kept: Sequence[Mapping[str, Any]],
) -> tuple[list[Line], dict[str, Any], str]:
    previous, now = history.latest(kept), _now()
    nodes, gateways = judge_fleet(records, limits=limits, previous=previous, time=now)
    hosts: list[NodeHealth | GatewayHealth] = [*nodes, *gateways]
    bad = [each for each in hosts if each.verdict in failing]
    failure = (
        "Health: " + ", ".join(f"{each.name} is {each.verdict}" for each in bad) if bad else ""
    )
    report = health_json(nodes, gateways, now, previous)
    since = str(report["previous"] or "")
    lines = render_health(nodes, gateways, width(), report["changes"], since)
    return lines, report, failure


def _kept(folder: Path | None) -> tuple[list[dict[str, Any]], list[Line]]:
    """Return the reports of earlier checks, and lines about those that cannot be read."""
    damaged: list[str] = []
    kept = history.load(folder, RUNS_DRAWN, damaged) if folder else []
    text = (f"Left out of the history: {each}." for each in damaged)
    return kept, [line for each in text for line in wrap(each, width(), "bad")]


def _groups(records: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the GPU nodes and the gateways among the hosts."""
    nodes, gateways = (
        [host for host, record in records.items() if group in record["groups"]]
        for group in ("gpu_nodes", "gateways")
    )
    return nodes, gateways


def _records(
    hosts: Sequence[str], alive: Sequence[str], name: str, hostvars: Any
) -> dict[str, dict[str, Any]]:
    """Return what each host's variable ``name`` holds, as plain data.

    A host that was not read is in the report too: it is what somebody wants to know of. One that
    left the run has at most what an earlier phase read, which is not how it is now.
    """
    records = {}
    for host in hosts:
        record = (hostvars[host].get(name) or {}).get("record") if host in alive else None
        if record is None:
            record = {
                "message": LEFT,
                "groups": hostvars[host]["group_names"],
            }
        records[host] = plain(record)
    return records


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
