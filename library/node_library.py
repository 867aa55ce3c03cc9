#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The part of the logic that runs on a node without Ansible."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_library
version_added: "0.1.0"
short_description: Install the logic that a node runs on its own
description:
  - Brings the Python package C(glm_fleet), as far as units on a node need it, into a folder. The
    package there is replaced as a whole, by two renames, so that a unit never starts on half of it.
  - The action plugin of this name finds the files by their imports. It asks with O(hashes) first,
    and sends O(files) only to a node where something differs.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells which files would change.
    support: full
options:
  dest:
    description: Folder that gets the package C(glm_fleet).
    type: path
    required: true
  hashes:
    description: SHA-256 of each file, by its path below the package. Given by the action plugin.
    type: dict
    default: {}
  files:
    description:
      - Source of each file, by its path below the package. Given by the action plugin. Without it
        nothing is written.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Bring the node's part of the logic
  node_library:
    dest: /opt/glm-fleet/lib
"""

RETURN = r"""
written:
  description: Files that are new, changed or gone.
  returned: always
  type: list
  elements: str
sent:
  description: Whether the files themselves were sent to the host, some 300 KB.
  returned: always
  type: bool
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.files import differing_files, replace_tree


def main() -> None:
    """Write what differs."""
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "hashes": {"type": "dict", "default": {}},
            "files": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    if not module.params["hashes"]:
        module.fail_json(msg="node_library needs its action plugin, which finds the files")
    # What is made here is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    folder = Path(module.params["dest"]) / "glm_fleet"
    written = differing_files(folder, module.params["hashes"])
    if written and module.params["files"] and not module.check_mode:
        replace_tree(folder, module.params["files"])
    module.exit_json(changed=bool(written), written=written, sent=bool(module.params["files"]))


if __name__ == "__main__":
    main()
