# SPDX-License-Identifier: Apache-2.0
"""Keeps what a host answered beside what is expected of it, also when it gave no answer."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.common.yaml import yaml_load
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ROOT, FleetAction
from glm_fleet.core.errors import FleetError
from glm_fleet.health.preflight import expectations, query
from glm_fleet.node.answer import decode_facts
from glm_fleet.node.query import ARGUMENTS
from glm_fleet.node.remote_call import answer_in, program
from glm_terminal import plain


class ActionModule(FleetAction):
    """Runs the module of its name. A host without an answer is a row of a report, no failure."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result as ``record``: see `health.records`."""
        groups = list(variables.get("group_names", []))
        role = arguments.pop("settings", "")
        settings = self._settings(role, variables) if role else {}
        arguments = {**(query(settings, groups) if role else {}), **arguments}
        deep = boolean(arguments.pop("deep", None) or False)
        try:
            answer = self._read(arguments, variables)
        except AnsibleConnectionFailure as error:
            answer = {"msg": str(error)}
        answered = time.time()
        if deep and arguments.get("artifact_root") and isinstance(answer.get("node"), dict):
            answer["node"].update(self._hash(arguments, variables))
        record: dict[str, Any] = {
            "answered": answered,
            "message": "" if "node" in answer else str(answer.get("msg") or "no answer"),
            "groups": groups,
            "node": {},
            "expect": expectations(settings, groups) if role else [],
        }
        if "node" in answer:
            try:
                record["node"] = decode_facts(variables["inventory_hostname"], answer["node"])
            except FleetError as error:
                record["wrong"] = error.as_fail()
        return {"changed": False, "record": record}

    def _read(self, arguments: Mapping[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return {node}, or a module's failure.

        Without what Ansible ships with a module where that can be, which is most of the cost. In
        any other case, and for the words of a failure, the module itself.
        """
        found = ArgumentSpecValidator(ARGUMENTS).validate(dict(arguments))
        if found.error_messages:
            raise AnsibleActionFail("; ".join(found.error_messages))
        asked = found.validated_parameters
        interpreter = str(
            self._templar.template(
                constants.config.get_config_value("INTERPRETER_PYTHON", variables=variables)
            )
        )
        if interpreter.startswith("/") and self._is_pipelining_enabled("new"):
            asked["controller_epoch"] = asked["controller_epoch"] or time.time()
            # -I: Python reads nothing from the working directory, HOME or the environment.
            python = " ".join(map(shlex.quote, shlex.split(interpreter)))
            parts = [self._compute_environment_string(), python, "-I", "-"]
            answer = self._low_level_execute_command(
                " ".join(each for each in parts if each),
                in_data=program(
                    "node.facts", "read", asked, ROOT / "module_utils/glm_fleet"
                ).encode(),
            )
            node = answer_in(answer["stdout"])
            if answer["rc"] == 0 and node is not None:
                return {"node": node}
            Display().vv(f"node_info: as a module instead: {answer['rc']}: {answer['stderr']}")
        answer = self._execute_module(
            module_name="node_info",
            module_args={"controller_epoch": time.time(), **arguments},
            task_vars=variables,
        )
        return dict(answer)

    def _settings(self, role: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return a role's variables without their prefix, checked as the role's would be.

        Here and not in templates of the role: those are compiled anew for every host.
        """
        path = ROOT / "roles" / role / "meta/argument_specs.yml"
        specs = yaml_load(path.read_text())["argument_specs"]["main"]["options"]
        values = {name: plain(self._templar.template(variables[name])) for name in specs}
        found = ArgumentSpecValidator(specs).validate(values)
        if found.error_messages:
            raise AnsibleActionFail("; ".join(found.error_messages))
        return {
            name.removeprefix(f"{role}_"): value
            for name, value in found.validated_parameters.items()
        }

    def _hash(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Have what is active hashed: {verified, verified_error}."""
        links = arguments["links"]
        task = self._task.copy()
        task.args = {
            "state": "verified",
            "deep": True,
            "root": arguments["artifact_root"],
            "links": {"release": links["current"], "model": links["model"]},
            "environments": arguments.get("environment_root") or None,
        }
        action = self._shared_loader_obj.action_loader.get(
            "artifact",
            task=task,
            connection=self._connection,
            play_context=self._play_context,
            loader=self._loader,
            templar=self._templar,
            shared_loader_obj=self._shared_loader_obj,
        )
        try:
            answer = action.run(task_vars=variables)
        except AnsibleConnectionFailure as error:
            answer = {"msg": str(error)}
        return {
            "verified": answer.get("verified", []),
            "verified_error": str(answer.get("msg") or ""),
        }
