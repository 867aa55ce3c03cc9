#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The CUDA build of vLLM that every driver of the fleet can run."""

from __future__ import annotations

DOCUMENTATION = r"""
module: cuda_variant
version_added: "0.1.0"
short_description: Choose the CUDA build that every node can run
description:
  - Takes the newest variant whose least driver no node falls below.
  - Refuses a fleet with a driver that is too old for all of them, before anything is
    downloaded.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Writes nothing in any mode.
    support: full
options:
  variants:
    description: Builds to choose from.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name, such as V(cu130).
        type: str
        required: true
      min_driver:
        description: Oldest driver that runs it.
        type: str
        required: true
      base_wheel:
        description: C(name==version), a path, or a URL of a wheel.
        type: str
        required: true
      index_urls:
        description: Package indexes beside the first one.
        type: list
        elements: str
        default: []
      constraints:
        description: Requirements beside those of vLLM.
        type: list
        elements: str
        default: []
  drivers:
    description: Driver versions by host. Empty ones do not count.
    type: dict
    default: {}
  driver:
    description: Driver version that counts when O(drivers) has none.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Choose the CUDA build
  cuda_variant:
    variants:
      - {name: cu130, min_driver: "580", base_wheel: vllm==0.23.0}
    drivers:
      gpu01: 580.159.04
"""

RETURN = r"""
variant:
  description: The variant that was chosen, as given.
  returned: always
  type: dict
reason:
  description: Why it was chosen.
  returned: always
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.errors import FleetError
from ansible.module_utils.glm_fleet.variant import choose_variant


def main() -> None:
    """Wire the choice to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "variants": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "min_driver": {"type": "str", "required": True},
                    "base_wheel": {"type": "str", "required": True},
                    "index_urls": {"type": "list", "elements": "str", "default": []},
                    "constraints": {"type": "list", "elements": "str", "default": []},
                },
            },
            "drivers": {"type": "dict", "default": {}},
            "driver": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        choice = choose_variant(params["variants"], params["drivers"], params["driver"])
    except FleetError as error:
        module.fail_json(**error.as_fail())
    module.exit_json(changed=False, variant=dict(choice.variant), reason=choice.reason)


if __name__ == "__main__":
    main()
