# SPDX-License-Identifier: Apache-2.0
"""Checks the inventory on the controller: see library/inventory_check.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

ROOT = Path(__file__).resolve().parents[2]

# Ansible puts module_utils on the path of modules only, not of plugins.
sys.path.append(str(ROOT / "module_utils"))

from glm_fleet.errors import FleetError
from glm_fleet.inventory import Inventory, check_inventory


class ActionModule(ActionBase):
    """Runs on the controller; touches no host."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _VALID_ARGS = frozenset()

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the list of problems, and fail if there is one."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        hostvars = variables["hostvars"]
        inventory = Inventory(
            groups=variables["groups"],
            # The raw variables: reading names must not run every host's templates.
            names={host: list(hostvars.raw_get(host)) for host in variables["groups"]["all"]},
            value=lambda host, name: hostvars[host].get(name),
            known=self._role_variables(),
        )
        try:
            check_inventory(inventory)
        except FleetError as error:
            return {**result, "failed": True, **error.as_fail()}
        return {**result, "changed": False, "problems": []}

    def _role_variables(self) -> dict[str, Any]:
        """Return every variable that a role documents, with its default if it has one."""
        known: dict[str, Any] = {}
        for role in sorted((ROOT / "roles").iterdir()):
            specs = self._load(role / "meta" / "argument_specs.yml").get("argument_specs", {})
            for entry_point in specs.values():
                known.update(dict.fromkeys(entry_point.get("options", {})))
        for role in (ROOT / "roles").iterdir():
            known.update(self._load(role / "defaults" / "main.yml"))
        return known

    def _load(self, path: Path) -> dict[str, Any]:
        return (self._loader.load_from_file(str(path)) or {}) if path.exists() else {}
