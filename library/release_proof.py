#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Whether a release runs on the fleet's GPUs, found out without one."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_proof
version_added: "0.2.0"
short_description: Prove that a release runs on the fleet's GPUs
description:
  - Reads for which GPUs the libraries of the wheel hold code.
  - Compiles every Triton kernel that serving launches for the fleet's compute capabilities, and
    runs them in Triton's interpreter against a float32 reference. Both need torch and triton
    among O(wheels) or O(packages), and the Python of the release; no GPU.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Does nothing.
    support: full
options:
  wheel:
    description: The patched wheel of vLLM.
    type: path
    required: true
  wheels:
    description: Wheels of the release's lock.
    type: list
    elements: path
    default: []
  packages:
    description: Requirements beside the lock that a proof needs, such as V(triton==3.8.0).
    type: list
    elements: str
    default: []
  root:
    description: Folder for the environment of the proofs and their compile caches.
    type: path
    required: true
  dest:
    description: Folder for the unpacked source. Replaced, and removed afterwards.
    type: path
    required: true
  store:
    description: Folder with the downloaded wheels.
    type: path
    required: true
  backend:
    description: Attention backend whose kernels are proven. Empty proves the libraries alone.
    type: str
    default: TRITON_MLA_SPARSE
  compute_capabilities:
    description: Compute capabilities of the GPUs, as MAJOR.MINOR.
    type: list
    elements: str
    required: true
  shapes:
    description: Shapes of the model on one GPU that differ from those of GLM-5.2 on one of 8.
    type: dict
    default: {}
  python_version:
    description: Python of the release, major and minor.
    type: str
    required: true
  platform:
    description: Platform of the release.
    type: str
    required: true
  index_url:
    description: Package index for O(packages). That of the environment if empty.
    type: str
    default: ""
  index_urls:
    description: Package indexes that are searched before.
    type: list
    elements: str
    default: []
  find_links:
    description: Folders or URLs with more wheels.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Prove the release
  release_proof:
    wheel: /tmp/wheel/vllm-0.24.0+pr38476.g3740c02-cp38-abi3-manylinux_2_28_x86_64.whl
    wheels: "{{ locked.wheels }}"
    root: /var/lib/glm-fleet/proof
    dest: /tmp/source
    store: /var/lib/glm-fleet/downloads
    compute_capabilities: ["8.0"]
    python_version: "3.12"
    platform: x86_64-manylinux_2_35
"""

RETURN = r"""
proofs:
  description:
    - C(libraries), C(kernels) and C(conformance) with their figures. A proof that could not be
      made has C(reason) alone.
  returned: always, empty in check mode
  type: dict
kernels:
  description: Kernels that do not compile, with file, line and reason.
  returned: on failure of the kernel proof
  type: list
  elements: dict
conformance:
  description: Every case with what differed.
  returned: on failure of the conformance
  type: list
  elements: dict
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.release.conformance import prove_conformance
from ansible.module_utils.glm_fleet.release.installer import run_installer
from ansible.module_utils.glm_fleet.release.kernel_proof import prove_kernels
from ansible.module_utils.glm_fleet.release.library_proof import prove_libraries
from ansible.module_utils.glm_fleet.release.proof.environment import (
    can_prove,
    ensure,
    unpack_source,
)
from ansible.module_utils.glm_fleet.release.wheel_lock import Packages, WheelTarget


def run(params: dict[str, Any]) -> dict[str, Any]:
    """Prove libraries, kernels and what they compute."""
    wheel, capabilities = Path(params["wheel"]), params["compute_capabilities"]
    proofs: dict[str, Any] = {"libraries": prove_libraries(wheel, capabilities)}
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    wheels = [Path(each) for each in params["wheels"]] + _download(params, uv)
    if not params["backend"] or not can_prove(wheels):
        reason = "no torch and triton in the lock" if params["backend"] else "no backend is named"
        return {"changed": True, "proofs": {**proofs, "kernels": {"reason": reason}}}
    environment = ensure(
        Path(params["root"]),
        wheels=wheels,
        python_version=params["python_version"],
        uv=uv,
        runner=run_installer,
    )
    tree = unpack_source(wheel, Path(params["dest"]))
    try:
        proofs["kernels"] = prove_kernels(
            environment,
            tree,
            backend=params["backend"],
            version=wheel.name.split("-")[1],
            capabilities=capabilities,
            shapes={name: int(value) for name, value in params["shapes"].items()},
        )
        proofs["conformance"] = prove_conformance(
            environment, tree, backend=params["backend"], capability=capabilities[0]
        )
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return {"changed": True, "proofs": proofs}


def _download(params: dict[str, Any], uv: str) -> list[Path]:
    if not params["packages"]:
        return []
    packages = Packages(
        runner=run_installer,
        uv=uv,
        python=sys.executable,
        target=WheelTarget(params["python_version"], params["platform"]),
        store=Path(params["store"]),
        index_url=params["index_url"],
        index_urls=tuple(params["index_urls"]),
        find_links=tuple(params["find_links"]),
    )
    locked = packages.compile(params["packages"], with_dependencies=False)
    return list(packages.download(locked).values())


def main() -> None:
    """Wire the proofs to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "wheel": {"type": "path", "required": True},
            "wheels": {"type": "list", "elements": "path", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
            "root": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "store": {"type": "path", "required": True},
            "backend": {"type": "str", "default": "TRITON_MLA_SPARSE"},
            "compute_capabilities": {"type": "list", "elements": "str", "required": True},
            "shapes": {"type": "dict", "default": {}},
            "python_version": {"type": "str", "required": True},
            "platform": {"type": "str", "required": True},
            "index_url": {"type": "str", "default": "", "no_log": True},
            "index_urls": {"type": "list", "elements": "str", "default": []},
            "find_links": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True, proofs={})
    try:
        module.exit_json(**run(module.params))
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
