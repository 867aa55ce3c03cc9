#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_info
short_description: Reads everything that preflight and health ask of a host
version_added: "0.1.0"
description:
  - Reads the GPUs, the disks, the memory, the ports, the services, the artifacts and the
    kernel's GPU errors of a host in one call, and writes nothing.
  - Each fact is read on its own. What fails leaves its place empty and adds a sentence to
    C(errors); the module itself does not fail.
  - Over a connection that pipelines, with an interpreter that is given as a path, the same code
    runs without Ansible's module library, which costs a host more than all that is read.
  - Wants root, because the owners of ports and the kernel's log are hidden from others.
author: "glm-fleet contributors (@glm-fleet)"
options:
  gpus:
    description: Whether to ask for GPUs, fabric manager and the kernel's Xid lines.
    type: bool
    default: true
  commands:
    description: Names of programs to look for on PATH.
    type: list
    elements: str
    default: []
  paths:
    description: Paths whose file systems are measured; they need not exist.
    type: list
    elements: str
    default: []
  ports:
    description: TCP ports whose listeners are named.
    type: list
    elements: int
    default: []
  users:
    description: Names of users to look up.
    type: list
    elements: str
    default: []
  links:
    description: Symbolic links to read, as a mapping of name to path.
    type: dict
    default: {}
  unit:
    description: The systemd unit that serves.
    type: str
    default: glm-serving.service
  environment_root:
    description: Folder of the environments of releases. Not looked at if empty.
    type: str
    default: ""
  previous:
    description: JSON file that names the release and the model of before.
    type: str
    default: /etc/glm-fleet/previous.json
  artifact_root:
    description: The folder with published artifacts; empty to skip them.
    type: str
    default: ""
  provenance_keys:
    description: Keys of each artifact's provenance to return.
    type: list
    elements: str
    default: []
  controller_epoch:
    description: The controller's clock, in seconds since 1970; that of the call if not given.
    type: float
  xid_window_s:
    description: How far back the kernel's log of this boot is read, in seconds.
    type: int
    default: 86400
  attest:
    description:
      - Whether to look at the service too, with one short canary request. Wants the release
        and the model that the O(links) C(current) and C(model) lead to.
    type: bool
    default: false
  canary_timeout_s:
    description: How long the canary may wait for an answer, in seconds.
    type: float
    default: 20
  deep:
    description:
      - Whether to read and hash every byte of the release and the model that the O(links)
        C(current) and C(model) lead to, with M(artifact), where there is an O(artifact_root).
        Damage is noted there, so that the next run fetches the files again.
    type: bool
    default: false
  front_door:
    description: On a gateway, where it lets clients in, such as V(127.0.0.1:8080). Empty where
      there is no gateway.
    type: str
    default: ""
  certificate:
    description: PEM file of a gateway with certificate and key. Not looked at if empty.
    type: str
    default: ""
  gateway_config:
    description: HAProxy's configuration, which HAProxy itself is asked to check.
    type: path
    default: /etc/haproxy/haproxy.cfg
  settings:
    description:
      - A role whose variables say what is asked and what the facts are compared with; what is
        given here goes before. The action plugin keeps what is expected beside the facts, in
        RV(record).
    type: str
    default: ""
attributes:
  check_mode:
    description: Reads only, so check mode makes no difference.
    support: full
  diff_mode:
    description: Changes nothing, so there is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Read the GPUs, one port and the space for the weights
  node_info:
    paths: [/srv/glm-fleet/artifacts]
    ports: [8000]
    controller_epoch: "{{ now().timestamp() }}"
  register: answer # and answer.record.node has them
"""

RETURN = r"""
record:
  description:
    - What a report is made of, as C(answered) (the controller's clock then), C(message) (why there
      are no facts, or empty), C(groups), C(node) (the facts, as RV(node)) and C(expect).
  returned: always
  type: dict
