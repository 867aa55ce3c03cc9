#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""vLLM's source at a ref with pinned pull requests on it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_source
version_added: "0.1.0"
short_description: Put pinned pull requests onto a ref of vLLM
description:
  - Asks a git repository for a ref and for the heads of pull requests, and puts the pull
    requests onto the ref in a scratch worktree.
  - Conflicts of a known structure are joined, anything else is refused; the result is
    verified as a whole before a file of it is kept.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description:
      - V(resolved) writes nothing in any mode; V(patched) does nothing; V(located) finds a wheel
        only where the clone is there.
    support: full
options:
  state:
    description:
      - V(resolved) only asks the remote repository and compares the heads.
      - V(patched) fetches, cherry-picks, joins, verifies, and writes the changed files
        below O(dest).
      - V(located) fetches, and finds the published wheel of the commit, or of the nearest
        ancestor that compiles to the same, in O(wheel_index).
    type: str
    choices: [resolved, located, patched]
    required: true
  repository:
    description: URL or path of the repository, as the manifest names it.
    type: str
    required: true
  ref:
    description: Tag, branch, full ref or full commit SHA.
    type: str
    required: true
  pull_requests:
    description: Pull requests in the order they are applied.
    type: list
    elements: dict
    default: []
    suboptions:
      number:
        description: Number of the pull request.
        type: int
        required: true
      head:
        description: Full SHA of the commit that its head must be.
        type: str
        required: true
      drop:
        description: Files or folders of the pull request that are left out.
        type: list
        elements: str
        default: []
      squash:
        description:
          - Apply all that it changes as one commit. Needed when it contains merge commits.
        type: bool
        default: false
  mirror:
    description: URL, path or bundle file that is read in place of O(repository).
    type: str
    default: ""
  resolutions:
    description:
      - Files with recorded resolutions of conflicts. Each is taken only for the ref and the
        head that it names.
    type: list
    elements: path
    default: []
  patches:
    description:
      - Corrections of pull requests as C(name), C(sha256) and C(text). Each is taken only for
        the head, and for the refs, that it names.
    type: list
    elements: dict
    default: []
  known_faults:
    description:
      - Known faults of pull requests as C(name), C(heads), C(refs), C(below_capability),
        C(symptom) and C(remedy). One that concerns this recipe and that no correction mends is
        refused.
    type: list
    elements: dict
    default: []
  accept_faults:
    description: Names of known faults that are taken on purpose.
    type: list
    elements: str
    default: []
  compute_capabilities:
    description: Compute capabilities of the GPUs, as MAJOR.MINOR.
    type: list
    elements: str
    default: []
  cache:
    description: Folder of the bare clones.
    type: path
    required: true
  dest:
    description: Folder for the changed files. Replaced. Needed for O(state=patched).
    type: path
  backend:
    description: Attention backend that the result must register. Empty for none.
    type: str
    default: TRITON_MLA_SPARSE
  wheel_index:
    description: URL of an index with wheels by commit. Needed for O(state=located).
    type: str
  wheel_variant:
    description: Folder of the CUDA build in O(wheel_index), such as V(cu130). Empty for none.
    type: str
    default: ""
  platform:
    description: Platform of the nodes, such as V(x86_64-manylinux_2_35), for O(state=located).
    type: str
  compiled_paths:
    description: Files and folders of the source whose change asks for another wheel.
    type: list
    elements: str
    default: []
  depth:
    description: How many commits the index is asked for.
    type: int
    default: 100
"""

EXAMPLES = r"""
- name: Ask for the ref and the pull request
  vllm_source:
    state: resolved
    repository: https://github.com/vllm-project/vllm.git
    ref: v0.24.0
    pull_requests:
      - number: 38476
        head: 3740c02bb1223d37823593664ae3eafa397b9937
    cache: /var/lib/glm-fleet/git
"""

RETURN = r"""
source:
  description: The repository (without credentials), the ref and the commits.
  returned: always
  type: dict
  contains:
    url: {description: Repository., type: str}
    ref: {description: The ref as given., type: str}
    sha: {description: Commit of the ref., type: str}
    pull_requests: {description: The pull requests as given., type: list, elements: dict}
    resolutions:
      description: SHA-256 of the recorded resolutions for this ref and these heads, by name.
      type: dict
    corrections:
      description: SHA-256 of the corrections for this ref and these heads, by name.
      type: dict
    accepted_faults:
      description: Known faults that this recipe has and that were accepted.
      type: list
      elements: str
wheel:
  description:
    - The wheel as C(url), the C(commit) that it was made of, and how many commits C(behind) the
      ref that is. Empty in check mode when the clone is not there yet.
  returned: for O(state=located)
  type: dict
report:
  description:
    - Commits picked, files changed and dropped, conflicts with the rule that joined each,
      corrections with their reason, and every check with its outcome.
  returned: for O(state=patched), not in check mode
  type: dict
checks:
  description: Checks with their outcome, when one of them failed.
  returned: on failure of a check
  type: list
  elements: dict
