# SPDX-License-Identifier: Apache-2.0
"""Plans a roll and reports its end: see library/fleet_roll.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ControllerAction
from glm_fleet.core.net import join_endpoint
from glm_fleet.core.table import Line
from glm_fleet.fleet.endpoints import reached_at
from glm_fleet.fleet.outcome import UNTOUCHED
from glm_fleet.fleet.rollout import NodeState, plan_roll
from glm_fleet.fleet.rollout_table import Ending, end_sentence, render_end, render_plan
from glm_terminal import plain, show, width


class ActionModule(ControllerAction):
    """Runs on the controller; touches no host."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Print the plan or the end of a roll, and return it."""
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "state": {"type": "str", "required": True, "choices": ["planned", "ended"]},
                "nodes": {"type": "list", "elements": "str", "required": True},
                "gateways": {"type": "list", "elements": "dict", "default": []},
                "held": {"type": "dict", "default": {}},
                "batch": {"type": "str", "default": "1"},
                "min_ready": {"type": "str", "default": "1"},
                "canary": {"type": "str", "default": ""},
                "remark": {"type": "str", "default": ""},
            }
        )
        hostvars = variables["hostvars"]
        planned = arguments["state"] == "planned"
        found = _plan(arguments, hostvars) if planned else _end(arguments["nodes"], hostvars)
        show(found.pop("lines"))
        return {"changed": False, **found}


def _plan(arguments: Mapping[str, Any], hostvars: Any) -> dict[str, Any]:
    states: list[dict[str, str]] = [
        {each["name"]: each["admin_state"] for each in answer.get("servers") or []}
        for answer in plain([each.get("gateway") or {} for each in arguments["gateways"]])
    ]
    up = [
        {each["name"] for each in answer.get("servers") or [] if each["status"] == "UP"}
        for answer in plain([each.get("gateway") or {} for each in arguments["gateways"]])
    ]

    serving = set.intersection(*up) if up else set()

    # A node that is joined but down takes no requests: it is mended first, and never counts
    # as one that could not be spared.
    def ready(name: str) -> bool:
        return name in serving and all(state.get(name) == "ready" for state in states)

    at = [
        {
            each["name"]: join_endpoint(str(each["address"]), int(each["port"]))
            for each in answer.get("servers") or []
            if each.get("port")
        }
        for answer in plain([each.get("gateway") or {} for each in arguments["gateways"]])
    ]
    nodes = []
    moved: dict[str, str] = {}
    targets = {}
    backs = {}
    for name in arguments["nodes"]:
        info = _info(hostvars[name])
        wanted = info.get("wanted") or {}
        if wanted:
            moved[name] = _moved(hostvars, name, wanted, at)
            targets[name] = wanted["id"]
            backs[name] = info.get("back") or ""
        nodes.append(
            NodeState(
                name,
                (info.get("differences") or []) if wanted else ["first start"],
                ready(name),
                wanted,
                info.get("current") or {},
                str((arguments["held"].get(name) or {}).get("reason", "")),
                [
                    f"CUDA graphs {each['cuda_graphs']} are known to fail here: {each['reason']}"
                    for each in info.get("skipped_rungs") or []
                ],
                moved.get(name, ""),
                tuple(float(each) for each in info.get("starts") or ()),
            )
        )
    plan = plan_roll(
        nodes,
        batch=arguments["batch"],
        min_ready=arguments["min_ready"],
        canary=arguments["canary"],
        ready=sum(ready(name) for name in serving),
    )
    lines = render_plan(nodes, plan, width())
    if arguments["remark"]:
        lines.append(Line(arguments["remark"], "warning"))
    return {
        "lines": lines,
        "turns": [each.node for each in plan.turns],
        "batches": list(plan.batches),
        "moved": sorted(name for name, words in moved.items() if words),
        "targets": targets,
        "backs": backs,
    }


def _moved(
    hostvars: Any, name: str, wanted: Mapping[str, Any], at: Sequence[Mapping[str, str]]
) -> str:
    """Say how the endpoint of a node changes at the gateways; '' when it does not.

    A gateway that does not know the node yet gets it with its configuration.
    """
    if not wanted.get("port"):
        return ""
    new = reached_at(hostvars, name, wanted["port"])
    old = sorted({each[name] for each in at if name in each and each[name] != new})
    return f"{' and '.join(old)} -> {new}" if old else ""


def _info(variables: Any) -> dict[str, Any]:
    """Return what the stage found on a node; what check mode did not stage is not on it."""
    info = plain(variables.get("__serving_info") or {})
    staged = plain(variables.get("__serving_staged") or {}).get("results")
    return dict(info if info.get("wanted") or not staged else staged[0])


def _end(names: list[str], hostvars: Any) -> dict[str, Any]:
    endings = []
    for name in names:
        ended = plain(hostvars[name].get("__serving_turn") or {}).get("outcome")
        if not ended:
            record = (_info(hostvars[name]).get("running") or {}).get("record") or {}
            same = not _info(hostvars[name]).get("differences")
            why = "runs what it should" if same else "its turn did not come"
            endings.append(Ending(name, UNTOUCHED, True, record, why))
            continue
        endings.append(
            Ending(name, ended["state"], ended["good"], ended["runs"], ended["why"],
                   ended["journal"], ended["start"], ended["pages"])
        )  # fmt: skip
    good = all(each.good for each in endings)
    return {
        "lines": render_end(endings, width()),
        "good": good,
        "sentence": "" if good else end_sentence(endings),
    }
