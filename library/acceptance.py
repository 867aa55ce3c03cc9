#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The acceptance of a node's GPUs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: acceptance
version_added: "0.2.0"
short_description: Find out whether the GPUs of a node compute right and fast
description:
  - Runs the kernels of a staged release against float32, products that must be the same bit by
    bit, memory and bandwidth on every GPU, side by side; then an all-reduce over all of them, and
    C(dcgmi diag) where it is installed. Compares with the limits of the board and with the other
    GPUs of the node.
  - Does nothing on a node that passed with the same boards, driver and kernels.
  - Runs nothing while an engine runs, unless O(stop) says so. What is run on the GPUs is run as
    O(user).
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells whether the node would be accepted, and runs nothing.
    support: full
options:
  root:
    description: Folder of the releases' environments, C(releases), and of the link C(current).
    type: path
    default: /opt/glm-fleet
  release:
    description: Id of the release. The active one if empty, or the one that was staged last.
    type: str
    default: ""
  user:
    description: User of the service.
    type: str
    default: glm
  unit:
    description: The engine's unit.
    type: str
    default: glm-serving.service
  device:
    description: Type of device as torch names it. V(cpu) is for a lab without GPUs.
    type: str
    choices: [cuda, cpu]
    default: cuda
  cache:
    description:
      - Folder of the user's, where compiled kernels are kept by release. Nowhere if empty.
    type: path
    default: ""
  limits:
    description: Limits that replace those of the board, such as C(tflops).
    type: dict
    default: {}
  variables:
    description: Environment variables for what runs on the GPUs.
    type: dict
    default: {}
  dcgm_level:
    description: Level of C(dcgmi diag). Not run if 0.
    type: int
    default: 1
  free_mib:
    description: MiB that a free GPU may use.
    type: int
    default: 1024
  force:
    description: Also accept a node that was accepted as it is.
    type: bool
    default: false
  stop:
    description: Stop an engine that runs. The node has to be drained.
    type: bool
    default: false
  strict:
    description: Fail when the node does not pass.
    type: bool
    default: true
  look:
    description: Only tell whether the node would be accepted, as in check mode.
    type: bool
    default: false
  progress_file:
    description: File that says how far it is.
    type: path
"""

EXAMPLES = r"""
- name: Accept the node with the release that was staged
  acceptance:
    release: vllm-0.24.0-pr38476-0123456789ab
"""

RETURN = r"""
needed:
  description: Why the node has to be accepted. Empty when it was, as it is now.
  returned: always
  type: list
  elements: str
ran:
  description: Whether the trials were run now.
  returned: always
  type: bool
passed:
  description: Whether the node passed; none while nobody knows.
  returned: always
  type: bool
did_not_pass:
  description: Whether these boards did not pass, now or the last time.
  returned: always
  type: bool
busy:
  description: Why nothing was run although it was needed.
  returned: always
  type: str
message:
  description: What is wrong and what to do, when it did not pass.
  returned: always
  type: str
of_release:
  description: Whether all GPUs have the same faults in the release's kernels, and no other.
  returned: always
  type: bool
record:
  description:
    - Every figure, as in C(/var/lib/glm-fleet/acceptance.json). A task shows a table.
  returned: when the module is not called by its action plugin
  type: dict
"""

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.core.progress import Meter, ProgressFile
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.node.acceptance.ensure import (
    Wish,
    ensure,
    find_environment,
    unknown,
)
from ansible.module_utils.glm_fleet.node.acceptance.record import site_packages
from ansible.module_utils.glm_fleet.node.acceptance.run import Settings


def _settings(given: dict[str, Any], home: Path) -> Settings:
    return Settings(
        python=str(home / "bin/python"),
        packages=site_packages(home),
        release=home.name,
        user=given["user"],
        device=given["device"],
        cache=f"{given['cache']}/{home.name}" if given["cache"] else "",
        limits=given["limits"],
        environment={str(key): str(value) for key, value in given["variables"].items()},
        dcgm_level=given["dcgm_level"],
    )


def main() -> None:
    """Wire the acceptance's core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/opt/glm-fleet"},
            "release": {"type": "str", "default": ""},
            "user": {"type": "str", "default": "glm"},
            "unit": {"type": "str", "default": "glm-serving.service"},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "default": "cuda"},
            "cache": {"type": "path", "default": ""},
            "limits": {"type": "dict", "default": {}},
            "variables": {"type": "dict", "default": {}},
            "dcgm_level": {"type": "int", "default": 1},
            "free_mib": {"type": "int", "default": 1024},
            "force": {"type": "bool", "default": False},
            "stop": {"type": "bool", "default": False},
            "strict": {"type": "bool", "default": True},
            "look": {"type": "bool", "default": False},
            "progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    given = module.params
    # The record is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    try:
        home = find_environment(Path(given["root"]), given["release"])
    except FleetError as error:
        if module.check_mode:
            # It would be staged before.
            module.exit_json(changed=False, **unknown())
        module.fail_json(**error.as_fail())
    try:
        settings = _settings(given, home)
        wish = Wish(
            unit=given["unit"],
            force=given["force"],
            stop=given["stop"],
            only_look=module.check_mode or given["look"],
            free_mib=given["free_mib"],
        )
        meter = Meter("acceptance")
        shown = Path(given["progress_file"]) if given["progress_file"] else None
        with ProgressFile(shown, meter):
            found = ensure(
                settings, wish, run_program, say=lambda what: setattr(meter, "what", what)
            )
    except FleetError as error:
        module.fail_json(**error.as_fail())
    if found["ran"] and not found["passed"] and given["strict"]:
        module.fail_json(msg=found.pop("message"), changed=True, **found)
    would = module.check_mode and bool(found["needed"]) and not found["busy"]
    module.exit_json(changed=found["ran"] or would, **found)


if __name__ == "__main__":
    main()
