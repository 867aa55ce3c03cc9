#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: everything happens on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_report
short_description: Judges what was gathered from all hosts and prints one table
version_added: "0.1.0"
description:
  - Runs on the controller, once for all hosts, and touches none of them.
  - With O(kind=preflight) it compares facts with expectations and fails once when there is
    an error, after printing every problem of every host.
  - With O(kind=health) it gives a verdict on each node and gateway.
author: "glm-fleet contributors (@glm-fleet)"
options:
  kind:
    description: What to judge.
    type: str
    required: true
    choices: [preflight, health]
  hosts:
    description: The hosts to report, in the order of the table.
    type: list
    elements: str
    required: true
  record:
    description:
      - Name of the variable in which each host keeps the result of M(node_info), of which
        C(record) is judged.
    type: str
    required: true
  dest:
    description:
      - Path of a JSON file to write on the controller, replaced atomically. Not written in
        check mode.
      - Its schema is C(glm-fleet/health/1), which docs/health.md describes, or
        C(glm-fleet/preflight/1) with schema, time, hosts, problems, summary (errors,
        warnings) and memory.
      - For O(kind=health) the same is written beside it as a page (C(.html)) and as
        Prometheus text (C(.prom)); C(targets.json) tells Prometheus where the fleet is; and
        the folder C(history) keeps the reports of the last checks, without their raw facts.
    type: path
  textfile_dir:
    description: For O(kind=health), folder of the node exporter's textfile collector, for
      C(glm_fleet.prom); empty where there is none.
    type: str
    default: ""
  keep:
    description: For O(kind=health), how many reports the history keeps.
    type: int
    default: 300
  limits:
    description: For O(kind=health), C(disk_free_percent), C(memory_free_percent),
      C(gpu_temperature_c) and C(slow_ratio), from where on a figure is a fault.
    type: dict
    default: {}
  memory:
    description: For O(kind=preflight), how the model is served and how large it is. Without it,
      nobody looks whether it fits the GPUs.
    type: dict
    suboptions:
      tensor_parallel:
        description: Number of GPUs that share the model.
        type: int
        required: true
      utilisation:
        description: Share of each GPU's memory that the engine may use.
        type: float
        required: true
      context:
        description: Longest context in tokens; empty takes the model's own.
        type: str
        default: ""
      release:
        description: The release of vLLM that is built on, such as C(v0.24.0).
        type: str
        required: true
      size:
        description: What M(model_size) returns.
        type: dict
        default: {}
      unknown:
        description: Why there is no size.
        type: str
        default: ""
  fail_on:
    description: For O(kind=health), the mildest verdict that fails the run. An unknown host
      counts as broken.
    type: str
    default: degraded
    choices: [never, broken, degraded]
attributes:
  check_mode:
    description: Prints the same table and writes no file.
    support: full
  diff_mode:
    description: Changes no host, so there is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Report every problem of every host
  fleet_report:
    kind: preflight
    hosts: "{{ ansible_play_hosts_all }}"
    record: __preflight_read
  run_once: true
"""

RETURN = r"""
summary:
  description: The summary of the report, as in the JSON.
  returned: success
  type: dict
"""
