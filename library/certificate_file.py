#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.node.certificate and glm_fleet.gateway.haproxy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: certificate_file
short_description: Reads or writes the certificate of a gateway
version_added: "0.2.0"
description:
  - Tells what a PEM file with certificate, chain and key holds, without the key, and how the
    configuration of HAProxy serves clients.
  - With O(content) it writes the file first, readable by its owner alone.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Tells that it would write, and does not.
    support: full
  diff_mode:
    description: A key is not shown.
    support: none
options:
  path:
    description: The file.
    type: path
    required: true
  content:
    description: What to write.
    type: str
    default: ""
  config:
    description: HAProxy's configuration.
    type: path
    default: /etc/haproxy/haproxy.cfg
"""

EXAMPLES = r"""
- name: Look at a certificate
  certificate_file:
    path: /etc/ssl/private/api.pem
  register: front_door
"""

RETURN = r"""
door:
  description: certificate as path, error, expires_s and chain, and serves (tls, clear or empty).
  type: dict
  returned: success
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import from_os_error
from ansible.module_utils.glm_fleet.core.files import write_atomically
from ansible.module_utils.glm_fleet.gateway.haproxy import serves
from ansible.module_utils.glm_fleet.node.certificate import read_certificate


def run(module: AnsibleModule) -> dict[str, Any]:
    """Write the file if told, and read it."""
    path, content = Path(module.params["path"]), module.params["content"]
    if content and not module.check_mode:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomically(path, content, 0o600)
    try:
        configuration = Path(module.params["config"]).read_text(errors="replace")
    except FileNotFoundError:
        configuration = ""
    door = {"certificate": read_certificate(path), "serves": serves(configuration)}
    return {"changed": bool(content), "door": door}


def main() -> None:
    """Wire the file to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "content": {"type": "str", "default": "", "no_log": True},
            "config": {"type": "path", "default": "/etc/haproxy/haproxy.cfg"},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
