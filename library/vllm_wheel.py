#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The wheel of vLLM: the published one, and the one with the patched files in it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_wheel
version_added: "0.1.0"
short_description: Fetch a wheel of vLLM, or overlay patched files on it
description:
  - The base wheel is proven to be made of the source at the ref, Python file by Python file.
  - Nothing is compiled and nothing is recompressed. The same inputs give the same bytes.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells what is there and writes nothing.
    support: full
options:
  state:
    description:
      - V(fetched) makes the base wheel available and hashes it.
      - V(overlaid) writes the patched wheel into O(dest).
    type: str
    choices: [fetched, overlaid]
    required: true
  base:
    description:
      - Path or URL of the base wheel, or a requirement of the form C(name==version). A URL may
        end in C(#sha256=HEX).
    type: str
    required: true
  dest:
    description: Folder for the wheel that is written.
    type: path
    required: true
  python_version:
    description: Python of the nodes, to choose the wheel of a requirement.
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
    description: A lock with the SHA-256 that the base wheel has to have. Empty for none.
    type: str
    default: ""
  git_dir_cache:
    description: Folder of the bare clones of M(vllm_source).
    type: path
  repository:
    description: Repository as given to M(vllm_source).
    type: str
  commit:
    description: Commit whose source the result is, but for the changed files.
    type: str
  made_of:
    description:
      - Commit that the base wheel was made of, where it is an ancestor of O(commit). What changed
        since is taken from the source. Empty for O(commit).
    type: str
    default: ""
  patch:
    description: Folder with the changed files.
    type: path
  changed:
    description: Paths of the changed files in the source tree.
    type: list
    elements: str
    default: []
  exceptions:
    description: Python files that the wheel's packager changed on purpose.
    type: list
    elements: str
    default: []
  name:
    description: Name of the distribution that is written.
    type: str
    default: vllm
  version:
    description: Version of the distribution that is written, with its local label.
    type: str
  drop_requirements:
    description: Names whose C(Requires-Dist) is left out.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Fetch the base wheel
  vllm_wheel:
    state: fetched
    base: vllm==0.24.0
    dest: /var/lib/glm-fleet/downloads/base
    python_version: "3.12"
    platform: x86_64-manylinux_2_35
"""

RETURN = r"""
wheel:
  description: The wheel. Empty in check mode when it is not there yet.
  returned: always
  type: dict
  contains:
    path: {description: Path., type: str}
    file: {description: File name., type: str}
    name: {description: Distribution., type: str}
    version: {description: Version., type: str}
    sha256: {description: SHA-256 in hex., type: str}
against_source:
  description: How many Python files are equal, only in the wheel, and excepted.
  returned: for O(state=overlaid), not in check mode
  type: dict
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.core.files import sha256_file, write_atomically
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.release.download import fetch_wheel
from ansible.module_utils.glm_fleet.release.git import Repository
from ansible.module_utils.glm_fleet.release.installer import run_installer
from ansible.module_utils.glm_fleet.release.repack import overlay
from ansible.module_utils.glm_fleet.release.wheel import WheelFile, check_against_tree, read_wheel
from ansible.module_utils.glm_fleet.release.wheel_lock import (
    Packages,
    WheelTarget,
    parse_lock,
    require_pinned,
)


def _remember(record: Path, wheel: WheelFile) -> None:
    """Note what was fetched, so that a run that builds nothing does not hash it again."""
    status = wheel.path.stat()
    note = {
        "file": str(wheel.path.relative_to(record.parent)),
        "sha256": wheel.sha256,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    write_atomically(record, json.dumps(note) + "\n")


def _known(record: Path) -> WheelFile | None:
    """Return the wheel that an earlier run fetched, if it is still the same file."""
    try:
        note = json.loads(record.read_text())
        path = record.parent / str(note["file"])
        status = path.stat()
        same = (status.st_size, status.st_mtime_ns) == (note["size"], note["mtime_ns"])
        if same or sha256_file(path) == note["sha256"]:
            return read_wheel(path, str(note["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _fetch(module: AnsibleModule) -> tuple[bool, WheelFile | None]:
    params = module.params
    if params["base"].endswith(".whl") and "://" not in params["base"]:
        return False, read_wheel(Path(params["base"]))
    words = (params["base"], params["python_version"], params["platform"])
    record = Path(params["dest"], re.sub(r"[^\w.=-]", "_", "-".join(words))[-200:] + ".json")
    known = _known(record)
    if known:
        return False, known
    if module.check_mode:
        return True, None
    if "://" in params["base"]:
        wheel = read_wheel(fetch_wheel(params["base"], record.parent / "base"))
        _remember(record, wheel)
        return True, wheel
    if "==" not in params["base"]:
        raise FleetError(
            "The base wheel is not pinned",
            expected="a path that ends in .whl, or name==version",
            found=params["base"],
            remedy="correct release_base_wheel",
        )
    packages = Packages(
        runner=run_installer,
        uv=shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv",
        python=sys.executable,
        target=WheelTarget(params["python_version"], params["platform"]),
        store=record.parent,
        exclude_newer=params["exclude_newer"],
        index_url=params["index_url"],
        index_urls=tuple(params["index_urls"]),
        find_links=tuple(params["find_links"]),
    )
    locked = packages.compile([params["base"]], with_dependencies=False)
    wheel = read_wheel(packages.download(locked)[locked[0].name])
    _remember(record, wheel)
    return True, wheel


def _overlay(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    if module.check_mode:
        return {"changed": True, "wheel": {}}
    base = read_wheel(Path(params["base"]))
    repository = Repository(params["repository"], Path(params["git_dir_cache"]), run_program)
    made_of = params["made_of"] or params["commit"]
    counts = check_against_tree(
        base.path,
        repository.tree(made_of),
        exceptions=params["exceptions"],
        changed=params["changed"],
    )
    changed = list(params["changed"])
    if made_of != params["commit"]:
        since = repository.changed(made_of, params["commit"])
        newer = [path for path in since if path not in params["changed"]]
        repository.export(params["commit"], newer, Path(params["patch"]))
        changed += newer
    path = overlay(
        base,
        Path(params["patch"]),
        changed,
        Path(params["dest"]),
        name=params["name"],
        version=params["version"],
        drop_requirements=params["drop_requirements"],
    )
    wheel = {**read_wheel(path).as_dict(), "path": str(path)}
    return {"changed": True, "wheel": wheel, "against_source": counts}


def main() -> None:
    """Wire the wheel core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "required": True, "choices": ["fetched", "overlaid"]},
            "base": {"type": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "python_version": {"type": "str", "required": True},
            "platform": {"type": "str", "required": True},
            "exclude_newer": {"type": "str", "default": ""},
            "index_url": {"type": "str", "default": "", "no_log": True},
            "index_urls": {"type": "list", "elements": "str", "default": []},
            "find_links": {"type": "list", "elements": "str", "default": []},
            "pinned": {"type": "str", "default": ""},
            "git_dir_cache": {"type": "path"},
            "repository": {"type": "str"},
            "commit": {"type": "str"},
            "made_of": {"type": "str", "default": ""},
            "patch": {"type": "path"},
            "changed": {"type": "list", "elements": "str", "default": []},
            "exceptions": {"type": "list", "elements": "str", "default": []},
            "name": {"type": "str", "default": "vllm"},
            "version": {"type": "str"},
            "drop_requirements": {"type": "list", "elements": "str", "default": []},
        },
        required_if=[
            ("state", "overlaid", ["git_dir_cache", "repository", "commit", "patch", "version"])
        ],
        supports_check_mode=True,
    )
    try:
        if module.params["state"] == "overlaid":
            module.exit_json(**_overlay(module))
        changed, wheel = _fetch(module)
        if wheel and module.params["pinned"]:
            pinned = parse_lock(module.params["pinned"])
            require_pinned(wheel.name, wheel.version, wheel.sha256, pinned)
        described = {**wheel.as_dict(), "path": str(wheel.path)} if wheel else {}
        module.exit_json(changed=changed, wheel=described)
    except FleetError as error:
        module.fail_json(**error.as_fail())
    except OSError as error:
        module.fail_json(**from_os_error(error).as_fail())


if __name__ == "__main__":
    main()
