#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: it calls other modules on the node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: tune
version_added: "0.2.0"
short_description: Tries settings on a node that takes no requests, one start each
description:
  - Calls M(deployment), M(vllm_probe) and M(vllm_bench) on the node for each try. What is tried
    next is in C(bench/tuning.py). The node has to be drained.
  - Keeps a record on the controller, from which a run that was killed goes on.
author: glm-fleet contributors (@glm-fleet)
options:
  state:
    description:
      - V(planned) writes down what will be tried, or finds what was tried before, and says what
        the node goes back to. V(tried) tries, and leaves the node with what was tried last.
        V(back) switches it to what it ran before. V(ended) reports, once that was attested.
    type: str
    choices: [planned, tried, back, ended]
    required: true
  record:
    description: File on the controller for the record and report. The best settings are written
      beside it, with the suffix C(.yml).
    type: path
    required: true
  found:
    description: What M(deployment) with C(state=info) said of the node.
    type: dict
    default: {}
  held:
    description: Why the node is held out of service, empty if it is not.
    type: str
    default: ""
  settings:
    description: Settings with the values to try, each a list.
    type: dict
    default: {}
  base:
    description: What the inventory gives the node, as C(variables), C(extra) and C(environment).
    type: dict
    required: true
  manifest:
    description: Manifest of the release that runs.
    type: dict
    default: {}
  options:
    description: Options of the parser of that release. All are taken for known if empty.
    type: list
    elements: str
    default: []
  server:
    description: Where M(vllm_bench) finds the server.
    type: dict
    default: {}
  load:
    description: Its load.
    type: dict
    default: {}
  places:
    description: Where M(deployment) finds things on the node.
    type: dict
    default: {}
  starts:
    description: How many starts at most.
    type: int
    default: 12
  limit:
    description: Seconds out of service at most, with the way back.
    type: int
    default: 7200
  repeats:
    description: How often each settings are measured, at least and at most.
    type: list
    elements: int
    default: [2, 4]
  least_gain:
    description: Share by which settings have to be faster, beside the noise.
    type: float
    default: 0.02
  stall_timeout:
    description: Seconds without any progress after which a start is given up.
    type: int
    default: 1800
  problem:
    description: For V(ended), what ended the tries early.
    type: str
    default: ""
attributes:
  check_mode:
    description: V(planned) says what would be tried and writes nothing.
    support: partial
  diff_mode:
    description: Shows nothing.
    support: none
"""

EXAMPLES = r"""
- name: Try settings, one start each
  tune:
    state: tried
    record: reports/tune-gpu01.json
    settings:
      serving_max_num_seqs: [32, 64]
    base: {variables: {serving_max_num_seqs: 32}, extra: [], environment: {}}
"""

RETURN = r"""
before:
  description: Deployment that the node goes back to.
  returned: with V(planned)
  type: str
lends:
  description: Whether the node is drained for this alone, and joins again.
  returned: with V(planned)
  type: bool
best:
  description: C(settings), C(variables), C(gain), C(noise) and whether it is C(better).
  returned: with V(ended)
  type: dict
inventory:
  description: File with the best settings.
  returned: with V(ended)
  type: str
"""
