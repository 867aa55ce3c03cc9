#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: everything happens on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_roll
version_added: "0.1.0"
short_description: Plans a roll over the nodes, and reports how it ended
description:
  - Runs on the controller, once for all nodes, and touches none of them.
  - Reads what M(deployment) found on each node, and what M(fleet_turn) made of each turn.
author: glm-fleet contributors (@glm-fleet)
options:
  state:
    description:
      - V(planned) prints what will be done to each node, in order, and returns the order.
      - V(ended) prints what each node runs, how its turn ended, and why.
    type: str
    choices: [planned, ended]
    required: true
  nodes:
    description: The nodes of this run.
    type: list
    elements: str
    required: true
  gateways:
    description: What M(haproxy_info) returned for each gateway, for V(planned).
    type: list
    elements: dict
    default: []
  held:
    description: The nodes that are held out of service, as M(fleet_lock) returns them.
    type: dict
    default: {}
  batch:
    description: Nodes at once, as a count or a percentage, or V(auto) for what the load spares.
    type: str
    default: "1"
  min_ready:
    description: Nodes that have to go on taking requests.
    type: str
    default: "1"
  canary:
    description: The node to begin with. The first one that takes no requests if empty.
    type: str
    default: ""
  slots:
    description: Requests that a node runs at once, for O(batch=auto). Unknown if empty.
    type: str
    default: ""
  full:
    description: For O(batch=auto), how full the nodes that stay may become, as a share.
    type: float
    default: 0.7
  remark:
    description: A sentence for below the table of V(planned), where there is one to say.
    type: str
    default: ""
  rehearse:
    description: For V(planned), whether the first node that gets something new rehearses it.
    type: bool
    default: false
attributes:
  check_mode:
    description: Prints the same.
    support: full
"""

EXAMPLES = r"""
- name: Plan the roll
  fleet_roll:
    state: planned
    nodes: "{{ ansible_play_hosts_all }}"
    gateways: "{{ answers.results }}"
  run_once: true
"""

RETURN = r"""
turns:
  description: The nodes that have a turn, in order.
  returned: with V(planned)
  type: list
  elements: str
batches:
  description: The sizes of the batches, as C(serial) takes them.
  returned: with V(planned)
  type: list
  elements: int
first:
  description: The node that is the first to run what it gets. Empty if another one does already.
  returned: with V(planned)
  type: str
moved:
  description: The nodes that the gateways are to reach at another endpoint.
  returned: with V(planned)
  type: list
  elements: str
targets:
  description: Id of the deployment that each node goes to.
  returned: with V(planned)
  type: dict
backs:
  description: Id of the deployment that each node would go back to, empty if there is none.
  returned: with V(planned)
  type: dict
good:
  description: Whether every turn got through.
  returned: with V(ended)
  type: bool
sentence:
  description: Why the roll stopped, empty if it did not.
  returned: with V(ended)
  type: str
"""
