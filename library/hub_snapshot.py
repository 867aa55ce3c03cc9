#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A model from the hub, at one commit, as a verified artifact."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hub_snapshot
version_added: "0.1.0"
short_description: Fetch a model repository at one commit and publish it as an artifact
description:
  - Downloads with the client of huggingface_hub, which has to be importable on the host,
    and goes on where an earlier run stopped.
  - Compares every file with the SHA-256 (or git object id) of the hub after it lies on the
    disk, fetches a corrupt file once more, and publishes only what is proven.
  - A model that is published already costs no network at all.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells whether the model would be fetched. Nothing is downloaded.
    support: full
options:
  state:
    description: V(present) fetches what is missing, V(planned) only looks on this host.
    type: str
    choices: [present, planned]
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
  token:
    description: Access token. C(HF_TOKEN) of the environment is used if not given.
    type: str
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
"""

EXAMPLES = r"""
- name: Fetch the weights
  hub_snapshot:
    repository: cyankiwi/GLM-5.2-AWQ-INT4
    revision: 0123456789abcdef0123456789abcdef01234567
    root: /srv/glm-fleet/artifacts
"""

RETURN = r"""
published:
  description: Whether the model is published on this host now.
  returned: always
  type: bool
artifact:
  description: The artifact. Empty when it is not published.
  returned: always
  type: dict
  contains:
    kind: {description: Always V(model)., type: str}
    id: {description: Id., type: str}
    path: {description: Published path., type: str}
    bytes: {description: Size of all files in bytes., type: int}
    manifest: {description: The manifest., type: dict}
commit:
  description: Commit id that the revision stands for. Empty when the hub was not asked.
  returned: always
  type: str
