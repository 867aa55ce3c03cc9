#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: it calls other modules on several hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_turn
version_added: "0.2.0"
short_description: Takes a node's turn, from the drain until it serves again
description:
  - Drains the node at every gateway, switches it to what it should run, attests it, and joins it.
    Steps down to a lower mode of CUDA graphs, or goes back to what ran before, where that fails.
  - Calls M(haproxy_server) at the gateways, M(deployment), M(rehearsal), M(vllm_probe) and
    M(vllm_quality) on the node, and M(fleet_lock) at the first gateway. The order of the steps is
    in C(fleet/turn.py).
  - In check mode each of these modules tells what it would change.
author: glm-fleet contributors (@glm-fleet)
options:
  purpose:
    description:
      - V(switch) brings the node to what it should run, as O(wanted) says.
      - V(leave) drains the node and holds it out of service, and waits for its last request.
      - V(return) attests what runs, ends the hold, and joins the node.
    type: str
    choices: [switch, leave, return]
    default: switch
  gateways:
    description: The gateways. The fleet's lock lies on the first one.
    type: list
    elements: str
    required: true
  wanted:
    description: What M(deployment) returned with V(info), for V(switch).
    type: dict
    default: {}
  acceptance:
    description:
      - What M(acceptance) returned, for V(switch). Where the GPUs have to prove themselves still,
        they do so after the drain, and before the switch.
    type: dict
    default: {}
  moved:
    description: Whether the gateways will reach the node at another endpoint.
    type: bool
    default: false
  held:
    description: Why the node is held out of service, or will be, for V(leave). Not held if empty.
    type: str
    default: ""
  rehearse:
    description:
      - Whether what the node is restarted to is rehearsed before, by M(rehearsal). What is known to
        run on its GPUs is not rehearsed again.
    type: bool
    default: false
  rehearsal:
    description: More options of M(rehearsal).
    type: dict
    default: {}
  quality:
    description:
      - Options of M(vllm_quality), where the right answers to a set of questions are counted of
        what the node is restarted to, before it joins. They are counted of what it runs before,
        where that is not known, while it is drained. Not counted if empty.
    type: dict
    default: {}
  read_ahead:
    description:
      - Folder of the model that a node which serves reads into memory before it is drained, if it
        has to be restarted. Nothing is read ahead if empty.
    type: path
    default: ""
  read_rate:
    description: Most bytes a second that are read ahead.
    type: int
    default: 1000000000
  places:
    description: Options of M(deployment) that say where things are on the node.
    type: dict
    default: {}
  neighbours:
    description:
      - Nodes of the fleet, in order. The known answers of up to three of them, which V(answers)
        of M(vllm_probe) returns there, are those that this node's are compared with after a
        restart.
    type: list
    elements: str
    default: []
  min_ready:
    description: A node that takes requests is only drained while so many others take them.
    type: int
    default: 0
  drain_timeout:
    description: Seconds that running requests get.
    type: int
    default: 600
  stall_timeout:
    description: Seconds without progress until a start is given up.
    type: int
    default: 1800
  join_timeout:
    description: Seconds for the health check of a gateway.
    type: int
    default: 60
attributes:
  check_mode:
    description: Asks every module, none of which changes anything.
    support: full
  diff_mode:
    description: Shows what every module shows.
    support: full
"""

EXAMPLES = r"""
- name: Let a node back into service
  fleet_turn:
    purpose: return
    gateways: "{{ groups['gateways'] }}"
"""

RETURN = r"""
outcome:
  description:
    - C(state) (serves, held, rolled back, drained, unreachable or untouched), C(good) (whether a
      roll may go on), C(why) in words, C(runs) (the deployment that was attested, as C(id),
      C(release), C(model) and C(cuda_graphs)), C(journal) of what failed, C(seconds), C(canary)
      and C(start) (seconds by phase) of the last start, and C(pages) that were read ahead.
    - A turn with O(purpose=switch) never fails the task, so that the roll can say how it ended.
  returned: always
  type: dict
"""
