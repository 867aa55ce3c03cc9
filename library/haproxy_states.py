#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.haproxy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: haproxy_states
short_description: Saves the gateway's admin states for its next reload
version_added: "0.1.0"
description:
  - Writes HAProxy's server-state file from what runs, leaving out every server that is not
    at the endpoint given here. Such a server comes up in maintenance, at its new endpoint.
  - Without it HAProxy 2.6 keeps the old port of a server whose port changed, and gives a
    new machine under an old name the old one's traffic.
  - Of a HAProxy that does not run, the states last saved are kept.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Tells whether the file would change.
    support: full
  diff_mode:
    description: Shows no difference.
    support: none
  idempotent:
    description: A file that says what runs is left alone.
    support: full
options:
  endpoints:
    description: For each server of the new configuration its C(address:port).
    type: dict
    required: true
  renamed:
    description: Old names of servers by their new ones. Such a server keeps its state.
    type: dict
    default: {}
  socket:
    description: HAProxy's runtime socket.
    type: path
    default: /run/haproxy/admin.sock
  state_file:
    description: The file that HAProxy's C(server-state-file) names.
    type: path
    default: /var/lib/haproxy/server-state
"""

EXAMPLES = r"""
- name: Save the admin states for the reload
  haproxy_states:
    endpoints:
      gpu01: 192.0.2.11:8000
      gpu02: 192.0.2.12:8000
"""

RETURN = r""" # """

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.gateway.haproxy import SOCKET, Haproxy, unix_transport
from ansible.module_utils.glm_fleet.gateway.state_file import STATE_FILE, save_states


def main() -> None:
    """Write the file if it says something else."""
    module = AnsibleModule(
        argument_spec={
            "endpoints": {"type": "dict", "required": True},
            "renamed": {"type": "dict", "default": {}},
            "socket": {"type": "path", "default": SOCKET},
            "state_file": {"type": "path", "default": STATE_FILE},
        },
        supports_check_mode=True,
    )
    try:
        changed = save_states(
            Haproxy(unix_transport(module.params["socket"])),
            Path(module.params["state_file"]),
            module.params["endpoints"],
            renamed=module.params["renamed"],
            check_mode=module.check_mode,
        )
    except FleetError as error:
        module.fail_json(**error.as_fail())
    module.exit_json(changed=changed)


if __name__ == "__main__":
    main()
