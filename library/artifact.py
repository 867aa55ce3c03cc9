#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Artifacts on one host: made of a folder and published, verified, retired."""

from __future__ import annotations

DOCUMENTATION = r"""
module: artifact
version_added: "0.1.0"
short_description: Publish, verify or retire artifacts
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
      - V(published) makes an artifact of the folder O(source).
      - V(verified) looks at the artifacts that O(links) lead to and names every file that is
        missing, truncated, changed, foreign, or open to changes by others.
      - V(proven) hashes the artifact O(kind) O(id) before it is used, but for files that are the
        very ones that were hashed before. One that is damaged is refused.
      - V(retired) removes what is above O(keep) of each kind, the oldest first, and what was left
        behind on its way here more than a day ago.
    type: str
    choices: [published, verified, proven, retired]
    required: true
  root:
    description: Folder of all artifacts of this host.
    type: path
    required: true
  kind:
    description: Kind of the artifact. Both kinds if not given, for V(verified) and V(retired).
    type: str
    choices: [release, model]
  id:
    description: Id of the artifact, for V(proven).
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
  links:
    description: Symbolic links to what is active, by kind. Their last part is the id.
    type: dict
    default: {}
  deep:
    description:
      - Read and hash every byte for O(state=verified). An artifact that is damaged then counts as
        not published, so that the next run fetches the damaged files again.
    type: bool
    default: false
  keep:
    description: How many artifacts of a kind stay, with those that are protected or coming.
    type: int
    default: 2
  previous:
    description: JSON file with the ids (release, model) that a roll-back needs, if it exists.
    type: path
    default: /etc/glm-fleet/previous.json
  environments:
    description: With O(deep), folder of the environments; that of the active release is read too.
    type: path
  protect:
    description: Ids that stay in any case, beside those of O(links) and O(previous).
    type: list
    elements: str
    default: []
  coming:
    description: Ids that are being brought here now. They count as if they were here.
    type: list
    elements: str
    default: []
  companions:
    description: Folders whose subfolder of the id goes with a retired release.
    type: list
    elements: path
    default: []
  time_limit:
    description: Seconds after which the action plugin gives up.
    type: int
    default: 172800
  progress_file:
    description: File that says how far it has come, for the action plugin.
    type: path
"""

EXAMPLES = r"""
- name: Read every byte of what is active
  artifact:
    state: verified
    deep: true
    root: /srv/glm-fleet/artifacts
    links:
      release: /opt/glm-fleet/current
      model: /srv/glm-fleet/model

- name: Keep two of each kind
  artifact:
    state: retired
    root: /srv/glm-fleet/artifacts
    keep: 2
    links:
      release: /opt/glm-fleet/current
      model: /srv/glm-fleet/model
    companions: [/opt/glm-fleet/releases, /var/cache/glm-fleet]
"""

