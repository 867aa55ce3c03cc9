# SPDX-License-Identifier: Apache-2.0
"""Prints and keeps what a benchmark found: see library/benchmark_report.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

# Ansible puts module_utils on the path of modules only, not of plugins.
sys.path.append(str(Path(__file__).resolve().parents[2] / "module_utils"))

from glm_fleet.bench_report import (
    GATEWAY,
    NODE,
    benchmark_json,
    judge_target,
    render_benchmark,
)
from glm_fleet.report import write_json

_COLORS = {"good": "green", "warning": "yellow", "bad": "red", "": None}


class ActionModule(ActionBase):
    """Runs on the controller; touches no host."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Print the table, write the JSON, and fail if a target was not measured."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "nodes": {"type": "list", "elements": "str", "required": True},
                "gateways": {"type": "list", "elements": "str", "required": True},
                "node_record": {"type": "str", "required": True},
                "gateway_record": {"type": "str", "required": True},
                "reference": {
                    "type": "list",
                    "elements": "dict",
                    "required": True,
                    "options": {
                        "streams": {"type": "int", "required": True},
                        "tokens_per_second": {"type": "float", "required": True},
                    },
                },
                "min_ratio": {"type": "float", "required": True},
                "settings": {"type": "dict", "default": {}},
                "dest": {"type": "path", "required": True},
            }
        )
        if self._task.check_mode:
            return {**result, "skipped": True, "msg": "check mode measures nothing"}
        hostvars = (task_vars or {})["hostvars"]
        reference = {each["streams"]: each["tokens_per_second"] for each in arguments["reference"]}
        targets = [
            judge_target(
                host,
                path,
                _plain(hostvars[host].get(arguments[f"{path}_record"]) or {}),
                reference,
                arguments["min_ratio"],
            )
            for path, hosts in ((NODE, arguments["nodes"]), (GATEWAY, arguments["gateways"]))
            for host in hosts
        ]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report = benchmark_json(targets, _plain(arguments["settings"]), now)
        write_json(Path(arguments["dest"]), report)
        display = Display()
        width = os.environ.get("COLUMNS", "")
        display.display("")
        for line in render_benchmark(targets, int(width) if width.isdigit() else 160):
            display.display(line.text, color=_COLORS[line.tone])
        unmeasured = [each["name"] for each in targets if each["error"]]
        if unmeasured:
            raise AnsibleActionFail(f"Not measured: {', '.join(unmeasured)}. See above for why.")
        return {**result, "changed": False, "summary": report["summary"]}


def _plain(value: Any) -> Any:
    """Copy Ansible's lazy containers, which resolve their values only when iterated."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, str) else value
