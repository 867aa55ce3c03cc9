#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a node serves: staged beside what runs, compared with it, activated."""

from __future__ import annotations

DOCUMENTATION = r"""
module: deployment
version_added: "0.1.0"
short_description: Stage, compare or activate what a node serves
description:
  - A deployment is release, model, unit and environment together, named by their content.
  - Those that passed the attestation stay on the node, so that going back needs no network.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells what would change and changes nothing.
    support: full
  diff_mode:
    description: Shows the unit before and after, and of the environment the names that differ.
    support: full
  idempotent:
    description: What runs already is not restarted.
    support: full
options:
  state:
    description:
      - V(staged) puts a deployment beside the one that runs.
      - V(info) compares what runs with the first of O(rungs) that is not known to fail here.
      - V(policy) installs what the attestation of the deployment O(id) expects, if it runs, and
        points the links at it that lead elsewhere.
      - V(active) stops the service, switches to O(id) and starts it, unless it runs already.
        The node has to be drained.
      - V(options) names the options of vLLM's parser in the release that is active.
    type: str
    choices: [staged, info, policy, active, options]
    required: true
  release:
    description: Id of the release, for V(staged).
    type: str
  model:
    description: Id of the model, for V(staged).
    type: str
  cuda_graphs:
    description: Mode of CUDA graphs in the command line, for V(staged).
    type: str
  unit:
    description: Text of the systemd unit, for V(staged).
    type: str
  environment:
    description: Text of its environment file, for V(staged). Never shown.
    type: str
  policy:
    description: Text of the attestation policy, for V(staged).
    type: str
  id:
    description: Id of a deployment of this node.
    type: str
  rungs:
    description:
      - Ids of deployments, the wanted one first, then what to step down to.
      - For V(active), ids that have to stay on the node although nothing runs them yet.
    type: list
    elements: str
    default: []
  target:
    description:
      - For V(info), go back instead. V(before) is the newest attested deployment before the one
        that runs. Anything else is the beginning of the id of a release, model or deployment.
    type: str
    default: ""
  retry:
    description: For V(info), forget that deployments of O(rungs) are known to fail here.
    type: bool
    default: false
  refuse:
    description: For V(active), id of the deployment that turned out not to run here.
    type: str
  reason:
    description: Why O(refuse) does not run.
    type: str
  again:
    description: For V(info) and V(active), start the service anew though it runs what it should.
    type: bool
    default: false
  disproved:
    description: For V(active), id of a deployment that was attested and turned out not to be right.
    type: str
    default: ""
  release_root:
    description: Folder with C(releases/) and the link C(current).
    type: path
    default: /opt/glm-fleet
  model_link:
    description: Link to the active model.
    type: path
    default: /srv/glm-fleet/model
  models:
    description: Folder of the published models.
    type: path
    default: /srv/glm-fleet/artifacts/model
  group:
    description: Group of the service's user.
    type: str
    default: glm
"""

EXAMPLES = r"""
- name: Switch to a deployment that was staged
  deployment:
    state: active
    id: 0123456789ab
"""

RETURN = r"""
id:
  description: Id of the deployment.
  returned: with V(staged), V(active) and V(policy)
  type: str
running:
  description: C(active), C(invocation), C(record) of the pre-start check, and C(unit).
  returned: with V(info)
  type: dict
wanted:
  description: The deployment to run, as C(id), C(release), C(model), C(cuda_graphs). Empty when
    O(target) has nothing to go back to.
  returned: with V(staged) and V(info)
  type: dict
ladder:
  description: Ids to try, the wanted one first.
  returned: with V(info)
  type: list
  elements: str
differences:
  description: What a restart would change, in words. Empty when the node runs what it should.
  returned: with V(staged) and V(info)
  type: list
  elements: str
current:
  description: The deployment activated last, shaped as RV(wanted). Empty if there is none.
  returned: with V(info)
  type: dict
back:
  description: Id of what a failure goes back to, empty if nothing was attested before.
  returned: with V(info)
  type: str
starts:
  description: How long the last starts took until their first answer, in seconds, newest last.
  returned: with V(info)
  type: list
  elements: float
skipped_rungs:
  description: Deployments that are known to fail here, as C(cuda_graphs) and C(reason).
  returned: with V(info)
  type: list
  elements: dict
options:
  description: Options such as C(--max-num-seqs), sorted; [] where they cannot be told.
  returned: with V(options)
  type: list
  elements: str
deployment:
  description: The deployment, shaped as RV(wanted).
  returned: with V(active)
  type: dict
seconds:
  description: C(stop_s) and C(switch_s).
  returned: with V(active)
  type: dict
"""

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.node.deploying import Deploying
from ansible.module_utils.glm_fleet.serving.deployment import Deployments, Places, make

_PARTS = ("release", "model", "cuda_graphs", "unit", "environment", "policy")


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do what the parameters ask for and return the module's result."""
    params = module.params
    places = Places(
        release_link=Path(params["release_root"], "current"),
        releases=Path(params["release_root"], "releases"),
        model_link=Path(params["model_link"]),
        models=Path(params["models"]),
        group=params["group"],
    )
    host = Deploying(run_program, Deployments(places), module.check_mode)
    if params["state"] == "staged":
        return host.stage(make(**{part: params[part] for part in _PARTS}))
    if params["state"] == "options":
        return {"changed": False, "options": host.options()}
    if params["state"] == "info":
        return host.find(
            target=params["target"],
            rungs=params["rungs"],
            retry=params["retry"],
            again=params["again"],
        )
    if params["state"] == "policy":
        result, mended = host.renew(params["id"])
        for words in mended:
            module.warn(f"{words}; it leads to what runs again")
        return result
    return host.switch(
        params["id"],
        releases=places.models.parent / "release",
        rungs=params["rungs"],
        refuse=params["refuse"] or "",
        reason=params["reason"] or "",
        disproved=params["disproved"],
        again=params["again"],
    )


def main() -> None:
    """Wire the deployment core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["staged", "info", "policy", "active", "options"],
            },
            "release": {"type": "str"},
            "model": {"type": "str"},
            "cuda_graphs": {"type": "str"},
            "unit": {"type": "str"},
            "environment": {"type": "str", "no_log": True},
            "policy": {"type": "str"},
            "id": {"type": "str"},
            "rungs": {"type": "list", "elements": "str", "default": []},
            "target": {"type": "str", "default": ""},
            "retry": {"type": "bool", "default": False},
            "refuse": {"type": "str"},
            "reason": {"type": "str"},
            "again": {"type": "bool", "default": False},
            "disproved": {"type": "str", "default": ""},
            "release_root": {"type": "path", "default": "/opt/glm-fleet"},
            "model_link": {"type": "path", "default": "/srv/glm-fleet/model"},
            "models": {"type": "path", "default": "/srv/glm-fleet/artifacts/model"},
            "group": {"type": "str", "default": "glm"},
        },
        required_if=[
            (
                "state",
                "staged",
                ["release", "model", "cuda_graphs", "unit", "environment", "policy"],
            ),
            ("state", "active", ["id"]),
            ("state", "policy", ["id"]),
        ],
        supports_check_mode=True,
    )
    # The unit is for systemd to read, however strict the host's umask is.
    os.umask(0o022)
    try:
        module.exit_json(**run(module))
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
