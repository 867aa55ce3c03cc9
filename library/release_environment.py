#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The Python environment of a release on a node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_environment
version_added: "0.1.0"
short_description: Build the environment of a release from its artifact, with no network
description:
  - Installs the locked wheels of a published release artifact with the uv program that is in
    it, checks that the attention backend resolves, and makes the result visible by one rename.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells whether the environment would be built.
    support: full
options:
  artifact:
    description: Published folder of the release artifact.
    type: path
    required: true
  dest:
    description: Folder of the environment.
    type: path
    required: true
  user:
    description: User who tries the environment. Nothing that came in the release runs as root.
    type: str
    default: glm
  compile_bytecode:
    description: Compile every Python file, so that the first start does not have to.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Build the environment
  release_environment:
    artifact: /srv/glm-fleet/artifacts/release/vllm-0.24.0-pr38476-0123456789ab
    dest: /opt/glm-fleet/releases/vllm-0.24.0-pr38476-0123456789ab
"""

RETURN = r"""
seen:
  description: What the smoke check saw, as C(vllm), C(torch) and C(backend).
  returned: when the environment was built
  type: dict
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.release import environment
from ansible.module_utils.glm_fleet.release.installed import is_complete
from ansible.module_utils.glm_fleet.serving.deployment import UNIT
from ansible.module_utils.glm_fleet.serving.record import read_running


def main() -> None:
    """Wire the environment core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "artifact": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "user": {"type": "str", "default": "glm"},
            "compile_bytecode": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    # What is made here is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    artifact, dest = Path(module.params["artifact"]), Path(module.params["dest"])
    if environment.is_whole(dest, artifact.name):
        module.exit_json(changed=False)
    # What runs from it goes on: its node's turn builds it again.
    running = read_running(run_program, UNIT)
    runs = running["active"] and running["record"].get("release") == artifact.name
    if module.check_mode or (runs and is_complete(dest, artifact.name)):
        module.exit_json(changed=module.check_mode and not runs)
    try:
        seen = environment.ensure(
            run_program,
            artifact,
            dest,
            user=module.params["user"],
            compile_bytecode=module.params["compile_bytecode"],
        )
    except FleetError as error:
        module.fail_json(**error.as_fail())
    module.exit_json(changed=True, seen=seen)


if __name__ == "__main__":
    main()
