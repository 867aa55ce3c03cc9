#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Artifacts on one host: made, planned, fetched, published, activated, retired."""

from __future__ import annotations

DOCUMENTATION = r"""
module: artifact
version_added: "0.1.0"
short_description: Publish, fetch, activate or retire an artifact
description:
  - An artifact is an immutable folder, named by its content, with a C(manifest.json).
  - Nothing half-arrived is ever visible under the published path.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells what would change and changes nothing.
    support: full
options:
  state:
    description:
      - V(published) makes an artifact of the folder O(source), or verifies what was staged
        for O(manifest), and publishes it.
      - V(planned) only tells which files are still missing on this host.
      - V(staged) opens the staging folder of O(manifest) for the user who connects.
      - V(fetched) fetches the missing files from O(sources) and publishes.
      - V(active) points O(link) at the published artifact O(id).
      - V(absent) retires the artifact O(id).
    type: str
    choices: [published, planned, staged, fetched, active, absent]
    required: true
  root:
    description: Folder of all artifacts of this host.
    type: path
    required: true
  kind:
    description: Kind of the artifact.
    type: str
    choices: [release, model]
    required: true
  manifest:
    description: The manifest of the artifact, as the producer made it.
    type: dict
  id:
    description: Id of a published artifact.
    type: str
  source:
    description: Finished folder to make an artifact of. It moves to its place below O(root).
    type: path
  slug:
    description: First part of the id of a new artifact.
    type: str
  provenance:
    description: Where a new artifact came from, kept in its manifest.
    type: dict
    default: {}
  sources:
    description: URLs of hosts that offer the artifact, as C(http://address:port).
    type: list
    elements: str
    default: []
  token:
    description: Secret that the offering hosts ask for.
    type: str
  link:
    description: Symbolic link to switch.
    type: path
  target:
    description: What O(link) points at. The published artifact itself if not given.
    type: path
  owner:
    description:
      - User who may write into the staging folder, for O(state=staged). The user who became root
        by sudo if not given.
    type: str
"""

EXAMPLES = r"""
- name: Fetch what is missing and publish it
  artifact:
    state: fetched
    root: /srv/glm-fleet/artifacts
    kind: model
    manifest: "{{ model_manifest }}"
    sources: ["http://192.0.2.11:8009"]
    token: "{{ token }}"

- name: Switch to a model
  artifact:
    state: active
    root: /srv/glm-fleet/artifacts
    kind: model
    id: tiny-0123456789ab
    link: /srv/glm-fleet/model
"""

