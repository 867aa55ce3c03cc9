# SPDX-License-Identifier: Apache-2.0
"""Prints and keeps what a benchmark found: see library/benchmark_report.py."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# Ansible puts module_utils on the path of modules only, not of plugins.
_ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(_ROOT / "module_utils"), str(_ROOT / "plugins/plugin_utils")]

from glm_fleet.bench.report import GATEWAY, NODE, benchmark_json, judge_target, render_benchmark
from glm_fleet.health.tables import write_json
from glm_terminal import plain, show, width


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
                plain(hostvars[host].get(arguments[f"{path}_record"]) or {}),
                reference,
                arguments["min_ratio"],
            )
            for path, hosts in ((NODE, arguments["nodes"]), (GATEWAY, arguments["gateways"]))
            for host in hosts
        ]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report = benchmark_json(targets, plain(arguments["settings"]), now)
        write_json(Path(arguments["dest"]), report)
        show(render_benchmark(targets, width(160)))
        unmeasured = [each["name"] for each in targets if each["error"]]
        if unmeasured:
            raise AnsibleActionFail(f"Not measured: {', '.join(unmeasured)}. See above for why.")
        return {**result, "changed": False, "summary": report["summary"]}
