#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: everything happens on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: benchmark_report
short_description: Puts what vllm_bench measured beside the reference
version_added: "0.1.0"
description:
  - Runs on the controller, once for all hosts, and touches none of them.
  - Prints one table and writes one JSON. A node below the ratio is a warning; one that could
    not be measured fails the run.
author: "glm-fleet contributors (@glm-fleet)"
options:
  nodes:
    description: Nodes that were measured alone.
    type: list
    elements: str
    required: true
  gateways:
    description: Gateways that were measured through.
    type: list
    elements: str
    required: true
  node_record:
    description: Variable of each node that holds the result of M(vllm_bench).
    type: str
    required: true
  gateway_record:
    description: Variable of each gateway that holds the result of M(vllm_bench).
    type: str
    required: true
  reference:
    description:
      - C(streams) on one node and the C(tokens_per_second) that they get together. Through a
        gateway it counts as often as there are nodes.
    type: list
    elements: dict
    required: true
  min_ratio:
    description: Least ratio to the reference without a warning.
    type: float
    required: true
  settings:
    description: What the JSON says of how it was measured.
    type: dict
    default: {}
  bounds:
    description: C(ttft_ms) and C(itl_ms) for goodput; C(gpus), C(bytes_per_second) of one of them
      and C(context) in tokens, for the roofline.
    type: dict
    default: {}
  dest:
    description:
      - Path of the JSON file to write on the controller, replaced atomically. Not written in
        check mode. Beside it lie the page (C(.html)) and the last report of another release
        (C(-before.json)).
      - Its schema is C(glm-fleet/benchmark/1), see docs/benchmark.md.
    type: path
    required: true
attributes:
  check_mode:
    description: Nothing was measured, so there is nothing to report.
    support: full
  diff_mode:
    description: Changes no host, so there is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Report the benchmark
  benchmark_report:
    nodes: "{{ groups['gpu_nodes'] }}"
    gateways: "{{ groups['gateways'] }}"
    node_record: __benchmark_node
    gateway_record: __benchmark_gateway
    reference:
      - {streams: 1, tokens_per_second: 56}
    min_ratio: 0.8
    dest: reports/benchmark.json
  run_once: true
"""

RETURN = r"""
summary:
  description: Targets that were measured, warned of, and failed.
  returned: success
  type: dict
"""
