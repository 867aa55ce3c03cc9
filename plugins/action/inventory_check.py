# SPDX-License-Identifier: Apache-2.0
"""Checks the inventory on the controller: see library/inventory_check.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ROOT, ControllerAction
from glm_fleet.fleet.inventory import CONTROLLER, Inventory, check_inventory, left_out

_HERE = {"connection": "local", "interpreter": sys.executable}


class ActionModule(ControllerAction):
    """Runs on the controller; touches no host."""

    _VALID_ARGS: frozenset[str] = frozenset()

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the list of problems, and fail if there is one."""
        groups, hostvars = variables["groups"], variables["hostvars"]
        # The raw variables: reading names must not run every host's templates.
        raw = {host: hostvars.raw_get(host) for host in groups["all"]}
        views = {host: hostvars[host] for host in groups["all"]}
        defaults, specs = self._role_variables()
        inventory = Inventory(
            groups=groups,
            names={host: list(values) for host, values in raw.items()},
            value=lambda host, name: views[host].get(name),
            known={**dict.fromkeys(specs), **defaults},
            literals={
                host: {
                    name: value
                    for name, value in values.items()
                    if name in specs and self._is_literal(value)
                }
                for host, values in raw.items()
            },
            complaint=lambda name, value: _complaint(name, value, specs[name]),
        )
        check_inventory(inventory)
        return {
            "changed": False,
            "problems": [],
            "left_out": [
                {"group": group, "host": host, **(_HERE if host == CONTROLLER else {})}
                for group, host in left_out(groups).items()
            ],
        }

    def _role_variables(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the defaults of all roles, and the specification of each documented variable."""
        defaults: dict[str, Any] = {}
        specs: dict[str, Any] = {}
        for role in sorted((ROOT / "roles").iterdir()):
            entry_points = self._load(role / "meta" / "argument_specs.yml")
            for spec in entry_points.get("argument_specs", {}).values():
                specs.update(spec.get("options", {}))
            defaults.update(self._load(role / "defaults" / "main.yml"))
        return defaults, specs

    def _load(self, path: Path) -> dict[str, Any]:
        return (self._loader.load_from_file(str(path)) or {}) if path.exists() else {}

    def _is_literal(self, value: Any) -> bool:
        """Tell whether a value is there already: no template, and nothing encrypted."""
        if isinstance(value, dict):
            return all(self._is_literal(each) for each in value.values())
        if isinstance(value, list):
            return all(self._is_literal(each) for each in value)
        if isinstance(value, str):
            return not self._templar.is_template(value)
        return isinstance(value, (bool, int, float)) or value is None


def _complaint(name: str, value: Any, spec: dict[str, Any]) -> str:
    found = ArgumentSpecValidator({name: spec}).validate({name: value})
    return "; ".join(found.error_messages)
