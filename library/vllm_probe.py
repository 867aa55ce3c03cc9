#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a node serves, whether it may take traffic, and how far its start has come."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_probe
version_added: "0.1.0"
short_description: Look at, watch or attest the serving unit of a node
description:
  - Runs on the node and asks the server on its own port. Changes nothing but the note of what
    proved a start, below C(/run), which V(attest) leaves for later checks.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: The module only reads. V(attest) and V(watch) ask nothing in check mode.
    support: full
options:
  mode:
    description:
      - V(watch) looks at a start for O(seconds).
      - V(check) is the attestation with one short canary request, fit for a node under load.
      - V(attest) waits until a start is ready, then runs the whole attestation. Progress is
        shown while it waits, and while it asks.
      - V(answers) asks nothing, and returns the known answers that the node keeps.
    type: str
    choices: [watch, check, attest, answers]
    default: check
  unit:
    description: Name of the unit.
    type: str
    default: glm-serving.service
  policy:
    description:
      - JSON file on the node that says what its attestation expects, as C(address), C(port),
        C(served_model_name), C(required) and C(forbidden). The role serving writes it, so that
        a health check years later expects the same.
    type: path
    default: /etc/glm-fleet/attestation.json
  release:
    description: Id of the release that should run. Without it, what the pre-start check recorded.
    type: str
    default: ""
  model:
    description: Id of the model that should run. Without it, what the pre-start check recorded.
    type: str
    default: ""
  environment_file:
    description: Environment file of the unit. The API key is read from it.
    type: path
    default: /etc/glm-fleet/serving.env
  seconds:
    description: How long one look of V(watch) lasts, in seconds.
    type: float
    default: 10
  give_up:
    description: For V(watch), why the caller gives the start up. The module then fails with what
      the journal says of it.
    type: str
    default: ""
  neighbours:
    description: Known answers of other nodes by their names, as V(answers) returned them there.
    type: dict
    default: {}
  again:
    description: Whether V(attest) asks for known answers again that this start has proven.
    type: bool
    default: false
  progress_file:
    description: Where V(attest) says what it does, for whoever watches it.
    type: path
  stall_timeout:
    description: V(attest) gives up when a start makes no progress for so many seconds.
    type: float
    default: 900
  start_timeout:
    description: V(attest) gives up when a start is not ready after so many seconds, if any.
    type: float
    default: 0
"""

EXAMPLES = r"""
- name: Wait for the start and attest it
  vllm_probe:
    mode: attest
    release: vllm-0.24.0-pr38476-0123456789ab
"""

RETURN = r"""
attestation:
  description:
    - C(passed), C(checks) (name, passed, detail), C(release_id), C(model_id), C(invocation_id),
      C(started_at), C(unit), C(canary) (tokens_per_second, time_to_first_token_s in seconds,
      completion_tokens, text), C(metrics), C(diagnosis), C(step_down) (whether a lower mode of
      CUDA graphs may help) and C(journal).
    - C(answers) are the known answers. Their C(apart) says how far they are from others, as
      C(whom), C(release), C(mean) (of the differences of log probabilities), C(moved), C(prompts).
  returned: with V(check) and V(attest)
  type: dict
answers:
  description: The known answers of the deployment that was activated last, {} if none are kept.
  returned: with V(answers)
  type: dict
start:
  description: Where the time of this start went, in seconds by phase; {} if it cannot be told.
  returned: with V(attest)
  type: dict
watched:
  description: C(ready), C(failed) with the reason, C(phase), C(progress), C(invocation_id).
  returned: with V(watch)
  type: dict
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core import http as core_http
from ansible.module_utils.glm_fleet.core import systemd
from ansible.module_utils.glm_fleet.core.decode import decode
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.core.progress import Meter, ProgressFile
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.serving import attestation, startup
from ansible.module_utils.glm_fleet.serving import policy as serving_policy
from ansible.module_utils.glm_fleet.serving.answers import Answers
from ansible.module_utils.glm_fleet.serving.deployment import Deployments, Places
from ansible.module_utils.glm_fleet.serving.kept_answers import Known
from ansible.module_utils.glm_fleet.serving.phases import start_phases


