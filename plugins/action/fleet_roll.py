# SPDX-License-Identifier: Apache-2.0
"""Plans a roll and reports its end: see library/fleet_roll.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ControllerAction
from glm_fleet.core.format import parse_count
from glm_fleet.core.table import Line
from glm_fleet.fleet.endpoints import REACHED_BY
from glm_fleet.fleet.rollout import first_to_try
from glm_fleet.fleet.rollout_facts import NodeAnswers, endings, found_or_staged, plan_fleet
from glm_fleet.fleet.rollout_table import end_sentence, render_end, render_plan
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
                "slots": {"type": "str", "default": ""},
                "full": {"type": "float", "default": 0.7},
                "remark": {"type": "str", "default": ""},
                "rehearse": {"type": "bool", "default": False},
            }
        )
        hostvars = variables["hostvars"]
        nodes = [_answers(name, hostvars[name]) for name in arguments["nodes"]]
        found = _plan(nodes, arguments) if arguments["state"] == "planned" else _end(nodes)
        show(found.pop("lines"))
        return {"changed": False, **found}


def _answers(name: str, variables: Mapping[str, Any]) -> NodeAnswers:
    return NodeAnswers(
        name,
        found_or_staged(
            plain(variables.get("__serving_info") or {}),
            plain(variables.get("__serving_staged") or {}),
        ),
        {each: plain(variables.get(each)) for each in REACHED_BY},
        plain(variables.get("__serving_turn") or {}).get("outcome") or {},
    )


def _plan(nodes: Sequence[NodeAnswers], arguments: Mapping[str, Any]) -> dict[str, Any]:
    found = plan_fleet(
        nodes,
        plain([each.get("gateway") or {} for each in arguments["gateways"]]),
        held=arguments["held"],
        batch=arguments["batch"],
        min_ready=arguments["min_ready"],
        canary=arguments["canary"],
        slots=parse_count(arguments["slots"]) or 0,
        full=arguments["full"],
    )
    first = first_to_try(found.nodes, found.plan)
    lines = render_plan(found.nodes, found.plan, width(), arguments["remark"])
    if first and arguments["rehearse"]:
        words = "rehearses it with random weights once drained, unless it passed there before"
        lines.append(Line(f"{first} {words}."))
    return {
        "lines": lines,
        "turns": [each.node for each in found.plan.turns],
        "first": first,
        "batches": list(found.plan.batches),
        "moved": found.moved,
        "targets": found.targets,
        "backs": found.backs,
    }


def _end(nodes: Sequence[NodeAnswers]) -> dict[str, Any]:
    ended = endings(nodes)
    good = all(each.good for each in ended)
    return {
        "lines": render_end(ended, width()),
        "good": good,
        "sentence": "" if good else end_sentence(ended),
    }
