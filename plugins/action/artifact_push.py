# SPDX-License-Identifier: Apache-2.0
"""Push an artifact from the controller to a host, over the connection Ansible has already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

_display = Display()
_PROGRESS_EVERY_S = 10.0


class ActionModule(ActionBase):
    """Stage what the host lacks, verify it there and publish it."""

    TRANSFERS_FILES = True
    _VALID_ARGS = frozenset({"source", "root", "manifest"})

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the result of ``artifact: state=published`` on the host."""
        super().run(tmp, task_vars)
        arguments = self._task.args
        manifest = arguments["manifest"]
        common = {"root": arguments["root"], "kind": manifest["kind"], "manifest": manifest}
        staged = self._module({"state": "staged", **common}, task_vars)
        if staged.get("failed") or staged["published"]:
            return {**staged, "changed": False}
        if not self._task.check_mode:
            self._put(Path(arguments["source"]), staged)
        return self._module({"state": "published", **common}, task_vars)

    def _module(self, args: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        result: dict[str, Any] = self._execute_module(
            module_name="artifact", module_args=args, task_vars=task_vars
        )
        return result

    def _put(self, source: Path, staged: dict[str, Any]) -> None:
        total, done, said = int(staged["missing_bytes"]), 0, time.monotonic()
        for entry in staged["missing"]:
            path = source / entry["path"]
            if not path.is_file():
                raise AnsibleActionFail(
                    f"The artifact on the controller is not complete. Expected: {path}. "
                    "Found: no such file. What to do: run playbooks/release.yml again."
                )
            self._connection.put_file(str(path), f"{staged['staging']}/{entry['path']}")
            done += int(entry["size"])
            if time.monotonic() - said >= _PROGRESS_EVERY_S:
                said = time.monotonic()
                _display.display(
                    f"  {self._task.get_name()}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
                )
