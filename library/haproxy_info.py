#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.haproxy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: haproxy_info
short_description: Reads the state of the gateway from a running HAProxy
version_added: "0.1.0"
description:
  - Asks HAProxy over its runtime socket; nothing is written.
  - A gateway that does not answer is reported with C(valid) false and its errors; the
    module itself does not fail.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Does the same, as nothing is written.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
options:
  socket:
    description: HAProxy's runtime socket.
    type: path
    default: /run/haproxy/admin.sock
  master_socket:
    description:
      - Socket of HAProxy's master process, through which workers from before a reload are
        seen; empty to look at the present worker only.
    type: str
    default: /run/haproxy-master.sock
"""

EXAMPLES = r"""
- name: Read the state of the gateway
  haproxy_info:
  register: gateway_state
"""

RETURN = r"""
gateway:
  description: The gateway as it runs.
  type: dict
  returned: always
  contains:
    valid:
      description: Whether HAProxy answered every question.
      type: bool
    version:
      description: HAProxy's version.
      type: str
    revision:
      description: Fingerprint of the configuration that runs; empty if it is not ours.
      type: str
    tls:
      description: Whether it serves clients with TLS.
      type: bool
    uptime_s:
      description: Seconds since the last start or reload.
      type: int
    errors:
      description: One sentence for each thing that could not be read.
      type: list
      elements: str
    servers:
      description:
        - Each server as name, backend, address, port, status (UP, DOWN, DRAIN, MAINT),
          admin_state (ready, drain, maint), check (the last health check in words),
          sessions_current (requests that run, those of workers from before a reload
          included), sessions_total, weight, last_change_s (seconds since the last change).
      type: list
      elements: dict
    clients:
      description:
        - What each client did since the start or the last reload, as name, requests (let through),
          refused (above a limit), failed (by a node), at_once, bytes_in and bytes_out.
      type: list
      elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.gateway.haproxy import (
    MASTER_SOCKET,
    SOCKET,
    Haproxy,
    describe,
    unix_transport,
)


def main() -> None:
    """Read the state and hand it back."""
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path", "default": SOCKET},
            "master_socket": {"type": "str", "default": MASTER_SOCKET},
        },
        supports_check_mode=True,
    )
    master = module.params["master_socket"]
    haproxy = Haproxy(
        unix_transport(module.params["socket"]), unix_transport(master) if master else None
    )
    module.exit_json(changed=False, gateway=describe(haproxy))


if __name__ == "__main__":
    main()