def _attest(
    module: AnsibleModule, http: core_http.Http, policy: serving_policy.Policy
) -> dict[str, Any]:
    params = module.params
    meter = Meter("the attestation")
    known = _known(params, policy["answers"], meter) if policy["answers"] else None
    wanted = attestation.wanted_by(
        policy, params["unit"], release=params["release"], model=params["model"], known=known
    )
    progress = Path(params["progress_file"]) if params["progress_file"] else None
    with ProgressFile(progress, meter):
        found = attestation.attest(run_program, http, wanted, thorough=params["mode"] == "attest")
    if not found["passed"]:
        failed = [
            f"{each['name']}: {each['detail']}" for each in found["checks"] if not each["passed"]
        ]
        raise FleetError(
            "The attestation failed: this node takes no traffic",
            expected="every check to pass",
            found="; ".join(failed),
            remedy=attestation.remedy(found),
            details={
                "attestation": found,
                **{key: found[key] for key in ("diagnosis", "step_down", "journal")},
            },
        )
    if params["mode"] != "attest":
        return {"attestation": found}
    deployments = Deployments(Places())
    # What a later failure goes back to.
    deployments.note_passed(found["release_id"], found["model_id"])
    phases = _start(found)
    if phases:
        deployments.note_start(found["invocation_id"], sum(phases.values()))
    return {"attestation": found, "start": phases}


def _known(params: Mapping[str, Any], limits: serving_policy.AnswerLimits, meter: Meter) -> Known:
    neighbours = {
        str(name): decode(Answers, answers, what=f"The known answers of {name}")
        for name, answers in params["neighbours"].items()
    }
    return Known(
        limits,
        Deployments(Places()),
        neighbours,
        again=params["again"],
        say=lambda what: setattr(meter, "what", what),
    )


def _start(found: Mapping[str, Any]) -> dict[str, float]:
    lines = systemd.journal(run_program, found["invocation_id"])
    phases = start_phases(lines, found["started_at"])
    if phases and found["canary"].get("first_answer_s"):
        phases["first answer"] = found["canary"]["first_answer_s"]
    return phases


def main() -> None:
    """Wire the attestation core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "mode": {
                "type": "str",
                "choices": ["watch", "check", "attest", "answers"],
                "default": "check",
            },
            "unit": {"type": "str", "default": "glm-serving.service"},
            "policy": {"type": "path", "default": "/etc/glm-fleet/attestation.json"},
            "release": {"type": "str", "default": ""},
            "model": {"type": "str", "default": ""},
            "environment_file": {"type": "path", "default": "/etc/glm-fleet/serving.env"},
            "seconds": {"type": "float", "default": 10.0},
            "give_up": {"type": "str", "default": ""},
            "neighbours": {"type": "dict", "default": {}},
            "again": {"type": "bool", "default": False},
            "progress_file": {"type": "path"},
            "stall_timeout": {"type": "float", "default": 900.0},
            "start_timeout": {"type": "float", "default": 0.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    if params["mode"] == "answers":
        kept = Deployments(Places())
        module.exit_json(changed=False, answers=kept.answers(kept.current()) or {})
    try:
        policy = serving_policy.read_policy(Path(params["policy"]))
        http = core_http.local_http(
            policy["port"],
            address=policy["address"],
            api_key=serving_policy.read_api_key(Path(params["environment_file"])),
        )
        if params["mode"] == "watch":
            watched = startup.await_attestation(
                run_program, http, params["unit"], seconds=params["seconds"]
            )
            result = {"watched": watched}
            reason = watched["failed"] or params["give_up"]
            if reason:
                lines = systemd.last_words(run_program, params["unit"])
                raise startup.failed_start(watched, lines, reason)
        else:
            result = _attest(module, http, policy)
        module.exit_json(changed=False, **result)
    except FleetError as error:
        module.fail_json(**error.as_fail())


if __name__ == "__main__":
    main()
