#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: everything happens on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: support_archive
version_added: "0.2.0"
short_description: Packs what was gathered of all hosts, and the reports, into one archive
description:
  - Runs on the controller, once for all hosts, and prints what is in the archive.
author: glm-fleet contributors (@glm-fleet)
options:
  hosts:
    description: The hosts.
    type: list
    elements: str
    required: true
  gathered:
    description: Name of the variable in which each host keeps the result of M(support_files).
    type: str
    required: true
  reports:
    description: Folder of the reports on the controller.
    type: path
    required: true
  dest:
    description: Folder for the archive, whose name has the time.
    type: path
    required: true
attributes:
  check_mode:
    description: Says what would be packed.
    support: full
"""

EXAMPLES = r"""
- name: Pack
  support_archive:
    hosts: "{{ ansible_play_hosts_all }}"
    gathered: gathered
    reports: reports
    dest: reports
  run_once: true
"""

RETURN = r"""
path:
  description: The archive.
  returned: success
  type: str
"""
