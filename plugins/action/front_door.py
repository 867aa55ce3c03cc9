# SPDX-License-Identifier: Apache-2.0
"""Decides how a gateway serves clients, and issues its certificate: see library/front_door.py."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import FleetAction
from glm_fleet.core.decode import decode
from glm_fleet.fleet import authority
from glm_fleet.fleet.front_door import Wanted, decide
from glm_fleet.gateway.answer import FrontDoor

_display = Display()


class ActionModule(FleetAction):
    """The authority's key stays in this process; a gateway's goes from it to the gateway."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the decision, or what writing the new certificate gave."""
        _, given = self.validate_argument_spec(
            argument_spec={
                "action": {"type": "str", "choices": ["decide", "issue"], "default": "decide"},
                "tls": {"type": "str", "choices": ["auto", "always", "never"], "default": "auto"},
                "certificate": {"type": "str", "default": ""},
                "own": {"type": "str", "required": True},
                "names": {"type": "list", "elements": "str", "required": True},
                "told": {"type": "list", "elements": "str", "default": []},
                "authority": {"type": "path", "required": True},
                "authority_change": {"type": "bool", "default": False},
                "doors": {"type": "dict", "default": {}},
            }
        )
        now = datetime.now(timezone.utc)
        folder = Path(given["authority"])
        if given["action"] == "issue":
            return self._issue(given, folder, now, variables)
        wanted = Wanted(
            tls=given["tls"],
            given=given["certificate"],
            own=given["own"],
            names=_names(given),
            told=given["told"],
        )
        decision = decide(
            wanted,
            variables["inventory_hostname"],
            decode(dict[str, FrontDoor], given["doors"], what="What the gateways told"),
            authority.load(folder),
            now,
            change=given["authority_change"],
        )
        if decision.warning:
            _display.warning(decision.warning)
        return {"changed": False, "file": decision.file, "issue": decision.issue}

    def _issue(
        self, given: dict[str, Any], folder: Path, now: datetime, variables: dict[str, Any]
    ) -> dict[str, Any]:
        if self._task.check_mode:
            return {"changed": True}
        signer = authority.ensure(folder, now)
        names = list(dict.fromkeys([*_names(given), *given["told"]]))
        content = authority.issue(signer, names, now)
        return self.module(
            "certificate_file", {"path": given["own"], "content": content}, variables
        )


def _names(given: dict[str, Any]) -> list[str]:
    """Return those of a gateway's names that clients can know it by: hosts are named freely."""
    return [name for name in given["names"] if authority.is_name(name)]
