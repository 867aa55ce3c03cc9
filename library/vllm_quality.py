#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.bench.quality."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_quality
version_added: "0.2.0"
short_description: Ask a server questions with known answers, and compare with another release
description:
  - Asks the questions of a set, greedily, and counts the right answers. The set and the record of
    earlier scores lie on the controller, where the action plugin of this name reads them.
  - Puts load on the server and changes nothing there.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Asks nothing and is skipped.
    support: full
  diff_mode:
    description: Changes nothing on the host, so there is nothing to show.
    support: none
options:
  state:
    description:
      - V(judged) asks, and fails where the score is too low.
      - V(recorded) asks only where the score of O(before) is not known, and judges nothing.
    type: str
    choices: [judged, recorded]
    default: judged
  before:
    description:
      - What the score is compared with, as C(release) and C(model). By default the last other
        release with the same weights and questions.
    type: dict
    default: {}
  set:
    description:
      - JSON Lines on the controller with C(question) and C(answer), as GSM8K has them. An answer is
        right if its last number is the known one (behind C(####) if that is there), or if it has
        the known words.
    type: path
  most:
    description: How many questions of the set are asked, from its beginning.
    type: int
    default: 200
  record:
    description: JSON file on the controller that keeps the scores.
    type: path
  drop:
    description: By how much the share of right answers may be lower than that of the last other
      release with the same weights and questions.
    type: float
    default: 0.03
  questions:
    description: The questions. The action plugin fills them in from O(set).
    type: list
    elements: dict
    default: []
  address:
    description: Address of the server.
    type: str
    default: 127.0.0.1
  port:
    description: Port of the server.
    type: int
    required: true
  model:
    description: Model to ask for.
    type: str
    required: true
  api_key:
    description: Key that the server wants from its clients.
    type: str
    default: ""
  streams:
    description: Questions at once.
    type: int
    default: 16
  tokens:
    description: Most tokens of an answer.
    type: int
    default: 512
"""

EXAMPLES = r"""
- name: Ask the questions of GSM8K
  vllm_quality:
    set: gsm8k.jsonl
    record: reports/quality.json
    port: 8000
    model: glm-5.2
"""

RETURN = r"""
score:
  description: C(release) and C(model) that ran, C(questions) (the name of the set), and C(right), a
    1 or 0 for each question.
  returned: success
  type: dict
quality:
  description: C(share) of right answers, C(before) (that of the other release, or null), C(lost)
    and C(gained) (questions), C(passed).
  returned: success
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.bench import quality
from ansible.module_utils.glm_fleet.core.decode import decode
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.core.http import local_http
from ansible.module_utils.glm_fleet.serving.record import read_record


def main() -> None:
    """Ask on the host."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["judged", "recorded"], "default": "judged"},
            "before": {"type": "dict", "default": {}},
            "set": {"type": "path"},
            "most": {"type": "int", "default": 200},
            "record": {"type": "path"},
            "drop": {"type": "float", "default": 0.03},
            "questions": {"type": "list", "elements": "dict", "default": []},
            "address": {"type": "str", "default": "127.0.0.1"},
            "port": {"type": "int", "required": True},
            "model": {"type": "str", "required": True},
            "api_key": {"type": "str", "default": "", "no_log": True},
            "streams": {"type": "int", "default": 16},
            "tokens": {"type": "int", "default": 512},
        },
        supports_check_mode=True,
    )
    params = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg="check mode puts no load on a server")
    try:
        questions = [
            decode(quality.Question, each, what="A question") for each in params["questions"]
        ]
        http = local_http(params["port"], address=params["address"], api_key=params["api_key"])
        ask = quality.Ask(params["model"], params["streams"], params["tokens"])
        right = quality.ask_all(http, questions, ask)
    except FleetError as error:
        module.fail_json(**error.as_fail())
    running = read_record()
    module.exit_json(
        changed=False,
        score={
            "release": running.get("release", ""),
            "model": running.get("model", ""),
            "questions": quality.name_of(questions),
            "right": right,
        },
    )


if __name__ == "__main__":
    main()