RETURN = r"""
artifact:
  description: The artifact as it is (or would be) on this host.
  returned: for all states but V(absent)
  type: dict
  contains:
    kind: {description: Kind., type: str}
    id: {description: Id., type: str}
    path: {description: Published path., type: str}
    bytes: {description: Size of all files in bytes., type: int}
    manifest: {description: The manifest., type: dict}
missing:
  description: Files that this host lacks, with path, size in bytes and sha256.
  returned: for V(planned), V(staged) and V(fetched)
  type: list
  elements: dict
published:
  description: Whether the artifact is published on this host and every file has its size.
  returned: for V(planned), V(staged) and V(fetched)
  type: bool
missing_bytes:
  description: Size of the missing files in bytes.
  returned: for V(planned), V(staged) and V(fetched)
  type: int
staging:
  description: Folder where the missing files belong.
  returned: for V(planned) and V(staged)
  type: str
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.artifact import (
    Manifest,
    Store,
    activate,
    load_manifest,
    make_manifest,
    parse_manifest,
)
from ansible.module_utils.glm_fleet.errors import FleetError
from ansible.module_utils.glm_fleet.transport import fetch_missing


def _describe(store: Store, manifest: Manifest) -> dict[str, Any]:
    return {
        "kind": manifest.kind,
        "id": manifest.id,
        "path": str(store.published_path(manifest.kind, manifest.id)),
        "bytes": manifest.bytes,
        "manifest": manifest.as_dict(),
    }


def _plan(store: Store, manifest: Manifest) -> dict[str, Any]:
    missing = store.missing(manifest)
    return {
        "artifact": _describe(store, manifest),
        "published": store.is_published(manifest),
        "missing": [vars(entry) for entry in missing],
        "missing_bytes": sum(entry.size for entry in missing),
        "staging": str(store.staging_path(manifest.kind, manifest.id)),
    }


def _publish_folder(store: Store, params: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    source = Path(params["source"])
    described = {key: params[key] for key in ("kind", "slug", "provenance")}
    if check_mode:
        manifest = make_manifest(source, **described)
        changed = not store.is_published(manifest)
    else:
        before = {each.id for each in store.published(params["kind"])}
        manifest = store.adopt(source, **described)
        changed = manifest.id not in before
    return {"changed": changed, "artifact": _describe(store, manifest)}


def _open_staging(
    store: Store, manifest: Manifest, owner: str | None, check_mode: bool
) -> dict[str, Any]:
    plan = _plan(store, manifest)
    if not plan["published"] and not check_mode:
        staging = store.stage(manifest)
        folders = {staging, *((staging / each["path"]).parent for each in plan["missing"])}
        for folder in sorted(folders):
            folder.mkdir(parents=True, exist_ok=True)
        # The connection's user writes here; publishing takes the folder back.
        owner = owner or os.environ.get("SUDO_USER", "")
        for path in [staging, *staging.rglob("*")] if owner else []:
            shutil.chown(path, owner)
    return {"changed": False, **plan}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do what the parameters ask for and return the module's result."""
    params = module.params
    store = Store(Path(params["root"]))
    state = params["state"]
    if state == "absent":
        path = store.published_path(params["kind"], params["id"])
        changed = path.is_dir() if module.check_mode else store.retire(params["kind"], params["id"])
        return {"changed": changed}
    if state == "active":
        folder = store.published_path(params["kind"], params["id"])
        link, target = Path(params["link"]), Path(params["target"] or folder)
        before = str(link.readlink()) if link.is_symlink() else ""
        changed = before != str(target) if module.check_mode else activate(link, target)
        return {
            "changed": changed,
            "artifact": _describe(store, load_manifest(folder)) if folder.is_dir() else {},
            "diff": {"before": f"{link} -> {before}\n", "after": f"{link} -> {target}\n"},
        }
    if state == "published" and params["source"]:
        return _publish_folder(store, params, module.check_mode)
    if not params["manifest"]:
        raise FleetError(
            "The artifact to work on is not named",
            expected=f"manifest with state={state}",
            found="no manifest",
        )
    manifest = parse_manifest(params["manifest"])
    if state == "planned":
        return {"changed": False, **_plan(store, manifest)}
    if state == "staged":
        return _open_staging(store, manifest, params["owner"], module.check_mode)
    changed = not store.is_published(manifest)
    plan = _plan(store, manifest)
    if changed and not module.check_mode:
        if state == "fetched":
            fetch_missing(store, manifest, params["sources"], params["token"] or "")
        store.publish(manifest)
    return {"changed": changed, **plan}


def main() -> None:
    """Wire the artifact core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["published", "planned", "staged", "fetched", "active", "absent"],
            },
            "root": {"type": "path", "required": True},
            "kind": {"type": "str", "required": True, "choices": ["release", "model"]},
            "manifest": {"type": "dict"},
            "id": {"type": "str"},
            "source": {"type": "path"},
            "slug": {"type": "str"},
            "provenance": {"type": "dict", "default": {}},
            "sources": {"type": "list", "elements": "str", "default": []},
            "token": {"type": "str", "no_log": True},
            "link": {"type": "path"},
            "target": {"type": "path"},
            "owner": {"type": "str"},
        },
        required_if=[
            ("state", "active", ["id", "link"]),
            ("state", "absent", ["id"]),
        ],
        required_together=[("source", "slug")],
        supports_check_mode=True,
    )
    # What is published is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    store = Store(Path(module.params["root"]))
    writes = not module.check_mode and module.params["state"] != "planned"
    try:
        with store.lock(module.params["kind"]) if writes else contextlib.nullcontext():
            result = run(module)
        module.exit_json(**result)
    except FleetError as error:
        module.fail_json(**error.as_fail())


if __name__ == "__main__":
    main()