"""

import os
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.artifact import Manifest, Store
from ansible.module_utils.glm_fleet.errors import FleetError
from ansible.module_utils.glm_fleet.hub import (
    find_corrupt,
    is_commit,
    missing_space,
    model_slug,
    same_model,
    select_files,
)


def _published(store: Store, params: dict[str, Any]) -> Manifest | None:
    wanted = {key: params[key] for key in ("repository", "revision", "include", "exclude")}
    found = [
        each
        for each in store.published("model")
        if same_model(each.provenance, **wanted) and store.is_published(each)
    ]
    return found[-1] if found else None


def _result(store: Store, manifest: Manifest | None, commit: str = "") -> dict[str, Any]:
    described: dict[str, Any] = {}
    if manifest:
        described = {
            "kind": manifest.kind,
            "id": manifest.id,
            "path": str(store.published_path(manifest.kind, manifest.id)),
            "bytes": manifest.bytes,
            "manifest": manifest.as_dict(),
        }
    return {"published": manifest is not None, "artifact": described, "commit": commit}


def _explain(error: Exception, params: dict[str, Any]) -> FleetError:
    """Turn an error of the client into one sentence with a way out."""
    from huggingface_hub import errors

    repository, endpoint = params["repository"], params["endpoint"]
    status = getattr(getattr(error, "response", None), "status_code", None)
    # The order matters: a gated repository is also "not found" to the client.
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return FleetError(
            f"The hub does not let us read {repository}",
            expected=f"access to {repository} on {endpoint}",
            found=f"HTTP {status or 'error'}: gated or private",
            remedy="accept its terms on the hub and give a token with access as model_token",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FleetError(
            "The revision is not on the hub",
            expected=f"{params['revision']} in {repository}",
            found="the repository exists, the revision does not",
            remedy="correct model_revision; an owner who rewrote the history removes commits",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FleetError(
            "The model repository is not on the hub",
            expected=f"{repository} on {endpoint}",
            found="no such repository, or a private one and no token",
            remedy="correct model_repository, or give model_token",
        )
    if status == 429:
        return FleetError(
            "The hub refuses more requests for now",
            expected="an answer",
            found="HTTP 429: quota used up",
            remedy="wait, or give a token; running again continues where this stopped",
        )
    return FleetError(
        f"The hub at {endpoint} did not deliver {repository}",
        expected="an answer of the hub",
        found=f"{type(error).__name__}: {error}",
        remedy="check network, proxy and disk of the fetcher; running again continues",
    )


def _fetch(store: Store, params: dict[str, Any]) -> tuple[Manifest, str]:
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as missing:
        raise FleetError(
            "The client of the hub is missing on this host",
            expected="huggingface_hub importable",
            found=str(missing),
            remedy="run playbooks/model.yml, which brings it",
        ) from missing
    token = params["token"] or os.environ.get("HF_TOKEN") or False
    client = {"endpoint": params["endpoint"], "token": token}
    # The client's transport has had several names; its errors share this base.
    transport_error = HfHubHTTPError.__bases__[0]
    try:
        info = HfApi(**client).model_info(
            params["repository"], revision=params["revision"], files_metadata=True
        )
        commit = str(info.sha)
        files = select_files(info.siblings, params["include"], params["exclude"])
        slug = model_slug(params["repository"], commit)
        folder = store.staging_path("model", f"{slug}.fetch")
        folder.mkdir(parents=True, exist_ok=True)
        have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        wanted = sum(file.size for file in files) - have
        short = missing_space(shutil.disk_usage(folder).free, wanted, params["reserve_bytes"])
        if short:
            raise short
        proven = store.proven("model", folder.name)
        corrupt: dict[str, str] = {}
        for _ in range(2):
            snapshot_download(
                params["repository"],
                revision=commit,
                local_dir=folder,
                allow_patterns=params["include"] or None,
                ignore_patterns=params["exclude"] or None,
                max_workers=params["workers"],
                **client,
            )
            corrupt = find_corrupt(folder, files, proven)
            if not corrupt:
                break
            for name in corrupt:
                # Without its metadata the client takes the file for one never fetched.
                (folder / name).unlink(missing_ok=True)
                record = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
                record.unlink(missing_ok=True)
                proven.forget(name)
    except (transport_error, OSError) as error:
        raise _explain(error, params) from error
    if corrupt:
        raise FleetError(
            "The hub sends files that are not what its own metadata says",
            expected="the SHA-256 of the hub's metadata",
            found="; ".join(f"{name}: {reason}" for name, reason in corrupt.items()),
            remedy="try again later or another endpoint; a proxy may change what passes",
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    provenance = {
        "repository": params["repository"],
        "revision": commit,
        "requested": params["revision"],
        "endpoint": params["endpoint"],
        "include": params["include"],
        "exclude": params["exclude"],
    }
    return store.adopt(folder, kind="model", slug=slug, provenance=provenance), commit


def main() -> None:
    """Wire the hub core and the client to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "planned"], "default": "present"},
            "repository": {"type": "str", "required": True},
            "revision": {"type": "str", "required": True},
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "token": {"type": "str", "no_log": True},
            "include": {"type": "list", "elements": "str", "default": []},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "root": {"type": "path", "required": True},
            "reserve_bytes": {"type": "int", "default": 5_000_000_000},
            "workers": {"type": "int", "default": 8},
        },
        supports_check_mode=True,
    )
    # What is made here is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    params = module.params
    store = Store(Path(params["root"]))
    try:
        manifest = _published(store, params)
        if manifest or params["state"] == "planned":
            module.exit_json(changed=False, **_result(store, manifest))
        if module.check_mode:
            commit = params["revision"] if is_commit(params["revision"]) else ""
            module.exit_json(changed=True, **_result(store, None, commit))
        with store.lock("model"):
            # Whoever had the lock may have fetched it.
            manifest, commit = _published(store, params), ""
            if not manifest:
                manifest, commit = _fetch(store, params)
        module.exit_json(changed=True, **_result(store, manifest, commit))
    except FleetError as error:
        module.fail_json(**error.as_fail())


if __name__ == "__main__":
    main()
