#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Rehearses a release on a node: its real unit, with random weights in a few layers."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rehearsal
version_added: "0.3.0"
short_description: Start a staged deployment with random weights, ask it, and stop it
description:
  - Runs the unit, command line and environment of a deployment that was staged, with random
    weights in a few layers of the model's real shapes. Takes minutes, and needs no weights.
  - Steps down to a lower mode of CUDA graphs where a start dies of a higher one.
  - A release that passed on GPUs and driver of this kind is not rehearsed again.
  - An action plugin of this name shows the progress while it runs.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells whether a rehearsal is needed, and starts nothing.
    support: full
options:
  rungs:
    description: Ids of deployments, the wanted one first, then what to step down to.
    type: list
    elements: str
    required: true
  again:
    description: Rehearse also what passed before, or was attested on this node.
    type: bool
    default: false
  drained:
    description:
      - Whether the node is drained. Its engine is then stopped, and not started again.
      - Without it, a node whose engine runs is refused.
    type: bool
    default: false
  files:
    description:
      - Folder on the node with the small files of the model. That of the model itself if not
        given.
    type: path
  layers:
    description: How many layers. As few as hold each kind of layer if V(0).
    type: int
    default: 0
  stall_timeout:
    description: Seconds without progress until the start is given up.
    type: int
    default: 1800
  start_timeout:
    description: Seconds until the start is given up.
    type: int
    default: 1200
  free_gpu_mib:
    description: MiB that a GPU may have in use and still count as free.
    type: int
    default: 1024
  release_root:
    description: Folder with C(releases/).
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
    description: Name of the service's user and of its group.
    type: str
    default: glm
  progress_file:
    description: File that says how far it has come, for the action plugin.
    type: path
"""

EXAMPLES = r"""
- name: Rehearse what was staged
  rehearsal:
    rungs: [0123456789ab]
    drained: true
"""

RETURN = r"""
rehearsal:
  description:
    - C(passed), C(known) (whether it was known before, and nothing was started), C(id) and
      C(cuda_graphs) of the deployment that passed, C(seconds), C(words) for the report of a turn
      that rehearsed, and C(stepped_down) with the reason if a higher mode of CUDA graphs failed.
  returned: success
  type: dict
checks:
  description: What was asked of the server, as C(name), C(passed) and C(detail).
  returned: success
  type: list
  elements: dict
"""

import os
import pwd
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.core.procfs import list_processes
from ansible.module_utils.glm_fleet.core.progress import Meter, ProgressFile
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.node import readiness
from ansible.module_utils.glm_fleet.node.prestart import wait_until_clear
from ansible.module_utils.glm_fleet.serving.deployment import UNIT, Deployments, Places
from ansible.module_utils.glm_fleet.serving.record import read_running
from ansible.module_utils.glm_fleet.serving.rehearsal_run import Rehearsal
from ansible.module_utils.glm_fleet.serving.rehearsals import in_words

_PATIENCE_S = 60.0


def _clear(user: str, limit_mib: int) -> None:
    wait_until_clear(
        runner=run_program,
        processes=list_processes,
        uid=pwd.getpwnam(user).pw_uid,
        limit_mib=limit_mib,
        patience_s=_PATIENCE_S,
    )


def _result(rehearsal: Rehearsal, rungs: list[str], again: bool) -> dict[str, Any] | None:
    """Return the result where a rehearsal is not needed."""
    if again:
        return None
    wanted = rehearsal.deployments.read(rungs[0])
    known = {"passed": True, "known": True, "id": wanted.id, "cuda_graphs": wanted.cuda_graphs}
    if wanted.id in rehearsal.deployments.attested():
        why = "it was attested on this node before"
    elif found := rehearsal.known(wanted.id):
        known["seconds"] = found["seconds"]
        why = f"it was {in_words(found)} before"
    else:
        return None
    return {"changed": False, "checks": [], "msg": f"Not rehearsed: {why}.", "rehearsal": known}


def _refuse_to_stop(running: bool) -> None:
    if running:
        raise FleetError(
            "This node serves, and a rehearsal needs its GPUs",
            expected="a node that was drained",
            found=f"{UNIT} is active",
            remedy="use playbooks/rehearse.yml, which drains it first",
        )


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do what the parameters ask for and return the module's result."""
    params = module.params
    deployments = Deployments(
        Places(
            release_link=Path(params["release_root"], "current"),
            releases=Path(params["release_root"], "releases"),
            model_link=Path(params["model_link"]),
            models=Path(params["models"]),
            group=params["group"],
        )
    )
    rungs = params["rungs"]
    wanted = deployments.read(rungs[0])
    path = Path(params["progress_file"]) if params["progress_file"] else None
    meter = Meter("rehearsal: begins")

    def say(text: str) -> None:
        meter.what = text

    rehearsal = Rehearsal(
        run_program,
        deployments,
        model=Path(params["files"] or deployments.places.models / wanted.model),
        clear=lambda: _clear(params["group"], params["free_gpu_mib"]),
        attested_now=readiness.answer() == "up",
        layers=params["layers"],
        stall_s=params["stall_timeout"],
        limit_s=params["start_timeout"],
        say=say,
    )
    known = _result(rehearsal, rungs, params["again"])
    if known is not None:
        return known
    if module.check_mode:
        msg = "It would be rehearsed with random weights before anything is switched to it."
        return {"changed": True, "checks": [], "msg": msg, "rehearsal": {"id": wanted.id}}
    with ProgressFile(path, meter), deployments.switching():
        if not params["drained"]:
            _refuse_to_stop(bool(read_running(run_program, UNIT)["active"]))
        made = rehearsal.rehearse(rungs)
    passed = made.deployment
    found = rehearsal.known(passed.id)
    return {
        "changed": True,
        "checks": [vars(each) for each in made.checks],
        "rehearsal": {
            "passed": True,
            "known": False,
            "id": passed.id,
            "cuda_graphs": passed.cuda_graphs,
            "seconds": found["seconds"] if found else 0.0,
            "words": in_words(found) if found else "rehearsed",
            "stepped_down": deployments.refused(rungs[0]) if passed.id != rungs[0] else "",
        },
    }


def main() -> None:
    """Wire the rehearsal core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "rungs": {"type": "list", "elements": "str", "required": True},
            "again": {"type": "bool", "default": False},
            "drained": {"type": "bool", "default": False},
            "files": {"type": "path"},
            "layers": {"type": "int", "default": 0},
            "stall_timeout": {"type": "int", "default": 1800},
            "start_timeout": {"type": "int", "default": 1200},
            "free_gpu_mib": {"type": "int", "default": 1024},
            "release_root": {"type": "path", "default": "/opt/glm-fleet"},
            "model_link": {"type": "path", "default": "/srv/glm-fleet/model"},
            "models": {"type": "path", "default": "/srv/glm-fleet/artifacts/model"},
            "group": {"type": "str", "default": "glm"},
            "progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    try:
        module.exit_json(**run(module))
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