conflicts:
  description: Places with both sides and the closest rule, when no rule knows one of them.
  returned: on a conflict without a rule
  type: list
  elements: dict
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError, from_os_error
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.release.commit_wheel import ask_web, find_commit_wheel
from ansible.module_utils.glm_fleet.release.compiler import Compiler
from ansible.module_utils.glm_fleet.release.corrections import (
    Fault,
    fitting,
    read_correction,
    refuse_faults,
)
from ansible.module_utils.glm_fleet.release.git import PullRequest, Repository
from ansible.module_utils.glm_fleet.release.merge import Resolver
from ansible.module_utils.glm_fleet.release.recorded import read_resolution
from ansible.module_utils.glm_fleet.release.verify.model import SourceExpectations
from ansible.module_utils.glm_fleet.release.wheel_lock import WheelTarget


def run(module: AnsibleModule) -> dict[str, Any]:
    """Resolve or patch, as the parameters say."""
    params = module.params
    repository = Repository(
        params["repository"], Path(params["cache"]), run_program, mirror=params["mirror"]
    )
    pulls = [
        PullRequest(each["number"], each["head"], tuple(each["drop"]), each["squash"])
        for each in params["pull_requests"]
    ]
    resolutions = tuple(read_resolution(Path(file)) for file in params["resolutions"])
    resolved = repository.resolve(params["ref"], pulls)
    pairs = {(resolved.sha, pull.head) for pull in pulls}
    corrections = [read_correction(**each) for each in params["patches"]]
    heads = [pull.head for pull in pulls]
    accepted = refuse_faults(
        [Fault.read(each) for each in params["known_faults"]],
        corrections,
        ref=resolved.ref,
        sha=resolved.sha,
        heads=heads,
        capabilities=params["compute_capabilities"],
        accepted=params["accept_faults"],
    )
    source = {
        "url": resolved.url,
        "ref": resolved.ref,
        "sha": resolved.sha,
        "pull_requests": params["pull_requests"],
        "resolutions": {
            each.name: each.sha256 for each in resolutions if (each.ref, each.head) in pairs
        },
        "corrections": {
            each.name: each.sha256
            for head in heads
            for each in fitting(corrections, resolved.sha, head)
        },
        "accepted_faults": [fault.name for fault in accepted],
    }
    if params["state"] == "resolved":
        return {"changed": False, "source": source}
    if params["state"] == "located":
        fetched = not module.check_mode and repository.fetch(resolved, pulls)
        wheel = _locate(params, repository, resolved.sha) if repository.has(resolved.sha) else {}
        return {"changed": fetched, "source": source, "wheel": wheel}
    if module.check_mode:
        return {"changed": True, "source": source}
    repository.fetch(resolved, pulls)
    compiler = Compiler(
        repository,
        Resolver(),
        SourceExpectations(backend=params["backend"]),
        resolutions,
        tuple(corrections),
    )
    patched = compiler.build(resolved, pulls, dest=Path(params["dest"]))
    return {"changed": True, "source": source, "report": patched.report()}


def _locate(params: dict[str, Any], repository: Repository, sha: str) -> dict[str, Any]:
    found = find_commit_wheel(
        repository,
        sha,
        index_url=params["wheel_index"],
        variant=params["wheel_variant"],
        target=WheelTarget("", params["platform"]),
        compiled=params["compiled_paths"],
        depth=params["depth"],
        ask=ask_web,
    )
    return {"url": found.url, "commit": found.commit, "behind": found.behind}


def main() -> None:
    """Wire the source core to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["resolved", "located", "patched"],
            },
            "repository": {"type": "str", "required": True},
            "ref": {"type": "str", "required": True},
            "pull_requests": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "number": {"type": "int", "required": True},
                    "head": {"type": "str", "required": True},
                    "drop": {"type": "list", "elements": "str", "default": []},
                    "squash": {"type": "bool", "default": False},
                },
            },
            "mirror": {"type": "str", "default": ""},
            "resolutions": {"type": "list", "elements": "path", "default": []},
            "patches": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "sha256": {"type": "str", "required": True},
                    "text": {"type": "str", "required": True},
                },
            },
            "known_faults": {"type": "list", "elements": "dict", "default": []},
            "accept_faults": {"type": "list", "elements": "str", "default": []},
            "compute_capabilities": {"type": "list", "elements": "str", "default": []},
            "cache": {"type": "path", "required": True},
            "dest": {"type": "path"},
            "backend": {"type": "str", "default": "TRITON_MLA_SPARSE"},
            "wheel_index": {"type": "str"},
            "wheel_variant": {"type": "str", "default": ""},
            "platform": {"type": "str"},
            "compiled_paths": {"type": "list", "elements": "str", "default": []},
            "depth": {"type": "int", "default": 100},
        },
        required_if=[
            ("state", "patched", ["dest"]),
            ("state", "located", ["wheel_index", "platform"]),
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
