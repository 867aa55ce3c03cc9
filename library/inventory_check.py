#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of an action plugin: the work is in plugins/action/inventory_check.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: inventory_check
short_description: Names every mistake of the inventory before a host is touched
version_added: "0.1.0"
description:
  - Runs on the controller and connects to no host.
  - Groups gpu_nodes and gateways must have hosts, no two hosts one address; ports must be
    ports and differ where a host is node and gateway; the tensor parallel size must divide
    the number of GPUs.
  - A variable that looks like one of a role's, but is none, is named with the one that was
    probably meant; so is a value that the role's argument specification does not allow. A
    value that is a template is left to its role.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Does the same, as nothing is written.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
options: {}
"""

EXAMPLES = r"""
- name: Check the inventory
  inventory_check:
"""

RETURN = r"""
problems:
  description: One sentence for each mistake.
  type: list
  elements: str
  returned: always
left_out:
  description:
    - What add_host needs for each group that the inventory need not name, as C(group),
      C(host) and, for the controller, C(connection) and C(interpreter).
  type: list
  elements: dict
  returned: success
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why this cannot be run as a module."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    module.fail_json(
        msg="inventory_check runs on the controller. Expected: action_plugins in ansible.cfg "
        "names plugins/action. What to do: run ansible-playbook in the repository's root."
    )


if __name__ == "__main__":
    main()
