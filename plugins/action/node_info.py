# SPDX-License-Identifier: Apache-2.0
"""Keeps what a host answered beside what is expected of it, also when it gave no answer."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Runs the module of its name. A host without an answer is a row of a report, no failure."""

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the module's result as ``record``: {answered, message, groups, node, expect}."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        arguments = dict(self._task.args)
        expect = arguments.pop("expect", None) or []
        try:
            answer: dict[str, Any] = self._execute_module(
                module_name="node_info", module_args=arguments, task_vars=task_vars
            )
        except AnsibleConnectionFailure as error:
            answer = {"msg": str(error)}
        return {
            "changed": False,
            "record": {
                "answered": time.time(),
                "message": "" if "node" in answer else str(answer.get("msg") or "no answer"),
                "groups": list(variables.get("group_names", [])),
                "node": answer.get("node", {}),
                "expect": [each for each in expect if each["asked"]],
            },
        }
