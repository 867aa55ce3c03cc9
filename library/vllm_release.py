#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A release of vLLM: known by its inputs, gathered in one folder."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_release
version_added: "0.1.0"
short_description: Plan a release, or gather its files
description:
  - The resolved inputs give a key; a published release with that key needs no build.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: V(planned) writes nothing in any mode; V(assembled) does nothing.
    support: full
options:
  state:
    description:
      - V(planned) tells key, version and whether the release is published.
      - V(assembled) fills the folder O(dest).
      - V(retired) removes all but the O(keep) releases that were published last.
    type: str
    choices: [planned, assembled, retired]
    required: true
  current:
    description: Id of the release that stays. Needed for O(state=retired).
    type: str
  keep:
    description: How many releases stay, with the current one.
    type: int
    default: 3
  root:
    description: Folder of all artifacts of this host.
    type: path
    required: true
  source:
    description: Result C(source) of M(vllm_source).
    type: dict
  base_wheel:
    description: Result C(wheel) of M(vllm_wheel) for the base wheel.
    type: dict
  made_of:
    description: Commit that the base wheel was made of, where it is an ancestor of the ref.
    type: str
    default: ""
  variant:
    description: Word for the local version label, such as V(cpu).
    type: str
    default: ""
  settings:
    description: Everything else that decides the result, with python_version, platform and backend.
    type: dict
  find_links:
    description: Folders or URLs with more wheels.
    type: list
    elements: str
    default: []
  dest:
    description: Folder to fill. Replaced. Needed for O(state=assembled).
    type: path
  lock:
    description: Result C(lock) of M(python_lock).
    type: str
  wheels:
    description: Result C(wheels) of M(python_lock).
    type: list
    elements: path
    default: []
  tools:
    description: Result C(tools) of M(python_lock).
    type: list
    elements: path
    default: []
  report:
    description: What the steps reported; it goes into the provenance.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Plan the release
  vllm_release:
    state: planned
    root: /var/lib/glm-fleet/artifacts
    source: "{{ resolved.source }}"
    base_wheel: "{{ fetched.wheel }}"
    settings: {python_version: "3.12", platform: x86_64-manylinux_2_35, backend: TRITON_MLA_SPARSE}
"""

RETURN = r"""
retired:
  description: Ids of the releases that were removed, or would be.
  returned: for O(state=retired)
  type: list
  elements: str
release:
  description: The release that the inputs give.
  returned: for the other states
  type: dict
  contains:
    key: {description: Key of the inputs., type: str}
    version: {description: Version of the distribution., type: str}
    slug: {description: First part of the artifact's id., type: str}
    inputs: {description: The resolved inputs., type: dict}
artifact:
  description: The published artifact (id, path, bytes, manifest), empty when there is none.
  returned: for the other states
  type: dict
provenance:
  description: Provenance for the manifest.
  returned: for O(state=assembled), not in check mode
  type: dict
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.artifact.retention import retire_old
from ansible.module_utils.glm_fleet.artifact.store import Store
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.release.assembly import assemble, published_release
from ansible.module_utils.glm_fleet.release.recipe import make_recipe


def run(module: AnsibleModule) -> dict[str, Any]:
    """Plan or assemble, as the parameters say."""
    params = module.params
    if params["state"] == "retired":
        retired = retire_old(
            Store(Path(params["root"])),
            ["release"],
            keep=params["keep"],
            protected=[params["current"]],
            dry=module.check_mode,
        )
        ids = sorted(str(each["id"]) for each in retired.artifacts)
        return {"changed": bool(ids), "retired": ids}
    if not params["base_wheel"]:
        # In check mode the base wheel may still be on the index: no hash, so no key.
        return {"changed": True, "release": {}, "artifact": {}}
    recipe = make_recipe(
        source=params["source"],
        base_wheel=params["base_wheel"],
        made_of=params["made_of"],
        variant=params["variant"],
        settings=params["settings"],
        find_links=params["find_links"],
    )
    release = {
        "key": recipe.key,
        "version": recipe.version,
        "slug": recipe.slug,
        "inputs": recipe.inputs,
    }
    if params["state"] == "planned":
        store = Store(Path(params["root"]))
        manifest = published_release(store, recipe)
        artifact: dict[str, Any] = {}
        if manifest:
            artifact = {
                "id": manifest.id,
                "path": str(store.published_path("release", manifest.id)),
                "bytes": manifest.bytes,
                "manifest": manifest.as_dict(),
            }
        return {"changed": False, "release": release, "artifact": artifact}
    if module.check_mode:
        return {"changed": True, "release": release, "artifact": {}}
    provenance = assemble(
        Path(params["dest"]),
        recipe=recipe,
        lock=params["lock"],
        wheels=[Path(each) for each in params["wheels"]],
        tools=[Path(each) for each in params["tools"]],
        report=params["report"],
    )
    return {"changed": True, "release": release, "artifact": {}, "provenance": provenance}


def main() -> None:
    """Wire the recipe core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["planned", "assembled", "retired"],
            },
            "root": {"type": "path", "required": True},
            "current": {"type": "str"},
            "keep": {"type": "int", "default": 3},
            "source": {"type": "dict"},
            "base_wheel": {"type": "dict"},
            "made_of": {"type": "str", "default": ""},
            "variant": {"type": "str", "default": ""},
            "settings": {"type": "dict"},
            "find_links": {"type": "list", "elements": "str", "default": []},
            "dest": {"type": "path"},
            "lock": {"type": "str"},
            "wheels": {"type": "list", "elements": "path", "default": []},
            "tools": {"type": "list", "elements": "path", "default": []},
            "report": {"type": "dict", "default": {}},
        },
        required_if=[
            ("state", "planned", ["source", "base_wheel", "settings"]),
            ("state", "assembled", ["source", "base_wheel", "settings", "dest", "lock"]),
            ("state", "retired", ["current"]),
        ],
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module))
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
