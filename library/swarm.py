#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A node's part in distributing artifacts: what it lacks, its agent started and stopped."""

from __future__ import annotations

DOCUMENTATION = r"""
module: swarm
version_added: "0.1.0"
short_description: Distribute an artifact among nodes
description:
  - Every node takes from every other one what it lacks, verifies and publishes it. The agent
    that does it runs as the transient unit C(glm-swarm.service), listens only while it works
    and only to the given peers, and ends by itself when its controller is gone.
  - With V(distributed), an action plugin of the same name starts the agent, carries torrents from
    node to node, shows progress and stops the agent. The other states are its steps on the node.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Tells what would change and changes nothing.
    support: full
options:
  state:
    description:
      - V(planned) only tells which of O(manifests) are published on this host.
      - V(distributed) brings the artifact of O(manifest) to this host.
      - V(started) starts the agent or joins the one that works on the same artifact.
      - V(stopped) ends the agent when no other controller needs it.
    type: str
    choices: [planned, distributed, started, stopped]
    required: true
  root:
    description: Folder of all artifacts of this host.
    type: path
    required: true
  manifests:
    description: Manifests to look for.
    type: list
    elements: dict
    default: []
  manifest:
    description: The manifest of the artifact, as the producer made it.
    type: dict
  address:
    description: Address of this host towards its peers, and the only one that it listens on.
    type: str
  port:
    description: TCP port of the agents.
    type: int
    default: 8009
  peers:
    description: Address of every host that takes part, by its name.
    type: dict
    default: {}
  rate_limit:
    description: Most bytes per second that this host sends, and receives. 0 is no limit.
    type: int
    default: 0
  stall_timeout:
    description: Seconds without a byte after which the distribution fails, with an explanation.
    type: int
    default: 120
  library:
    description: Folder of the node's part of the logic.
    type: path
  engine:
    description: Folder that libtorrent can be imported from.
    type: path
  run:
    description: Name of the controller's run. Set by the action plugin.
    type: str
  hosts:
    description: Names of the hosts that this task runs on. Read by the action plugin.
    type: list
    elements: str
    default: []
  push:
    description: Folder on the controller to push the artifact from to this host.
    type: str
    default: ""
  fetch:
    description:
      - Options of M(hub_snapshot) for a host that fetches files of the artifact meanwhile. Each
        travels on to the other hosts as soon as it is proven. Used by the action plugin.
    type: dict
"""

EXAMPLES = r"""
- name: Bring the model to every node
  swarm:
    state: distributed
    root: /srv/glm-fleet/artifacts
    manifest: "{{ model_artifact.manifest }}"
    address: 192.0.2.11
    peers: {gpu01: 192.0.2.11, gpu02: 192.0.2.12}
    library: /opt/glm-fleet/lib
    engine: /opt/glm-fleet/toolbox/swarm
    hosts: "{{ ansible_play_hosts }}"
"""

RETURN = r"""
published:
  description: Ids of the artifacts asked for that are published on this host.
  returned: for V(planned)
  type: list
  elements: str
python_version:
  description: Version of Python on this host, as C(3.11).
  returned: for V(planned)
  type: str
machine:
  description: Architecture of this host.
  returned: for V(planned)
  type: str
python:
  description: The interpreter that runs the agent.
  returned: for V(started)
  type: str
incoming:
  description: Folder that takes what is pushed.
  returned: for V(started)
  type: str
missing:
  description: Paths and sizes in bytes of the files that have to be pushed.
  returned: for V(started) with O(push)
  type: list
  elements: dict
received:
  description: Bytes that came from other hosts.
  returned: for V(distributed)
  type: int
"""

import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.artifact.manifest import parse_manifest
from ansible.module_utils.glm_fleet.artifact.store import Store
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.core.files import exclusive, write_atomically
from ansible.module_utils.glm_fleet.core.runner import run_program
from ansible.module_utils.glm_fleet.transfer.agent import LEASE_S
from ansible.module_utils.glm_fleet.transfer.control import (
    RUN_FOLDER,
    UNIT,
    ask,
    failure_of,
    unit_command,
    untouchable,
)
from ansible.module_utils.glm_fleet.transfer.session import Job, resolve

_START_S = 60.0


def plan(store: Store, params: dict[str, Any]) -> dict[str, Any]:
    """Say what is published here, and what an engine for this host has to fit."""
    manifests = [parse_manifest(each) for each in params["manifests"]]
    return {
        "published": [each.id for each in manifests if store.is_published(each)],
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
    }


def running() -> bool:
    """Tell whether an agent is there."""
    return run_program(["systemctl", "is-active", "--quiet", UNIT], check=False).rc == 0


