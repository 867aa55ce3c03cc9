#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The model's shards in a node's page cache, before it is drained."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_pages
version_added: "0.2.0"
short_description: Bring a model into the page cache of a node that still serves
description:
  - Reads what is not in memory yet, at a bounded rate, so that the start that follows does not
    wait for the disk.
  - Does nothing, or ends early, where the node's memory does not allow for it or a file cannot
    be read. That is no failure.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Reads nothing.
    support: full
options:
  path:
    description: Folder of the model.
    type: path
    required: true
  rate:
    description: Most bytes a second that are read.
    type: int
    default: 1000000000
  reserve:
    description: Bytes of memory that stay available to others. A tenth of the memory if 0.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Have the weights in memory before the node is drained
  model_pages:
    path: /srv/glm-fleet/artifacts/model/glm-5.2-0123456789ab
"""

RETURN = r"""
pages:
  description:
    - C(cached_bytes) that were in memory, C(read_bytes) from the disk in C(seconds), their
      C(bytes_per_second), and C(stopped) with the reason if it ended early.
  returned: always
  type: dict
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.serving import pages


def main() -> None:
    """Wire the page cache's core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "rate": {"type": "int", "default": 1_000_000_000},
            "reserve": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, pages=pages.Warmed(stopped="check mode").as_dict())
    try:
        found = pages.warm(
            pages.shards(Path(module.params["path"])),
            rate=max(module.params["rate"], 1),
            reserve=module.params["reserve"] or pages.read_memory().total // 10,
        )
        module.exit_json(changed=False, pages=found.as_dict())
    except OSError as error:
        # What cannot be read is for the start to say, on a node that is drained.
        module.exit_json(changed=False, pages=pages.Warmed(stopped=str(error)).as_dict())


if __name__ == "__main__":
    main()
