#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A lock of exact wheels for the nodes, and the wheels."""

from __future__ import annotations

DOCUMENTATION = r"""
module: python_lock
version_added: "0.1.0"
short_description: Resolve requirements as of a date and download the wheels
description:
  - Resolves for the Python and the platform of the nodes, not for this host.
  - Only wheels are taken, and every one is checked against the hash of the lock.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Does nothing.
    support: full
options:
  requirements:
    description: What the environment of a node has to hold.
    type: list
    elements: str
    required: true
  tools:
    description: Requirements that are locked and downloaded apart from the others.
    type: list
    elements: str
    default: []
  store:
    description: Folder of downloaded wheels.
    type: path
    required: true
  python_version:
    description: Python of the nodes, such as V(3.12).
    type: str
    required: true
  platform:
    description: Platform of the nodes, such as V(x86_64-manylinux_2_35).
    type: str
    required: true
  exclude_newer:
    description: Date; files that the index got later do not count.
    type: str
    default: ""
  index_url:
    description: Package index. That of the environment if empty.
    type: str
    default: ""
  index_urls:
    description: Package indexes beside the first one.
    type: list
    elements: str
    default: []
  find_links:
    description: Folders or URLs with more wheels.
    type: list
    elements: str
    default: []
  pinned:
    description:
      - A lock with one hash each that the result has to be, but for the package O(apart). Empty for
        none.
    type: str
    default: ""
  apart:
    description: Package that is made here and not compared with O(pinned).
    type: str
    default: vllm
  expected:
    description: Versions that the lock must have, by name. An empty one is only reported.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Lock and download the wheels of a release
  python_lock:
    requirements: ["vllm==0.24.0+pr38476.g3740c02", "transformers>=5.9.0"]
    store: /var/lib/glm-fleet/downloads
    python_version: "3.12"
    platform: x86_64-manylinux_2_35
    exclude_newer: "2026-07-07"
    expected: {torch: 2.11.0, triton: 3.6.0}
"""

RETURN = r"""
lock:
  description: The lock, with the one hash of each wheel.
  returned: always, empty in check mode
  type: str
wheels:
  description: Paths of the wheels.
  returned: always, empty in check mode
  type: list
  elements: str
tools:
  description: Paths of the wheels of O(tools).
  returned: always, empty in check mode
  type: list
  elements: str
pins:
  description: Versions found for O(expected).
  returned: always, empty in check mode
  type: dict
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.release.installer import run_installer
from ansible.module_utils.glm_fleet.release.wheel_lock import (
    Packages,
    WheelTarget,
    check_pins,
    final_lock,
    parse_lock,
    pin,
)


def run(params: dict[str, Any]) -> dict[str, Any]:
    """Resolve, check the pins before anything is downloaded, download."""
    packages = Packages(
        runner=run_installer,
        uv=shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv",
        python=sys.executable,
        target=WheelTarget(params["python_version"], params["platform"]),
        store=Path(params["store"]),
        exclude_newer=params["exclude_newer"],
        index_url=params["index_url"],
        index_urls=tuple(params["index_urls"]),
        find_links=tuple(params["find_links"]),
    )
    locked = packages.compile(params["requirements"])
    pins = check_pins(locked, {name: str(each or "") for name, each in params["expected"].items()})
    if params["pinned"]:
        locked = pin(locked, parse_lock(params["pinned"]), apart=params["apart"])
    wheels = packages.download(locked)
    tools: list[Path] = []
    if params["tools"]:
        # The tool is ours and pinned exactly, so the date of the release does not bind it.
        now = Packages(**{**vars(packages), "exclude_newer": ""})
        tools = list(now.download(now.compile(params["tools"], with_dependencies=False)).values())
    return {
        "changed": True,
        "lock": final_lock(locked, wheels),
        "wheels": sorted(str(path) for path in wheels.values()),
        "tools": sorted(str(path) for path in tools),
        "pins": pins,
    }


def main() -> None:
    """Wire the lock core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "requirements": {"type": "list", "elements": "str", "required": True},
            "tools": {"type": "list", "elements": "str", "default": []},
            "store": {"type": "path", "required": True},
            "python_version": {"type": "str", "required": True},
            "platform": {"type": "str", "required": True},
            "exclude_newer": {"type": "str", "default": ""},
            "index_url": {"type": "str", "default": "", "no_log": True},
            "index_urls": {"type": "list", "elements": "str", "default": []},
            "find_links": {"type": "list", "elements": "str", "default": []},
            "pinned": {"type": "str", "default": ""},
            "apart": {"type": "str", "default": "vllm"},
            "expected": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True, lock="", wheels=[], tools=[], pins={})
    try:
        module.exit_json(**run(module.params))
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
