# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmark level by level and shows each one's figures: see library/vllm_bench.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import FleetAction

_display = Display()


class ActionModule(FleetAction):
    """One call of the module for each level."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result, the levels of all calls together."""
        host = variables.get("inventory_hostname", "")
        levels: list[dict[str, Any]] = []
        result: dict[str, Any] = {"changed": False}
        steps: list[dict[str, Any]] = [
            {"streams": [streams], "clients": 0, "prompts": [], "weights": ""}
            for streams in self._task.args.get("streams", [1, 2, 4, 8, 16, 32])
        ]
        asked = self._task.args
        if int(asked.get("clients") or 0) or asked.get("prompts") or asked.get("weights"):
            steps.append({"streams": []})
        for step in steps:
            result = self._execute_module(
                module_name="vllm_bench",
                module_args={**self._task.args, **step},
                task_vars=variables,
            )
            if result.get("failed") or result.get("skipped"):
                # Kept apart: the role goes on and `failed` is lost.
                return {**result, "levels": levels, "problem": result.get("msg", "")}
            if not step["streams"]:
                break
            level = result["levels"][0]
            levels.append(level)
            _display.display(
                f"  {host}: {level['streams']} at once: {level['decode_per_stream']:.1f} tok/s "
                f"each, {level['decode_together']:.1f} together"
            )
        return {**result, "levels": levels}
