#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A model from the hub or from a folder, at one commit, as a verified artifact."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hub_snapshot
version_added: "0.1.0"
short_description: Fetch or adopt a model at one commit and publish it as an artifact
description:
  - Fetches with the client of huggingface_hub, which has to be importable on the host (see
    O(client)), and goes on where an earlier run stopped, also within a file.
  - Compares every file with the SHA-256 (or git object id) of the hub after it lies on the
    disk, fetches a corrupt file once more, and publishes only what is proven.
  - A model that is published already costs no network at all.
  - An action plugin of this name shows the progress while it runs.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells whether the model would be fetched. The hub is not asked.
    support: full
options:
  state:
    description:
      - V(found) only looks on this host for the published model.
      - V(planned) gives the whole manifest before the large files are there. Resolves the
        revision, records its commit on this host and fetches the small files.
      - V(present) fetches what is missing. Publishes, unless O(files) is given.
    type: str
    choices: [found, planned, present]
    default: present
  repository:
    description: Name of the repository on the hub, as C(owner/name).
    type: str
    required: true
  revision:
    description:
      - Commit id of 40 hexadecimal digits, or a branch or tag.
      - A branch is resolved once. Later runs keep that commit until another revision is named.
    type: str
    required: true
  endpoint:
    description: URL of the hub.
    type: str
    default: https://huggingface.co
  mirrors:
    description:
      - URLs that are tried in this order while O(endpoint) cannot be reached. They get the token
        too, where they are asked over https.
    type: list
    elements: str
    default: []
  proxy:
    description: URL of a proxy for the hub. C(no_proxy) of the environment is respected.
    type: str
  token:
    description: Access token. C(HF_TOKEN) of the environment is used if not given.
    type: str
  token_in_clear_text:
    description: Give the token to endpoints of plain http too, where everybody on the way reads it.
    type: bool
    default: false
  include:
    description: Patterns of files to fetch. Every file if empty.
    type: list
    elements: str
    default: []
  exclude:
    description: Patterns of files not to fetch.
    type: list
    elements: str
    default: []
  files:
    description:
      - Paths to fetch, for a host that fetches a part. Each lies in the staging folder under its
        name when it is complete and proven. Nothing is published.
    type: list
    elements: str
  manifest:
    description: The manifest that O(state=planned) gave on another host, instead of a plan here.
    type: dict
  client:
    description: Folder on this host that huggingface_hub can be imported from.
    type: path
  folder:
    description:
      - Folder on this host with the files of the model. They are verified and linked or copied
        instead of fetched; what is not right is fetched if the hub can be reached.
      - Where the hub cannot be reached, C(manifest.json) in the folder decides, or the records
        (C(.cache)) that C(hf download --local-dir) leaves there.
    type: path
  folder_manifest:
    description: Manifest of the model in O(folder) on this host. The hub is not asked then.
    type: path
  root:
    description: Folder of all artifacts of this host.
    type: path
    required: true
  reserve_bytes:
    description: Bytes of free disk that have to be left.
    type: int
    default: 5000000000
  workers:
    description: Number of files fetched at the same time.
    type: int
    default: 8
  patience:
    description:
      - Seconds without progress for which a hub that does not answer, or that asks to wait, is
        asked again.
    type: int
    default: 300
  time_limit:
    description: Seconds after which the action plugin gives up. Running again continues.
    type: int
    default: 172800
  progress_file:
    description: File that says how far it has come, for the action plugin.
    type: path
"""

EXAMPLES = r"""
- name: Fetch the weights
  hub_snapshot:
    repository: cyankiwi/GLM-5.2-AWQ-INT4
    revision: 0123456789abcdef0123456789abcdef01234567
    root: /srv/glm-fleet/artifacts

- name: Take them from a disk
  hub_snapshot:
    repository: cyankiwi/GLM-5.2-AWQ-INT4
    revision: 0123456789abcdef0123456789abcdef01234567
    folder: /mnt/disk/GLM-5.2-AWQ-INT4
    root: /srv/glm-fleet/artifacts
"""

RETURN = r"""
published:
  description: Whether the model is published on this host now.
  returned: always
  type: bool
