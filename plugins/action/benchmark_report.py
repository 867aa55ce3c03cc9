# SPDX-License-Identifier: Apache-2.0
"""Prints and keeps what a benchmark found: see library/benchmark_report.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ROOT, ControllerAction
from glm_fleet.bench.page import is_before, render_page
from glm_fleet.bench.report import (
    GATEWAY,
    NODE,
    Bounds,
    benchmark_json,
    judge_target,
    read_report,
    render_benchmark,
)
from glm_fleet.core.errors import FleetError
from glm_fleet.health.tables import write_json, write_text
from glm_terminal import plain, show, width

_TEMPLATE = ROOT / "roles/benchmark/templates/benchmark.html.j2"


class ActionModule(ControllerAction):
    """Runs on the controller; touches no host."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Print the table, write the JSON, and fail if a target was not measured."""
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
                "bounds": {"type": "dict", "default": {}},
                "dest": {"type": "path", "required": True},
            }
        )
        if self._task.check_mode:
            return {"skipped": True, "msg": "check mode measures nothing"}
        hostvars = variables["hostvars"]
        reference = {each["streams"]: each["tokens_per_second"] for each in arguments["reference"]}
        bounds = Bounds(**plain(arguments["bounds"]))
        targets = [
            judge_target(
                host,
                path,
                plain(hostvars[host].get(arguments[f"{path}_record"]) or {}),
                reference,
                arguments["min_ratio"],
                bounds,
            )
            for path, hosts in ((NODE, arguments["nodes"]), (GATEWAY, arguments["gateways"]))
            for host in hosts
        ]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report = benchmark_json(targets, plain(arguments["settings"]), now)
        self._write(Path(arguments["dest"]), report)
        show(render_benchmark(targets, width(160)))
        unmeasured = [each["name"] for each in targets if each["error"]]
        if unmeasured:
            raise AnsibleActionFail(f"Not measured: {', '.join(unmeasured)}. See above for why.")
        return {"changed": False, "summary": report["summary"]}

    def _write(self, dest: Path, report: dict[str, Any]) -> None:
        """Write the report and its page, and keep the last one of another release."""
        kept = dest.with_name(f"{dest.stem}-before.json")
        before: Mapping[str, Any] = {}
        for path in (kept, dest):
            try:
                known = read_report(path)
            except FleetError:
                # A damaged report is no reason to lose this one.
                continue
            if known and is_before(known, report):
                before = known
        if before:
            write_json(kept, before, 0o644)
        write_json(dest, report, 0o644)
        write_text(dest.with_suffix(".html"), render_page(report, before, _TEMPLATE), 0o644)
