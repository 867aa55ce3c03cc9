#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The part of the logic that runs on a node without Ansible."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_library
version_added: "0.1.0"
short_description: Install the logic that a node runs on its own
description:
  - Writes the Python modules of glm-fleet that units on a node need (offering artifacts, the
    start gate, the watch) into a folder, the same code that the playbooks use, in one round trip.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells which modules would change.
    support: full
options:
  dest:
    description: Folder that gets the package C(glm_fleet).
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Bring the node's part of the logic
  node_library:
    dest: /opt/glm-fleet/lib
"""

RETURN = r"""
written:
  description: Names of the modules that were written.
  returned: always
  type: list
  elements: str
"""

import importlib
import inspect
import os
from pathlib import Path
from types import ModuleType

from ansible.module_utils import glm_fleet
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet import (
    artifact,
    attest,
    deployment,
    engine,
    errors,
    gate,
    progress,
    runner,
    sentry,
    serving,
    swarm,
    torrent,
    watch,
)
from ansible.module_utils.glm_fleet.artifact import write_atomically

_MODULES: tuple[ModuleType, ...] = (
    glm_fleet,
    artifact,
    attest,
    deployment,
    engine,
    errors,
    gate,
    progress,
    runner,
    sentry,
    serving,
    swarm,
    torrent,
    watch,
)


def main() -> None:
    """Write what differs."""
    module = AnsibleModule(
        argument_spec={"dest": {"type": "path", "required": True}}, supports_check_mode=True
    )
    # What is made here is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    folder = Path(module.params["dest"]) / "glm_fleet"
    written = []
    for each in _MODULES:
        name = "__init__" if each is glm_fleet else each.__name__.rpartition(".")[2]
        path = folder / f"{name}.py"
        text = inspect.getsource(importlib.import_module(each.__name__))
        if path.is_file() and path.read_text() == text:
            continue
        written.append(name)
        if not module.check_mode:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    module.exit_json(changed=bool(written), written=written)


if __name__ == "__main__":
    main()
