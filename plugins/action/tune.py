# SPDX-License-Identifier: Apache-2.0
"""Tries settings on a node, one start each: see library/tune.py, and bench/tuning.py for which."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_delegate import DelegatingAction
from glm_fleet.bench import tuned
from glm_fleet.bench.tuning import (
    Budget,
    Setting,
    Step,
    Try,
    check_settings,
    most_left,
    next_step,
    typical,
    verdict,
    wants_more,
)
from glm_fleet.core.errors import FleetError
from glm_fleet.core.format import duration
from glm_fleet.fleet.turn import read_answer
from glm_fleet.health.tables import write_json, write_text
from glm_fleet.serving.graphs import open_faults
from glm_terminal import plain, show, width

_display = Display()
# Before anything was measured: a start of 440 GB, and the load of benchmark.yml a few times.
_START_S, _MEASURE_S = 900.0, 180.0
# A start that is not ready in less says nothing.
_SHORTEST_S = 60.0
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {"type": "str", "choices": ["planned", "tried", "back", "ended"], "required": True},
    "record": {"type": "path", "required": True},
    "found": {"type": "dict", "default": {}},
    "held": {"type": "str", "default": ""},
    "settings": {"type": "dict", "default": {}},
    "base": {"type": "dict", "required": True},
    "manifest": {"type": "dict", "default": {}},
    "options": {"type": "list", "elements": "str", "default": []},
    "server": {"type": "dict", "default": {}},
    "load": {"type": "dict", "default": {}},
    "places": {"type": "dict", "default": {}},
    "starts": {"type": "int", "default": 12},
    "limit": {"type": "int", "default": 7200},
    "repeats": {"type": "list", "elements": "int", "default": [2, 4]},
    "least_gain": {"type": "float", "default": 0.02},
    "stall_timeout": {"type": "int", "default": 1800},
    "problem": {"type": "str", "default": ""},
}


class ActionModule(DelegatingAction):
    """Calls the modules of a start and of a benchmark, and keeps the record on the controller."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Do what the state asks for."""
        _, given = self.validate_argument_spec(argument_spec=_ARGUMENTS)
        self.given = plain(given)
        self.own = variables
        self.node = str(variables["inventory_hostname"])
        self.path = Path(self.given["record"])
        self.base = tuned.Base(**self.given["base"])
        if self.given["state"] == "planned":
            return self._plan()
        if self.given["state"] == "tried":
            return self._try_all()
        return self._go_back() if self.given["state"] == "back" else self._end()

    def _settings(self) -> tuple[list[Setting], dict[str, str]]:
        settings, left_out = tuned.candidates(
            self.given["settings"],
            self.base,
            options=self.given["options"],
            faults=open_faults(self.given["manifest"]),
        )
        check_settings(settings)
        return settings, left_out

    def _budget(self) -> Budget:
        seen = self.given["found"].get("starts") or [_START_S]
        return Budget(self.given["starts"], self.given["limit"], max(seen[-3:]), _MEASURE_S)

    def _plan(self) -> dict[str, Any]:
        """Write down what will be tried, or go on from what was; say what the node goes back to."""
        found = self.given["found"]
        current = str((found.get("current") or {}).get("id") or "")
        known = tuned.read_record(self.path)
        goes_on = tuned.goes_on(known, current)
        tuned.check_node(
            self.node,
            current=current,
            active=bool((found.get("running") or {}).get("active")),
            lost=self.given["held"] == tuned.REASON and known is None,
            record=str(self.path),
        )
        settings, left_out = self._settings()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = tuned.Record(
            schema="glm-fleet/tune/1",
            node=self.node,
            state="running",
            before=known.before if known and goes_on else current,
            running=current,
            began=known.began if known and goes_on else now,
            load=self.given["load"],
            settings={each.name: list(each.values) for each in settings},
            left_out=left_out,
        )
        if known and goes_on and (known.settings, known.load) == (record.settings, record.load):
            record = replace(record, tries=known.tries)
        if not self._task.check_mode:
            self._write(record)
        self._say_plan(record, settings)
        ours = self.given["held"] in ("", tuned.REASON)
        return {"changed": False, "before": record.before, "lends": ours}

    def _say_plan(self, record: tuned.Record, settings: list[Setting]) -> None:
        budget = self._budget()
        for name, why in record.left_out.items():
            _display.display(f"  {self.node}: {name} is left out: {why}")
        for each in settings:
            values = ", ".join("left to vLLM" if one is None else str(one) for one in each.values)
            now = "left to vLLM" if each.now is None else each.now
            _display.display(f"  {self.node}: {each.name}: {values} (now {now})")
        left = most_left(settings, record.tries, budget)
        cost = left * sum(typical(record.tries, budget))
        begun = f"{len(record.tries)} tries were made before, " if record.tries else ""
        _display.display(
            f"  {self.node}: {begun}at most {left} starts, about {duration(cost)}; out of service "
            f"for at most {duration(budget.limit_s)}"
        )

    def _try_all(self) -> dict[str, Any]:
        """Try one settings after the other, until nothing is left or the budget is."""
        record = self._known()
        settings, _ = self._settings()
        budget, controller = self._budget(), os.getppid()
        while True:
            step = next_step(settings, record.tries, budget, _since(record))
            if step.kind == "end":
                self._write(replace(record, ended=step.why))
                return {"changed": bool(record.tries)}
            if os.getppid() != controller:
                raise AnsibleError(
                    "The controller of this tune is gone: its next start is not made"
                )
            self._say_step(step, record, settings, budget)
            record = self._try(step, record, budget)

    def _say_step(
        self, step: Step, record: tuned.Record, settings: list[Setting], budget: Budget
    ) -> None:
        gone = _since(record)
        left = most_left(settings, record.tries, budget) * sum(typical(record.tries, budget))
        again = "once more: " if step.kind == "confirm" else ""
        _display.display(
            f"  {self.node}: try {len(record.tries) + 1}: {again}{tuned.in_words(step.settings)} "
            f"({duration(gone)} gone, about {duration(min(left, budget.limit_s - gone))} left)"
        )

    def _try(self, step: Step, record: tuned.Record, budget: Budget) -> tuned.Record:
        """Start settings, attest them, measure them; return the record with one more try."""
        staged = self._ask("deployment", {"state": "staged", **self._rendered(step)})
        if staged.get("failed"):
            raise FleetError("Settings could not be staged", found=str(staged.get("msg")))
        last, record = record.running, replace(record, running=str(staged["id"]))
        # Before the switch: a run that goes on has to know what it finds.
        self._write(record)
        begun = time.monotonic()
        problem, started = self._start(record, last, budget)
        attested = time.monotonic()
        rates: list[dict[str, float]] = []
        least, most = self.given["repeats"]
        while not problem and wants_more(record.tries, rates, least=least, most=most):
            measured = self._ask("vllm_bench", {**self.given["server"], **self.given["load"]})
            if measured.get("failed"):
                problem = read_answer(self.node, measured).reason
                break
            rates.append(tuned.rates_of(measured))
        one = Try(
            step.settings,
            tuple(rates),
            started=started,
            start_s=round(attested - begun, 1),
            measure_s=round(time.monotonic() - attested, 1),
            problem=problem,
            confirms=step.kind == "confirm",
        )
        record = replace(record, tries=[*record.tries, one])
        self._write(record)
        _display.display(f"  {self.node}: {tuned.try_in_words(one, record.tries)}")
        return record

    def _switch(self, record: tuned.Record, last: str) -> dict[str, Any]:
        """Switch the node from ``last`` to what the record says; return what the module said."""
        back = str(self.given["found"].get("back") or "")
        kept = [each for each in (record.before, back) if each]
        # What was tried is nothing that a failure should go back to, however well it answered.
        tried = {"disproved": last} if last not in (*kept, record.running) else {}
        return self._ask(
            "deployment",
            {"state": "active", "id": record.running, "rungs": kept, **tried, **self._places()},
        )

    def _start(self, record: tuned.Record, last: str, budget: Budget) -> tuple[str, bool]:
        """Switch the node and attest it; return why that failed, and whether anything started."""
        switched = self._switch(record, last)
        started = bool(switched.get("changed"))
        if switched.get("failed"):
            return read_answer(self.node, switched).reason, started
        runs = switched["deployment"]
        start, _ = typical(record.tries, budget)
        left = budget.limit_s - _since(record) - start
        attested = self._ask(
            "vllm_probe",
            {
                "mode": "attest",
                "release": runs["release"],
                "model": runs["model"],
                "again": True,
                "stall_timeout": self.given["stall_timeout"],
                "start_timeout": max(left, _SHORTEST_S),
            },
        )
        answer = read_answer(self.node, attested)
        return ("" if answer.passed else answer.reason), started

    def _go_back(self) -> dict[str, Any]:
        """Switch the node to what it ran before."""
        record = self._known()
        return self._switch(replace(record, running=record.before), record.running)

    def _end(self) -> dict[str, Any]:
        """Report, and give the record its end: the node is back."""
        record = self._known()
        least = self.given["least_gain"]
        ended = record.ended or self.given["problem"] or "it was cut off"
        record = replace(record, state="done", running=record.before, ended=ended)
        self._write(record)
        found = verdict(record.tries, least)
        inventory = self.path.with_suffix(".yml")
        write_text(inventory, tuned.inventory_file(record, found, self.base), 0o644)
        show(tuned.render(record, least, width(160)))
        if found and found.better:
            _display.display(f"  {self.node}: the settings are in {inventory}")
        best = tuned.report(record, least, self.base)["best"]
        return {"changed": True, "best": best, "inventory": str(inventory)}

    def _known(self) -> tuned.Record:
        record = tuned.read_record(self.path)
        if record is None:
            raise FleetError(
                "The record of this tune is gone",
                expected=f"{self.path}, which this run wrote",
                found="nothing",
                remedy="run rollback.yml and then undrain.yml for this node",
            )
        return record

    def _write(self, record: tuned.Record) -> None:
        report = tuned.report(record, self.given["least_gain"], self.base)
        write_json(self.path, report, 0o644)

    def _places(self) -> dict[str, Any]:
        return dict(self.given["places"])

    def _rendered(self, step: Step) -> dict[str, Any]:
        """Return the deployment with these settings, as the role serving renders one."""
        variables = {**self.own, **tuned.variables_for(step.settings, self.base)}
        templar = self._templar.copy_with_new_env(available_variables=variables)
        return {**plain(templar.template(self.own["__serving_deployment"])), **self._places()}

    def _ask(self, module: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run a module on the node; a lost node is no try that lost."""
        result = self.ask(self.node, module, arguments, self.own)
        if result.get("unreachable"):
            raise FleetError(
                "The node was lost while it was tuned",
                expected=f"an answer of {self.node}",
                found=str(result.get("msg")),
                remedy="see that it is up, then run tune.yml again: it continues",
            )
        return dict(plain(result))


def _since(record: tuned.Record) -> float:
    """Return the seconds since the node was taken out of service."""
    began = datetime.fromisoformat(record.began)
    return (datetime.now(timezone.utc) - began).total_seconds()
