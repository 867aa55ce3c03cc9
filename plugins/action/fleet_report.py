# SPDX-License-Identifier: Apache-2.0
"""Judges and prints what was gathered from all hosts: see library/fleet_report.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.color import ANSIBLE_COLOR
from ansible.utils.display import Display

# Ansible puts module_utils on the path of modules only, not of plugins.
sys.path.append(str(Path(__file__).resolve().parents[2] / "module_utils"))

from glm_fleet.errors import FleetError
from glm_fleet.health import (
    GatewayHealth,
    NodeHealth,
    judge_gateway,
    judge_node,
    states_of,
    unknown_node,
)
from glm_fleet.preflight import ERROR, Expectations, Problem, evaluate, unreachable
from glm_fleet.report import (
    Line,
    health_json,
    preflight_json,
    preflight_sentence,
    render_health,
    render_preflight,
    write_json,
)

_COLORS = {"good": "green", "warning": "yellow", "bad": "red", "": None}
_FAILING = {
    "never": (),
    "broken": ("broken", "unknown"),
    "degraded": ("degraded", "broken", "unknown"),
}
_UNTOLD_WIDTH = 120


class ActionModule(ActionBase):
    """Runs on the controller; touches no host."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Judge the records, print the table, write the JSON, and fail once if need be."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "kind": {"type": "str", "required": True, "choices": ["preflight", "health"]},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "record": {"type": "str", "required": True},
                "dest": {"type": "path"},
                "fail_on": {"type": "str", "default": "broken", "choices": list(_FAILING)},
            }
        )
        hosts: list[str] = arguments["hosts"]
        records = _records(hosts, arguments["record"], (task_vars or {})["hostvars"])
        judge = _preflight if arguments["kind"] == "preflight" else _health
        try:
            lines, report, failure = judge(records, _FAILING[arguments["fail_on"]])
            if arguments["dest"] and not self._task.check_mode:
                write_json(Path(arguments["dest"]), report)
        except FleetError as error:
            raise AnsibleActionFail(str(error)) from error
        display = Display()
        display.display("")
        for line in lines:
            display.display(line.text, color=_COLORS[line.tone])
        if failure:
            raise AnsibleActionFail(failure)
        return {**result, "changed": False, "summary": report["summary"]}


def _preflight(
    records: Mapping[str, Mapping[str, Any]], failing: Sequence[str]
) -> tuple[list[Line], dict[str, Any], str]:
    problems: list[Problem] = []
    for host, record in records.items():
        if record["message"]:
            problems.append(unreachable(host, record["message"]))
            continue
        for part in record["expect"]:
            expect = Expectations.from_dict(part["expect"])
            found = evaluate(host, record["node"], expect, gpu_node=part["gpu_node"])
            problems += [each for each in found if each not in problems]
    hosts = list(records)
    failed = any(each.severity == ERROR for each in problems)
    return (
        render_preflight(hosts, problems, _width()),
        preflight_json(hosts, problems, _now()),
        preflight_sentence(hosts, problems) if failed else "",
    )


def _health(
    records: Mapping[str, Mapping[str, Any]], failing: Sequence[str]
) -> tuple[list[Line], dict[str, Any], str]:
    answers = {
        host: record.get("gateway") or {}
        for host, record in records.items()
        if "gateways" in record["groups"]
    }
    gateways = [
        judge_gateway(host, message=_message(records[host]), gateway=answer)
        for host, answer in answers.items()
    ]
    nodes = [
        _node(host, record, states_of(host, answers))
        for host, record in records.items()
        if "gpu_nodes" in record["groups"]
    ]
    bad: list[NodeHealth | GatewayHealth] = [
        each for each in (*nodes, *gateways) if each.verdict in failing
    ]
    failure = (
        "Health: " + ", ".join(f"{each.name} is {each.verdict}" for each in bad) if bad else ""
    )
    return render_health(nodes, gateways, _width()), health_json(nodes, gateways, _now()), failure


def _message(record: Mapping[str, Any]) -> str:
    return str(record["message"] or record.get("gateway_error") or "")


def _node(host: str, record: Mapping[str, Any], gateway: Mapping[str, str]) -> NodeHealth:
    if record["message"]:
        return unknown_node(host, record["message"], gateway)
    expect = next(part["expect"] for part in record["expect"] if part["gpu_node"])
    return judge_node(
        host,
        facts=record["node"],
        probe=record["attestation"],
        probe_error=record["attestation_error"],
        expect=Expectations.from_dict(expect),
        gateway=gateway,
        artifacts=record.get("artifacts") or (),
        artifacts_error=record.get("artifacts_error") or "",
    )


def _records(hosts: Sequence[str], name: str, hostvars: Any) -> dict[str, dict[str, Any]]:
    """Return what each host's variable ``name`` holds, as plain data."""
    records = {}
    for host in hosts:
        record = hostvars[host].get(name)
        if record is None:
            record = {
                "message": "it failed earlier in this run",
                "groups": hostvars[host]["group_names"],
            }
        records[host] = _plain(record)
    return records


def _plain(value: Any) -> Any:
    """Copy Ansible's lazy containers, which resolve their values only when iterated."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, str) else value


def _width() -> int:
    """Return the columns to use: a worker has no terminal, but inherits what was measured."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit():
        return int(told)
    return int(Display().columns) if ANSIBLE_COLOR else _UNTOLD_WIDTH


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
