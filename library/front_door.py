#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: it decides on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: front_door
short_description: Decides how a gateway serves clients, and issues its certificate
version_added: "0.2.0"
description:
  - V(decide) only tells, from what M(certificate_file) found at every gateway, and refuses a
    certificate that clients would refuse.
  - V(issue) has the fleet's authority sign a certificate, makes the authority where there is none,
    and writes certificate and key to the gateway. The controller keeps no copy of that key.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Issues and writes nothing.
    support: full
  diff_mode:
    description: A key is not shown.
    support: none
options:
  action:
    description: What to do.
    type: str
    choices: [decide, issue]
    default: decide
  tls:
    description: V(always), V(never), or V(auto), which leaves a fleet in clear text that serves so.
    type: str
    choices: [auto, always, never]
    default: auto
  certificate:
    description: File of a certificate on the gateway; empty for one of the authority.
    type: str
    default: ""
  own:
    description: File for a certificate of the authority on the gateway.
    type: str
    required: true
  names:
    description: Names and addresses of this gateway, for a certificate of the authority.
    type: list
    elements: str
    required: true
  told:
    description: More names, which have to be in any certificate.
    type: list
    elements: str
    default: []
  authority:
    description: Folder of the authority on the controller.
    type: path
    required: true
  authority_change:
    description: Whether another authority may sign than the one that clients trust.
    type: bool
    default: false
  doors:
    description: RV(certificate_file#module:door) of each gateway, by its name.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Decide how clients are served
  front_door:
    own: /etc/haproxy/glm-fleet/front.pem
    names: [gw01, 192.0.2.11]
    authority: ~/.glm-fleet/authority
    doors: {gw01: "{{ found.door }}"}
"""

RETURN = r"""
file:
  description: The certificate that the gateway serves with; empty in clear text.
  type: str
  returned: with V(decide)
issue:
  description: Why a new one has to be issued first; empty if it need not.
  type: str
  returned: with V(decide)
"""
