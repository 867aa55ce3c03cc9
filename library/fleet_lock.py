#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.fleet_lock; the action plugin of this name says who asks."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_lock
version_added: "0.1.0"
short_description: Lets one run at a time change the fleet, and holds nodes out of service
description:
  - Runs on the first gateway, through which every run passes.
  - A lock whose run is known to be dead, because it was on this controller and its process is
    gone, is taken over with a word. Any other needs O(takeover).
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Takes nothing, and says who has the lock.
    support: full
options:
  state:
    description:
      - V(info) only tells.
      - V(free) fails when another run has the lock.
      - V(taken) takes the lock for this run.
      - V(kept) gives a sign of life, and fails when somebody took the lock over.
      - V(done) and V(stopped) give it back, after a roll that went to its end or that did not.
      - V(held) and V(unheld) hold the node O(node) out of service, or end that.
    type: str
    choices: [info, free, taken, kept, done, stopped, held, unheld]
    required: true
  operation:
    description: What the run does, shown to whoever finds the lock taken.
    type: str
    default: ""
  targets:
    description: Deployment that each node goes to, kept with the record of the roll.
    type: dict
    default: {}
  backs:
    description: Deployment that each node would go back to, kept with the record of the roll.
    type: dict
    default: {}
  takeover:
    description: Take the lock from whoever has it.
    type: bool
    default: false
  node:
    description: A node, for V(held) and V(unheld).
    type: str
  reason:
    description: Why the node is held.
    type: str
    default: ""
  claim:
    description: Who asks. The action plugin fills it.
    type: dict
    default: {}
  replace:
    description: Run whose lock may be taken. The action plugin fills it.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Take the fleet's lock
  fleet_lock:
    state: taken
    operation: upgrade
  delegate_to: "{{ groups['gateways'] | first }}"
  run_once: true
"""

RETURN = r"""
roll:
  description: Record of the last roll, as run, operation, owner, controller, pid, taken, seen,
    state (running, done or stopped), targets and backs.
  returned: success
  type: dict
held:
  description: The nodes that are held out of service, with by, at and reason.
  returned: success
  type: dict
"""

from datetime import datetime, timezone

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.fleet.lock import RUNNING, FleetLock, taken_error

_STATES = ["info", "free", "taken", "kept", "done", "stopped", "held", "unheld"]


def run(module: AnsibleModule) -> bool:
    """Do what the state asks for; return whether the fleet's state changed."""
    params, lock = module.params, FleetLock()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    state, claim = params["state"], params["claim"]
    mine = claim.get("run", "")
    if state == "free" or (state == "taken" and module.check_mode):
        roll = lock.roll()
        if roll.get("state") == RUNNING and roll["run"] not in (mine, params["replace"]):
            raise taken_error(roll, now)
        return False
    if state in ("held", "unheld"):
        node = params["node"]
        if module.check_mode:
            known = lock.held().get(node)
            return (
                (known or {}).get("reason") != params["reason"] if state == "held" else bool(known)
            )
        if state == "unheld":
            return lock.unhold(node)
        return lock.hold(node, by=claim.get("owner", ""), reason=params["reason"], now=now)
    if module.check_mode or state == "info":
        return False
    if state == "taken":
        plan = {key: params[key] for key in ("targets", "backs")}
        lock.take({**claim, **plan}, replace=params["replace"], now=now)
    elif state == "kept":
        lock.keep(mine, now=now)
    else:
        lock.end(mine, state, now=now)
    return False


def main() -> None:
    """Wire the lock to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "required": True, "choices": _STATES},
            "operation": {"type": "str", "default": ""},
            "targets": {"type": "dict", "default": {}},
            "backs": {"type": "dict", "default": {}},
            "takeover": {"type": "bool", "default": False},
            "node": {"type": "str"},
            "reason": {"type": "str", "default": ""},
            "claim": {"type": "dict", "default": {}},
            "replace": {"type": "str", "default": ""},
        },
        required_if=[("state", "held", ["node"]), ("state", "unheld", ["node"])],
        supports_check_mode=True,
    )
    try:
        changed, lock = run(module), FleetLock()
        module.exit_json(changed=changed, roll=lock.roll(), held=lock.held())
    except FleetError as error:
        module.fail_json(**error.as_fail())


if __name__ == "__main__":
    main()
