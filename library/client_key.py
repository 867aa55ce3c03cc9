#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Makes a key for a client of the fleet."""

from __future__ import annotations

DOCUMENTATION = r"""
module: client_key
short_description: Makes a key for a client and keeps its digest only
version_added: "0.1.0"
description:
  - Runs on the controller. The key has 256 random bits. It is written to a file that only its owner
    reads, or handed back once; nothing else ever holds it.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Makes no key.
    support: full
  diff_mode:
    description: Shows no difference.
    support: none
options:
  client:
    description: Name of the client, for the name of the file.
    type: str
    required: true
  folder:
    description: Folder for the file; empty to hand the key back instead.
    type: path
    default: ""
"""

EXAMPLES = r"""
- name: Make a key
  client_key:
    client: batch
    folder: ~/.glm-fleet/keys
  delegate_to: localhost
"""

RETURN = r"""
key_id:
  description: Random name of the key, no secret.
  type: str
  returned: success
sha256:
  description: Digest of the key.
  type: str
  returned: success
path:
  description: The file with the key.
  type: str
  returned: with O(folder)
key:
  description: The key itself.
  type: str
  returned: without O(folder)
"""

import os
import secrets
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.gateway.clients import digest


def main() -> None:
    """Make the key and hand its digest back."""
    module = AnsibleModule(
        argument_spec={
            "client": {"type": "str", "required": True},
            "folder": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
    )
    key = f"glm-{secrets.token_urlsafe(32)}"
    key_id = secrets.token_hex(4)
    result = {"changed": True, "key_id": key_id, "sha256": digest(key)}
    if module.check_mode:
        module.exit_json(**result)
    if not module.params["folder"]:
        module.exit_json(key=key, **result)
    path = Path(module.params["folder"]) / f"{module.params['client']}-{key_id}.key"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f"{key}\n")
    except OSError as error:
        module.fail_json(msg=f"The key cannot be written. Found: {error}. What to do: choose "
                         "another folder with clients_key_folder.")  # fmt: skip
    module.exit_json(path=str(path), **result)


if __name__ == "__main__":
    main()