RETURN = r"""
verified:
  description: One entry for each of O(links) that leads somewhere.
  returned: for V(verified)
  type: list
  elements: dict
  contains:
    kind: {description: Kind., type: str}
    id: {description: Id., type: str}
    bytes: {description: Bytes that were hashed., type: int}
    damage: {description: What is wrong, with path, reason and found., type: list, elements: dict}
retired:
  description: Artifacts that were removed, or would be, with kind, id and bytes.
  returned: for V(retired)
  type: list
  elements: dict
folders:
  description: Other folders and files that were removed, or would be.
  returned: for V(retired)
  type: list
  elements: str
freed_bytes:
  description: Size of the retired artifacts in bytes.
  returned: for V(retired)
  type: int
protected:
  description: Ids that are active here or that a roll-back needs.
  returned: for V(retired)
  type: list
  elements: str
artifact:
  description: The artifact as it is (or would be) on this host.
  returned: for V(published)
  type: dict
  contains:
    kind: {description: Kind., type: str}
    id: {description: Id., type: str}
    path: {description: Published path., type: str}
    bytes: {description: Size of all files in bytes., type: int}
    manifest: {description: The manifest., type: dict}
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.artifact.hashes import Damage, make_manifest
from ansible.module_utils.glm_fleet.artifact.manifest import KINDS, Manifest, load_manifest
from ansible.module_utils.glm_fleet.artifact.retention import PREVIOUS, protected_by, retire_old
from ansible.module_utils.glm_fleet.artifact.store import Store
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.core.progress import Meter, ProgressFile
from ansible.module_utils.glm_fleet.release.installed import find_damage, note_damage
from ansible.module_utils.glm_fleet.serving.record import START_RECORD


def _describe(store: Store, manifest: Manifest) -> dict[str, Any]:
    return {
        "kind": manifest.kind,
        "id": manifest.id,
        "path": str(store.published_path(manifest.kind, manifest.id)),
        "bytes": manifest.bytes,
        "manifest": manifest.as_dict(),
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


def _verify(
    store: Store, kind: str, identifier: str, deep: bool, meter: Meter
) -> tuple[dict[str, Any], Manifest | None]:
    folder = store.published_path(kind, identifier)
    result = {"kind": kind, "id": identifier, "bytes": 0}
    try:
        manifest = load_manifest(folder)
    except FleetError as error:
        damage = [Damage("manifest.json", "missing", error.found)]
        return {**result, "damage": [vars(each) for each in damage]}, None
    meter.what, meter.total = f"verifying the {kind}", manifest.bytes if deep else 0
    meter.start(0)
    damage = store.verify(manifest, deep=deep, advance=meter.add)
    result["bytes"] = manifest.bytes if deep else 0
    return {**result, "damage": [vars(each) for each in damage]}, manifest


def _verify_environment(root: Path, module: AnsibleModule) -> list[dict[str, Any]]:
    link = Path(module.params["links"].get("release", ""))
    home = root / link.readlink().name if link.is_symlink() else None
    if home is None or not home.is_dir():
        return []
    damage = find_damage(home, deep=True)
    if not module.check_mode:
        note_damage(home, damage)
    return [
        {
            "kind": "environment",
            "id": home.name,
            "bytes": 0,
            "damage": [vars(each) for each in damage],
        }
    ]


def _verify_active(store: Store, module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    results = []
    distrusted = False
    path = Path(params["progress_file"]) if params["progress_file"] else None
    if params["deep"]:
        # The service on this host comes first.
        os.nice(10)
    with ProgressFile(path, Meter("verifying")) as meter:
        for kind in [params["kind"]] if params["kind"] else KINDS:
            link = Path(params["links"].get(kind, ""))
            if not link.is_symlink():
                continue
            result, manifest = _verify(store, kind, link.readlink().name, params["deep"], meter)
            results.append(result)
            if manifest and params["deep"] and result["damage"] and not module.check_mode:
                distrusted |= store.distrust(manifest)
        if params["deep"] and params["environments"]:
            results += _verify_environment(Path(params["environments"]), module)
    return {"changed": distrusted, "verified": results}


def _prove(store: Store, params: dict[str, Any]) -> dict[str, Any]:
    path = Path(params["progress_file"]) if params["progress_file"] else None
    with ProgressFile(path, Meter(f"proving the {params['kind']}")) as meter:
        meter.start(0)
        store.require_proven(params["kind"], params["id"], meter.add)
    return {"changed": False}


def _retire(store: Store, module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    try:
        protected = protected_by(
            map(Path, params["links"].values()), Path(params["previous"]), START_RECORD
        )
    except FleetError as error:
        # Nothing goes, here and on fetchers: no reason to stop the run.
        module.warn(str(error))
        ids = [each.id for kind in KINDS for each in store.published(kind)]
        nothing = {"retired": [], "folders": [], "freed_bytes": 0, "diff": {}}
        return {"changed": False, "protected": sorted(ids), **nothing}
    kinds = [params["kind"]] if params["kind"] else KINDS
    retired = retire_old(
        store,
        kinds,
        keep=params["keep"],
        protected={*protected, *params["protect"]},
        coming=[each for each in params["coming"] if each],
        companions=[Path(each) for each in params["companions"]],
        dry=module.check_mode,
    )
    gone = [f"{each['kind']}/{each['id']}" for each in retired.artifacts] + retired.folders
    return {
        "changed": bool(gone),
        "retired": retired.artifacts,
        "folders": retired.folders,
        "freed_bytes": retired.bytes,
        "protected": sorted(protected),
        "diff": {"before": "".join(f"{each}\n" for each in gone), "after": ""},
    }


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do what the parameters ask for and return the module's result."""
    params = module.params
    store = Store(Path(params["root"]))
    state = params["state"]
    if state == "verified":
        return _verify_active(store, module)
    if state == "proven":
        return _prove(store, params)
    if state == "retired":
        return _retire(store, module)
    return _publish_folder(store, params, module.check_mode)


def main() -> None:
    """Wire the artifact core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["published", "verified", "proven", "retired"],
            },
            "root": {"type": "path", "required": True},
            "kind": {"type": "str", "choices": ["release", "model"]},
            "id": {"type": "str"},
            "source": {"type": "path"},
            "slug": {"type": "str"},
            "provenance": {"type": "dict", "default": {}},
            "links": {"type": "dict", "default": {}},
            "deep": {"type": "bool", "default": False},
            "keep": {"type": "int", "default": 2},
            "previous": {"type": "path", "default": PREVIOUS},
            "environments": {"type": "path"},
            "protect": {"type": "list", "elements": "str", "default": []},
            "coming": {"type": "list", "elements": "str", "default": []},
            "companions": {"type": "list", "elements": "path", "default": []},
            "time_limit": {"type": "int", "default": 172_800},
            "progress_file": {"type": "path"},
        },
        required_if=[
            ("state", "published", ["kind", "source", "slug"]),
            ("state", "proven", ["kind", "id"]),
        ],
        supports_check_mode=True,
    )
    # What is published is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    store = Store(Path(module.params["root"]))
    # Retiring takes the lock by itself, and leaves alone what others are at work on.
    reads = module.params["state"] in ("verified", "proven", "retired")
    writes = not module.check_mode and not reads
    try:
        with store.lock(module.params["kind"]) if writes else contextlib.nullcontext():
            result = run(module)
        module.exit_json(**result)
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