def make_room(identifier: str) -> bool:
    """Tell whether an agent for this artifact runs; wait for the end of one for another."""
    deadline = time.monotonic() + LEASE_S + 15
    while running():
        try:
            state = ask({})
        except FleetError:
            state = {}
        if state.get("artifact") == identifier and state.get("standing") != "failed":
            return True
        if state and not state["leases"]:
            # Its controller is gone, and what it has is kept.
            run_program(["systemctl", "stop", UNIT])
        elif time.monotonic() > deadline:
            raise FleetError(
                "Another distribution is at work on this node",
                expected="one at a time",
                found=f"{state.get('artifact', 'an agent that does not answer')}",
                remedy="wait for its end, or stop it with: systemctl stop " + UNIT,
            )
        else:
            time.sleep(1)
    return False


def start(store: Store, params: dict[str, Any]) -> dict[str, Any]:
    """Start the agent, or join the one that works on the same artifact."""
    manifest = parse_manifest(params["manifest"])
    job = Job(
        root=store.root,
        manifest=manifest,
        address=params["address"],
        port=params["port"],
        peers=params["peers"],
        rate_limit=params["rate_limit"],
        stall_timeout=float(params["stall_timeout"]),
    )
    # Two controllers may come at once: the second one joins what the first one starts.
    with exclusive(RUN_FOLDER.with_suffix(".lock")):
        if not make_room(manifest.id):
            launch(job, f"{params['library']}:{params['engine']}")
        greet(params["run"])
    incoming = store.staging_path(manifest.kind, manifest.id).with_name(f"{manifest.id}.incoming")
    result: dict[str, Any] = {"python": sys.executable, "incoming": str(incoming), "missing": []}
    if params["push"] and not store.is_published(manifest):
        # The connection's user writes here; the agent takes what is whole from there.
        incoming.mkdir(exist_ok=True)
        if os.environ.get("SUDO_USER"):
            shutil.chown(incoming, os.environ["SUDO_USER"])
        result["missing"] = [
            {"path": entry.path, "size": entry.size} for entry in store.missing(manifest)
        ]
    return result


def launch(job: Job, path: str) -> None:
    """Start the agent's unit."""
    shutil.rmtree(RUN_FOLDER, ignore_errors=True)
    RUN_FOLDER.mkdir(mode=0o700, parents=True)
    job.root.mkdir(parents=True, exist_ok=True)
    job_file = RUN_FOLDER / "job.json"
    write_atomically(job_file, json.dumps(job.as_dict()), mode=0o600)
    fixed = untouchable(Store(job.root), job.manifest)
    nodes = [resolve(address) for address in (job.address, *job.peers.values())]
    run_program(unit_command(job_file, job.root, sys.executable, path, nodes, fixed))


def greet(run: str) -> None:
    """Wait until the agent knows its controller."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            ask({"run": run})
        except FleetError as error:
            if not running():
                raise failure_of(RUN_FOLDER) or error from error
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def stop(params: dict[str, Any]) -> dict[str, Any]:
    """Leave the agent; the last one who leaves ends it."""
    try:
        ask({"run": params["run"], "leave": True})
    except FleetError:
        return {}
    deadline = time.monotonic() + 20
    while running() and ask_leases() == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    if running() and ask_leases() == 0:
        run_program(["systemctl", "stop", UNIT])
    return {}


def ask_leases() -> int:
    """How many controllers use the agent."""
    try:
        return int(ask({})["leases"])
    except FleetError:
        return 0


def main() -> None:
    """Wire the swarm to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["planned", "distributed", "started", "stopped"],
            },
            "root": {"type": "path", "required": True},
            "manifests": {"type": "list", "elements": "dict", "default": []},
            "manifest": {"type": "dict"},
            "address": {"type": "str"},
            "port": {"type": "int", "default": 8009},
            "peers": {"type": "dict", "default": {}},
            "rate_limit": {"type": "int", "default": 0},
            "stall_timeout": {"type": "int", "default": 120},
            "library": {"type": "path"},
            "engine": {"type": "path"},
            "run": {"type": "str"},
            "hosts": {"type": "list", "elements": "str", "default": []},
            "push": {"type": "str", "default": ""},
            "fetch": {"type": "dict"},
        },
        required_if=[
            ("state", "started", ["manifest", "address", "library", "engine", "run"]),
            ("state", "stopped", ["run"]),
        ],
        supports_check_mode=True,
    )
    # What is published is for other users to read, however strict the host's umask is.
    os.umask(0o022)
    store = Store(Path(module.params["root"]))
    try:
        if module.params["state"] == "planned":
            result = plan(store, module.params)
        elif module.check_mode:
            result = {}
        elif module.params["state"] == "started":
            result = start(store, module.params)
        else:
            result = stop(module.params)
        module.exit_json(changed=False, **result)
    except FleetError as error:
        module.fail_json(**error.as_fail())


if __name__ == "__main__":
    main()
