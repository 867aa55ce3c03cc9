#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name: everything happens on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_size
short_description: Asks the hub how large a model is, without fetching it
version_added: "0.2.0"
description:
  - Runs on the controller. Reads config.json and the header of every shard, a few megabytes, which
    say what a GPU will hold.
  - A hub that cannot be asked from the controller is no failure. C(unknown) then says why.
  - What was measured of a commit is kept, so that it costs no network a second time.
author: "glm-fleet contributors (@glm-fleet)"
options:
  repository:
    description: Name of the repository on the hub, as C(owner/name).
    type: str
    required: true
  revision:
    description: Commit, branch or tag.
    type: str
    required: true
  endpoint:
    description: URL of the hub.
    type: str
    required: true
  mirrors:
    description: URLs that are tried in this order while O(endpoint) cannot be reached.
    type: list
    elements: str
    default: []
  proxy:
    description: URL of a proxy for the hub.
    type: str
    default: ""
  token:
    description: Access token of the hub.
    type: str
    default: ""
  token_in_clear_text:
    description: Give the token to endpoints of plain http too.
    type: bool
    default: false
  include:
    description: Patterns of files that belong to the model. Every file if empty.
    type: list
    elements: str
    default: []
  exclude:
    description: Patterns of files that do not.
    type: list
    elements: str
    default: []
  cache:
    description: Folder on the controller for what was measured. Not written in check mode.
    type: path
    required: true
attributes:
  check_mode:
    description: Asks the same and keeps nothing.
    support: full
  diff_mode:
    description: Changes no host, so there is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Ask the hub how large the model is
  model_size:
    repository: cyankiwi/GLM-5.2-AWQ-INT4
    revision: 0123456789abcdef0123456789abcdef01234567
    endpoint: https://huggingface.co
    cache: ~/.glm-fleet/models
"""

RETURN = r"""
size:
  description:
    - C(repository), C(commit), the part of C(config) that decides about memory, and bytes of
      C(sharded), C(replicated) and C(indexers) tensors. {} when it is not known.
  returned: success
  type: dict
unknown:
  description: Why it is not known.
  returned: success
  type: str
"""