artifact:
  description: The artifact. Empty when nothing is known of it yet.
  returned: always
  type: dict
  contains:
    kind: {description: Always V(model)., type: str}
    id: {description: Id., type: str}
    path: {description: Published path., type: str}
    bytes: {description: Size of all files in bytes., type: int}
    manifest: {description: The manifest., type: dict}
missing:
  description: Files that this host lacks, with path, size in bytes and sha256.
  returned: always
  type: list
  elements: dict
missing_bytes:
  description: Size of the missing files in bytes.
  returned: always
  type: int
staging:
  description: Folder where the missing files belong. Empty when the artifact is not known.
  returned: always
  type: str
commit:
  description: Commit id that the revision stands for. Empty when it is not known yet.
  returned: always
  type: str
"""

import os
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.artifact.manifest import FileEntry, Manifest, parse_manifest
from ansible.module_utils.glm_fleet.artifact.store import Store
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.core.progress import Meter, ProgressFile
from ansible.module_utils.glm_fleet.model.adopt import adopt, damaged_folder, folder_manifest
from ansible.module_utils.glm_fleet.model.client import HubClient, Patience, UnreachableError
from ansible.module_utils.glm_fleet.model.fetcher import Fetcher, known_plan, published_model
from ansible.module_utils.glm_fleet.model.pins import pin, pinned
from ansible.module_utils.glm_fleet.model.source import Source, check_endpoint


def _missing(
    store: Store, manifest: Manifest, meter: Meter | None, names: list[str] | None = None
) -> list[FileEntry]:
    """Return what is missing; files that lie here without being proven are hashed."""
    if meter is None:
        return store.missing(manifest, names=names)
    meter.what, meter.total = "verifying what is there", manifest.bytes
    meter.start(0)
    return store.missing(manifest, names=names, advance=meter.add)


def _result(
    store: Store, source: Source, manifest: Manifest | None, meter: Meter | None = None
) -> dict[str, Any]:
    if not manifest:
        return {
            "published": False,
            "artifact": {},
            "missing": [],
            "missing_bytes": 0,
            "staging": "",
            "commit": pinned(store, source),
        }
    missing = _missing(store, manifest, meter)
    return {
        "published": store.is_published(manifest),
        "artifact": {
            "kind": manifest.kind,
            "id": manifest.id,
            "path": str(store.published_path(manifest.kind, manifest.id)),
            "bytes": manifest.bytes,
            "manifest": manifest.as_dict(),
        },
        "missing": [vars(entry) for entry in missing],
        "missing_bytes": sum(entry.size for entry in missing),
        "staging": str(store.staging_path(manifest.kind, manifest.id)),
        "commit": str(manifest.provenance["revision"]),
    }


def _use_environment(module: AnsibleModule) -> None:
    """Set what the client takes from its environment; a command line would show it."""
    if module.params["client"]:
        sys.path.append(module.params["client"])
    os.environ.update(
        {
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
    )
    proxy = module.params["proxy"]
    if proxy:
        password = urllib.parse.urlsplit(proxy).password
        if password:
            module.no_log_values.update({password, urllib.parse.unquote(password)})
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            os.environ[name] = proxy


def _fetcher(
    module: AnsibleModule, store: Store, source: Source, meter: Meter, *, once: bool = False
) -> Fetcher:
    params = module.params
    return Fetcher(
        store=store,
        source=source,
        client=HubClient(
            params["token"] or os.environ.get("HF_TOKEN") or "",
            in_clear_text=params["token_in_clear_text"],
        ),
        patience=Patience(0 if once else params["patience"]),
        meter=meter,
        workers=params["workers"],
        reserve=params["reserve_bytes"],
    )


def _plan(module: AnsibleModule, store: Store, source: Source, meter: Meter) -> Manifest:
    """Return the manifest of what is wanted: given, known, told by the hub or by the folder."""
    params = module.params
    if params["manifest"]:
        return parse_manifest(params["manifest"])
    folder = Path(params["folder"]) if params["folder"] else None
    if folder is None:
        return known_plan(store, source) or _fetcher(module, store, source, meter).plan()
    given = Path(params["folder_manifest"]) if params["folder_manifest"] else None
    if given is None:
        try:
            return (
                known_plan(store, source)
                or _fetcher(module, store, source, meter, once=True).plan()
            )
        except UnreachableError as unreachable:
            module.warn(
                f"The hub was not asked ({unreachable.found}): what came with the folder decides."
            )
    manifest = folder_manifest(folder, source, given, meter)
    pin(store, source, str(manifest.provenance["revision"]))
    store.plan(manifest)
    return manifest


def _bring(
    module: AnsibleModule, store: Store, source: Source, manifest: Manifest, meter: Meter
) -> None:
    params = module.params
    if params["folder"]:
        folder = Path(params["folder"])
        damage = adopt(store, manifest, folder, meter)
        if damage and not manifest.provenance["endpoint"]:
            raise damaged_folder(folder, damage)
        if not damage:
            return
    _fetcher(module, store, source, meter).fetch(manifest, params["files"])


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do what the parameters ask for and return the module's result."""
    params = module.params
    endpoints = [check_endpoint(each) for each in (params["endpoint"], *params["mirrors"])]
    source = Source(
        repository=params["repository"],
        revision=params["revision"],
        endpoints=tuple(endpoints),
        include=tuple(params["include"]),
        exclude=tuple(params["exclude"]),
    )
    if params["folder"] and not Path(params["folder"]).is_dir():
        raise FleetError(
            "The folder with the model is not there",
            expected=f"the folder {params['folder']} on the fetcher",
            found="no such folder",
            remedy="mount the disk or correct model_folder",
        )
    store = Store(Path(params["root"]))
    published = published_model(store, source)
    if published or params["state"] == "found" or module.check_mode:
        known = published or known_plan(store, source)
        changed = not published and params["state"] == "present"
        return {"changed": changed, **_result(store, source, known)}
    _use_environment(module)
    path = Path(params["progress_file"]) if params["progress_file"] else None
    meter = Meter("starting")

    def waiting() -> None:
        meter.what = "waiting for an earlier run that is still at work on this host"

    with ProgressFile(path, meter), store.lock("model", waiting):
        # Whoever had the lock may have fetched it.
        manifest = published_model(store, source)
        if manifest:
            return {"changed": params["state"] == "present", **_result(store, source, manifest)}
        manifest = _plan(module, store, source, meter)
        if params["state"] == "planned":
            return {"changed": False, **_result(store, source, manifest, meter)}
        wanted = _missing(store, manifest, meter, params["files"])
        if wanted:
            _bring(module, store, source, manifest, meter)
        if params["files"] is None:
            meter.what, meter.total = "publishing", 0
            store.publish(manifest)
        return {
            "changed": bool(wanted) or params["files"] is None,
            **_result(store, source, manifest),
        }


def main() -> None:
    """Wire the hub core and the client to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["found", "planned", "present"],
                "default": "present",
            },
            "repository": {"type": "str", "required": True},
            "revision": {"type": "str", "required": True},
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "mirrors": {"type": "list", "elements": "str", "default": []},
            "proxy": {"type": "str", "no_log": True},
            "token": {"type": "str", "no_log": True},
            "token_in_clear_text": {"type": "bool", "default": False, "no_log": False},
            "include": {"type": "list", "elements": "str", "default": []},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "list", "elements": "str"},
            "manifest": {"type": "dict"},
            "client": {"type": "path"},
            "folder": {"type": "path"},
            "folder_manifest": {"type": "path"},
            "root": {"type": "path", "required": True},
            "reserve_bytes": {"type": "int", "default": 5_000_000_000},
            "workers": {"type": "int", "default": 8},
            "patience": {"type": "int", "default": 300},
            "time_limit": {"type": "int", "default": 172_800},
            "progress_file": {"type": "path"},
        },
        mutually_exclusive=[("files", "folder"), ("manifest", "folder")],
        required_by={"folder_manifest": "folder"},
        supports_check_mode=True,
    )
    # What is made here is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    try:
        module.exit_json(**run(module))
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
