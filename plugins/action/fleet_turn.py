# SPDX-License-Identifier: Apache-2.0
"""Takes a node's turn: see library/fleet_turn.py, and fleet/turn.py for the order of its steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_delegate import DelegatingAction
from glm_fleet.core.decode import decode
from glm_fleet.core.errors import FleetError
from glm_fleet.fleet.endpoints import reached_at
from glm_fleet.fleet.outcome import outcome
from glm_fleet.fleet.turn import (
    AT_GATEWAYS,
    AT_LOCK,
    Order,
    Step,
    Turn,
    needs_acceptance,
    neighbours_of,
    next_step,
    read_answer,
    record,
)
from glm_fleet.node.deploying import AGAIN
from glm_fleet.serving.answers import Answers
from glm_fleet.serving.kept_answers import COMPARED
from glm_terminal import plain

_display = Display()
# What an operator sees when a step begins.
_WORDS: Mapping[str, str] = {
    "read ahead": "reads its next weights into memory",
    "drain": "drains",
    "hold": "is held",
    "empty": "finishes its last requests",
    "accept": "is accepted: its GPUs prove themselves",
    "rehearse": "rehearses deployment {step.deployment}, unless it is known to run here",
    "switch": "switches to deployment {step.deployment}",
    "attest": "is attested",
    "score before": "is asked what is known, for what it runs now",
    "score": "is asked what is known, for what it was switched to",
    "unhold": "is not held any more",
    "join": "joins",
    "keep out": "is kept out of service",
    "go back": "goes back to deployment {step.deployment}",
    "let back": "was not touched, and is let back",
}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "purpose": {
        "type": "str",
        "choices": ["switch", "leave", "return"],
        "default": "switch",
    },
    "gateways": {"type": "list", "elements": "str", "required": True},
    "wanted": {"type": "dict", "default": {}},
    "acceptance": {"type": "dict", "default": {}},
    "moved": {"type": "bool", "default": False},
    "held": {"type": "str", "default": ""},
    "rehearse": {"type": "bool", "default": False},
    "rehearsal": {"type": "dict", "default": {}},
    "quality": {"type": "dict", "default": {}},
    "read_ahead": {"type": "path", "default": ""},
    "read_rate": {"type": "int", "default": 1_000_000_000},
    "places": {"type": "dict", "default": {}},
    "neighbours": {"type": "list", "elements": "str", "default": []},
    "min_ready": {"type": "int", "default": 0},
    "drain_timeout": {"type": "int", "default": 600},
    "stall_timeout": {"type": "int", "default": 1800},
    "join_timeout": {"type": "int", "default": 60},
}


def _begin(settings: Mapping[str, Any]) -> Turn:
    """Return the turn that a task asks for, before its first step."""
    wanted = plain(settings["wanted"])
    accepted = plain(settings["acceptance"])
    # Boards that failed by the release's kernels alone may run another release now.
    wrong = accepted.get("did_not_pass") and not accepted.get("of_release")
    if wrong and settings["purpose"] == "return":
        raise FleetError(f"Its GPUs did not prove themselves: {accepted.get('message', '')}")
    serves = bool((wanted.get("running") or {}).get("active"))
    restart = bool(wanted.get("differences"))
    accept = needs_acceptance(accepted, stays=serves and not restart)
    return Turn(
        Order(
            settings["purpose"],
            ladder=wanted.get("ladder") or [],
            back=wanted.get("back") or "",
            read_ahead=bool(settings["read_ahead"] and restart and serves),
            accept=accept,
            rehearse=settings["rehearse"],
            restart=restart or (accept and serves),
            score=bool(settings["quality"] and restart),
            score_before=bool(settings["quality"] and restart and serves),
            moved=settings["moved"],
            held=settings["held"],
        )
    )


class ActionModule(DelegatingAction):
    """Does one step after the other, on the node and at the gateways."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return ``outcome``. Only a turn that switches does not fail: the roll judges it."""
        _, settings = self.validate_argument_spec(argument_spec=_ARGUMENTS)
        turn = _begin(settings)
        controller = os.getppid()
        changed, diffs = False, []
        while (step := next_step(turn)) is not None:
            if os.getppid() != controller:
                # Another run takes the lock of one that is gone, and goes on from here.
                raise AnsibleError("The controller of this turn is gone: its next step is not done")
            found = self._do(step, turn, settings, variables)
            changed = changed or any(each.get("changed") for each in found.values())
            diffs += [each["diff"] for each in found.values() if each.get("diff")]
            if step.action == "attest":
                _show(variables["inventory_hostname"], found)
            answers = [read_answer(host, plain(each)) for host, each in found.items()]
            turn = record(turn, step, answers)
        ended = outcome(turn)
        result: dict[str, Any] = {"changed": changed, "outcome": asdict(ended)}
        if diffs:
            result["diff"] = diffs
        if settings["purpose"] != "switch" and not ended.good:
            result.update(failed=True, msg=ended.why)
        return result

    def _do(
        self, step: Step, turn: Turn, settings: Mapping[str, Any], variables: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Do a step and return the result of each host that takes part in it."""
        node = variables["inventory_hostname"]
        _display.display(f"  {node}: {_WORDS[step.action].format(step=step)}")
        hosts = [node]
        if step.action in AT_GATEWAYS:
            hosts = settings["gateways"]
        elif step.action in AT_LOCK:
            hosts = settings["gateways"][:1]
        accepted = plain(settings["acceptance"])
        if step.action == "accept" and accepted.get("ran"):
            # It was tried before the roll, while nothing ran there, and did not pass.
            refused = {"failed": True, "msg": accepted["message"]}
            return {node: {**refused, "of_release": accepted["of_release"]}}
        module, arguments = _call(step, turn, node, settings)
        port = turn.runs.get("port", "0")
        if step.action == "join" and port != "0":
            # Where the server that was just attested listens.
            arguments["endpoint"] = reached_at(variables["hostvars"], node, port)
        if step.action == "attest" and (turn.order.restart or turn.order.purpose == "return"):
            arguments["neighbours"] = self._neighbours(node, settings, variables)
        return {host: self.ask(host, module, arguments, variables) for host in hosts}

    def _neighbours(
        self, node: str, settings: Mapping[str, Any], variables: dict[str, Any]
    ) -> dict[str, Answers]:
        """Return the known answers of other nodes. One that cannot be asked is left out."""
        found: dict[str, Answers] = {}
        others = [] if self._task.check_mode else settings["neighbours"]
        for other in neighbours_of(node, others):
            answer = self.ask(other, "vllm_probe", {"mode": "answers"}, variables)
            if not answer.get("answers"):
                continue
            try:
                what = f"What {other} keeps of its answers"
                found[other] = decode(Answers, plain(answer["answers"]), what=what)
            except FleetError as error:
                _display.warning(str(error))
        return found


def _show(node: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Show how far known answers are from others: what their tolerances are chosen by."""
    for result in found.values():
        attestation = result.get("attestation")
        checks = attestation.get("checks") if isinstance(attestation, Mapping) else None
        for each in checks if isinstance(checks, list) else ():
            if isinstance(each, Mapping) and each.get("name") in COMPARED:
                _display.display(f"  {node}: {each['name']}: {plain(each.get('detail'))}")


def _call(
    step: Step, turn: Turn, node: str, settings: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the module of a step, and its arguments."""
    if step.action in AT_GATEWAYS:
        return "haproxy_server", {"server": node, **_gateway(step, turn, settings)}
    if step.action in AT_LOCK:
        held = {"state": "held", "node": node, "reason": turn.order.held}
        return "fleet_lock", held if step.action == "hold" else {"state": "unheld", "node": node}
    if step.action == "read ahead":
        return "model_pages", {"path": settings["read_ahead"], "rate": settings["read_rate"]}
    if step.action == "accept":
        asked = plain(settings["acceptance"])["asked"]
        return "acceptance", {**asked, "stop": True, "strict": True, "look": False}
    if step.action == "rehearse":
        options = {"rungs": list(turn.order.ladder), "drained": True}
        return "rehearsal", {**options, **plain(settings["rehearsal"]), **plain(settings["places"])}
    if step.action in ("score before", "score"):
        record = (plain(settings["wanted"]).get("running") or {}).get("record") or {}
        before = {key: record[key] for key in ("release", "model") if key in record}
        state = "recorded" if step.action == "score before" else "judged"
        return "vllm_quality", {**plain(settings["quality"]), "state": state, "before": before}
    made = [*turn.attempts("switch"), *turn.attempts("go back")]
    if step.action == "attest":
        ids = {kind: turn.runs.get(kind, "") for kind in ("release", "model")}
        # Nobody is disturbed on a node that comes back, and its hardware may be another.
        again = {"again": True} if turn.order.purpose == "return" else {}
        options = {"mode": "attest", "stall_timeout": settings["stall_timeout"], **again}
        return "vllm_probe", {**options, **ids}
    arguments = {
        "state": "active",
        "id": step.deployment,
        "rungs": [*turn.order.ladder, *([turn.order.back] if turn.order.back else [])],
        **plain(settings["places"]),
    }
    if step.action == "switch" and AGAIN in (plain(settings["wanted"]).get("differences") or []):
        arguments["again"] = True
    if step.action == "switch" and made:
        arguments.update(refuse=made[-1].deployment, reason=made[-1].last.diagnosis)
    if step.action == "go back" and turn.answers("score"):
        # It was attested before it was asked.
        arguments["disproved"] = made[-1].deployment
    return "deployment", arguments


def _gateway(step: Step, turn: Turn, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a gateway is asked for in a step."""
    waits = {"state": "drain", "timeout": settings["drain_timeout"]}
    if step.action == "drain":
        # Who leaves for long is held before anybody waits, so that no other run lets it back.
        leaves = turn.order.purpose == "leave"
        least = {"min_ready": settings["min_ready"]}
        return {**waits, **least, "wait": not leaves, "fail_when_busy": False}
    if step.action == "empty":
        return waits
    if step.action == "keep out":
        lost = turn.attempts("switch")[-1].last.lost
        return {**waits, "wait": not lost, "fail_when_busy": False}
    if step.action == "join":
        return {"state": "ready", "timeout": settings["join_timeout"]}
    return {"state": "ready", "wait": False}