node:
  description: The facts, as the module gives them to the action plugin.
  returned: always
  type: dict
  contains:
    os:
      description: Id, version, name, kernel and arch.
      type: dict
      returned: always
    python:
      description: Version of the interpreter that runs the module.
      type: str
      returned: always
    systemd:
      description: Major version of systemd, or null.
      type: int
      returned: always
    commands:
      description: Path of each asked program, or null.
      type: dict
      returned: always
    memory_total_bytes:
      description: RAM in bytes.
      type: int
      returned: always
    memory_available_bytes:
      description: RAM that can be had without swapping, in bytes.
      type: int
      returned: always
    uptime_s:
      description: Seconds since the host was started.
      type: float
      returned: always
    clock:
      description: Own clock (epoch_s) and its difference to controller_epoch (skew_s), in
        seconds. The difference contains the time that the call was under way.
      type: dict
      returned: always
    disks:
      description: Per path its nearest existing parent, mount point, device, free_bytes and
        total_bytes. Paths of one device share its free space.
      type: list
      elements: dict
      returned: always
    listeners:
      description: Who listens on the asked ports, as port, pid, name, user, unit and command.
      type: list
      elements: dict
      returned: always
    users:
      description: Per name whether it exists, its uid, and whether it is a system user.
      type: dict
      returned: always
    links:
      description: Per name the path, the target (null when it is no link) and whether it exists.
      type: dict
      returned: always
    unit:
      description: Name, load_state, active_state, sub_state, n_restarts, main_pid,
        invocation_id and active_since.
      type: dict
      returned: always
    vllm_processes:
      description: Processes of vLLM servers, as pid, name, user, unit and command.
      type: list
      elements: dict
      returned: always
    artifacts:
      description: Published artifacts as kind, id, bytes, published_at (seconds since 1970), damage
        (files that are missing, foreign or of another size) and provenance.
      type: list
      elements: dict
      returned: always
    protected:
      description: Ids that are active or that a roll-back needs. Null when it cannot be told.
      type: list
      elements: str
      returned: always
    staging_bytes:
      description: Bytes on disk of artifacts on their way, by kind.
      type: dict
      returned: always
    gpu:
      description: Driver and CUDA version, the GPUs, their links, and an error.
      type: dict
      returned: when asked for
    fabric_manager:
      description: State of the fabric manager, its version, and the number of nvswitches.
      type: dict
      returned: when asked for
    xids:
      description: Xid and SXid lines as kind, code, device, instance, time_s and message.
      type: list
      elements: dict
      returned: when asked for
    attestation:
      description: The attestation of M(vllm_probe) with C(engine), which has state (serving,
        busy, hung, starting, silent, down), phase, two samples of the metrics (before, after),
        and the steps and tokens between them. Empty where nothing is deployed.
      type: dict
      returned: with O(attest)
    attestation_error:
      description: Why there is no attestation, or empty.
      type: str
      returned: with O(attest)
    verified:
      description: What M(artifact) says of each artifact that was hashed.
      type: list
      elements: dict
      returned: with O(deep)
    verified_error:
      description: Why nothing could be hashed, or empty.
      type: str
      returned: with O(deep)
    gateway:
      description: What M(haproxy_info) returns, with config_error (what HAProxy says against its
        configuration, or empty), client (status, seconds, node, error of one request) and held
        (by, at and reason of the nodes that are held out of service, by name).
      type: dict
      returned: with O(front_door)
    errors:
      description: One sentence for each fact that could not be read.
      type: list
      elements: str
      returned: always
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.node.facts import read
from ansible.module_utils.glm_fleet.node.query import ARGUMENTS


def main() -> None:
    """Read the facts and hand them back."""
    module = AnsibleModule(
        argument_spec={
            **ARGUMENTS,
            "deep": {"type": "bool", "default": False},
            "settings": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    # These are the action plugin's.
    params = {key: each for key, each in module.params.items() if key not in ("deep", "settings")}
    module.exit_json(changed=False, node=read(params))


if __name__ == "__main__":
    main()
