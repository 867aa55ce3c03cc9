#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.haproxy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: haproxy_server
short_description: Takes a node into or out of the gateway's traffic
version_added: "0.1.0"
description:
  - Sets the admin state of one server of a running HAProxy over its runtime socket, and
    writes the server-state file, so that the state outlives a reload and a restart.
  - Runs on the gateway; usually delegated to it by the play of a node.
  - In check mode a gateway that does not run yet, or does not know the server yet, counts
    as a change to be made.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Tells what would change and changes nothing.
    support: full
  diff_mode:
    description: Shows the admin state before and after.
    support: full
  idempotent:
    description: The state wanted already, and on disk, is no change.
    support: full
options:
  server:
    description: Name of the server, which is the node's name in the inventory.
    type: str
    required: true
  state:
    description:
      - V(ready) takes requests as soon as the health check passes.
      - V(drain) takes no new requests and finishes those that run; checks go on.
      - V(maint) takes no new requests and is not checked.
    type: str
    required: true
    choices: [ready, drain, maint]
  backend:
    description: Name of the backend.
    type: str
    default: glm_nodes
  wait:
    description:
      - With O(state=drain) and O(state=maint), whether to wait until no request runs on
        the server, counting those of HAProxy workers from before a reload.
      - With O(state=ready), whether to wait until the health check has passed. A server
        that does not get there is put back into the state it had.
    type: bool
    default: true
  timeout:
    description: Seconds to wait.
    type: int
    default: 600
  fail_when_busy:
    description: With O(state=drain) and O(state=maint), whether requests that still run after
      O(timeout) are an error. They are counted in RV(sessions) either way.
    type: bool
    default: true
  min_ready:
    description: A server that takes requests is only taken out while so many others take them.
    type: int
    default: 0
  endpoint:
    description: With O(state=ready), C(address:port) at which the server is reached from now on;
      empty to leave it where it is. It has to be drained before.
    type: str
    default: ""
  socket:
    description: HAProxy's runtime socket with level admin.
    type: path
    default: /run/haproxy/admin.sock
  master_socket:
    description:
      - Socket of HAProxy's master process, through which workers from before a reload are
        seen; empty to look at the present worker only.
    type: str
    default: /run/haproxy-master.sock
  state_file:
    description: The file that HAProxy's C(server-state-file) names.
    type: path
    default: /var/lib/haproxy/server-state
"""

EXAMPLES = r"""
- name: Drain the node at the gateway
  haproxy_server:
    server: "{{ inventory_hostname }}"
    state: drain
    timeout: 1800
  delegate_to: "{{ groups['gateways'] | first }}"

- name: Join the node at the gateway
  haproxy_server:
    server: "{{ inventory_hostname }}"
    state: ready
    timeout: 60
  delegate_to: "{{ groups['gateways'] | first }}"
"""

RETURN = r"""
before:
  description: The admin state before, V(unknown) in check mode without a gateway.
  type: str
  returned: success
after:
  description: The admin state after.
  type: str
  returned: success
sessions:
  description: Requests that run on the server at the end.
  type: int
  returned: always
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.gateway.drain import Change, ensure_state
from ansible.module_utils.glm_fleet.gateway.haproxy import (
    BACKEND,
    MASTER_SOCKET,
    SOCKET,
    STATES,
    GatewayUnreachableError,
    Haproxy,
    UnknownServerError,
    unix_transport,
)
from ansible.module_utils.glm_fleet.gateway.state_file import STATE_FILE


def main() -> None:
    """Set the state and say what it was."""
    module = AnsibleModule(
        argument_spec={
            "server": {"type": "str", "required": True},
            "state": {"type": "str", "required": True, "choices": list(STATES)},
            "backend": {"type": "str", "default": BACKEND},
            "wait": {"type": "bool", "default": True},
            "timeout": {"type": "int", "default": 600},
            "fail_when_busy": {"type": "bool", "default": True},
            "min_ready": {"type": "int", "default": 0},
            "endpoint": {"type": "str", "default": ""},
            "socket": {"type": "path", "default": SOCKET},
            "master_socket": {"type": "str", "default": MASTER_SOCKET},
            "state_file": {"type": "path", "default": STATE_FILE},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    master = wanted["master_socket"]
    # A gateway that is restarted just now is waited for.
    patience = 3.0 if module.check_mode else 20.0
    haproxy = Haproxy(
        unix_transport(wanted["socket"], patience=patience),
        unix_transport(master, patience=patience) if master else None,
    )
    try:
        change = ensure_state(
            haproxy,
            wanted["backend"],
            wanted["server"],
            wanted["state"],
            state_file=Path(wanted["state_file"]),
            wait=wanted["wait"],
            timeout=wanted["timeout"],
            min_ready=wanted["min_ready"],
            fail_when_busy=wanted["fail_when_busy"],
            endpoint=wanted["endpoint"] if wanted["state"] == "ready" else "",
            check_mode=module.check_mode,
        )
    except (GatewayUnreachableError, UnknownServerError) as error:
        if not module.check_mode:
            module.fail_json(**error.as_fail())
        change = Change("unknown", wanted["state"], changed=True, sessions=0)
    except FleetError as error:
        module.fail_json(**error.as_fail())
    name = f"{wanted['backend']}/{wanted['server']}"
    module.exit_json(
        changed=change.changed,
        before=change.before,
        after=change.after,
        sessions=change.sessions,
        diff={
            "before_header": name,
            "after_header": name,
            "before": f"{change.before}\n",
            "after": f"{change.after}\n",
        },
    )


if __name__ == "__main__":
    main()
