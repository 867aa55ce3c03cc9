#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.node.support."""

from __future__ import annotations

DOCUMENTATION = r"""
module: support_files
version_added: "0.2.0"
short_description: Gathers what somebody who helps from afar needs to see of a host
description:
  - Journals, incidents, deployments, units, hardware and disks, as texts without secrets.
  - Changes nothing.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Gathers the same.
    support: full
options: {}
"""

EXAMPLES = r"""
- name: Gather
  support_files:
  register: gathered
"""

RETURN = r"""
files:
  description: Name and text of each, compressed by zlib and in base64.
  returned: success
  type: dict
"""

import base64
import zlib

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.node.support import gather


def main() -> None:
    """Gather and return."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    files = {
        name: base64.b64encode(zlib.compress(text.encode())).decode()
        for name, text in gather(run_program).items()
    }
    module.exit_json(changed=False, files=files)


if __name__ == "__main__":
    main()
