#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.bench."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_bench
version_added: "0.1.0"
short_description: Measure how fast a server generates, for one stream and for many at once
description:
  - Sends streaming completions with fixed prompts and lengths to a server that speaks the
    OpenAI protocol, N at once, after a warm-up of the same N that does not count.
  - Puts load on the server and changes nothing. What else the server does goes on, is
    measured with it, and is said in C(other_traffic).
  - Runs where the server is, or on a gateway in front of it. Standard library only. Through
    the action plugin of its name each level is one call, and its figures are shown.
author: glm-fleet contributors (@glm-fleet)
attributes:
  check_mode:
    description: Sends nothing and is skipped.
    support: full
  diff_mode:
    description: Changes nothing, so there is nothing to show.
    support: none
options:
  address:
    description: Address of the server. One that is bound to every address means this host.
    type: str
    default: 127.0.0.1
  port:
    description: Port of the server.
    type: int
    required: true
  tls:
    description: Whether the server speaks TLS.
    type: bool
    default: false
  validate_certs:
    description: Whether the server's certificate has to be valid for O(address).
    type: bool
    default: true
  model:
    description: Model to ask for.
    type: str
    required: true
  api_key:
    description: Key that the server wants from its clients.
    type: str
    default: ""
  api_key_file:
    description: File on the host with a key to send instead of O(api_key), where there is such a
      file.
    type: path
    default: ""
  streams:
    description: Levels of the load, in requests at once for each of O(nodes).
    type: list
    elements: int
    default: [1, 2, 4, 8, 16, 32]
  nodes:
    description: How many nodes stand behind the server.
    type: int
    default: 1
  rounds:
    description: How often each level is measured.
    type: int
    default: 3
  prompt_tokens:
    description: Length of each prompt, in tokens.
    type: int
    default: 512
  output_tokens:
    description: Length of each answer, in tokens; 8 or more.
    type: int
    default: 256
  warmup_tokens:
    description: Length of each answer of the warm-up, in tokens; 8 or more.
    type: int
    default: 32
  seed:
    description: The same seed gives the same prompts. No run finds those of another in a cache.
    type: int
    default: 0
  silence_timeout:
    description: Seconds that a stream may say nothing.
    type: float
    default: 300
  metrics:
    description: Servers whose C(/metrics) tell other traffic, each with C(address) and C(port),
      as M(haproxy_info) returns them.
    type: list
    elements: dict
    default: []
  clients:
    description: Clients that each send one short request after another, after the levels. None
      if 0.
    type: int
    default: 0
  clients_seconds:
    description: Seconds for which they do so.
    type: float
    default: 20
  prompts:
    description: Lengths in tokens of prompts that one stream sends after that, each twice.
    type: list
    elements: int
    default: []
  weights:
    description: Folder of the model, to tell what decoding has to read. Not told if empty.
    type: path
    default: ""
"""

EXAMPLES = r"""
- name: Measure the server on this host
  vllm_bench:
    port: 8000
    model: glm-5.2
    metrics:
      - {address: 127.0.0.1, port: 8000}
"""

RETURN = r"""
levels:
  description:
    - For each level C(streams) (in all), C(per_node), C(nodes), C(requests),
      C(decode_per_stream) (median) and C(decode_together) in tokens per second after the
      first token, C(output_rate) (all tokens over the whole time, prefill included),
      C(all_at_once) (whether the server ran all of them at once), C(ttft_ms) and C(itl_ms)
      (each median, p95, p99, in milliseconds; the latter between two events that carry
      tokens), C(answered_by) (requests by node, where a gateway says it), C(other_traffic)
      (in words; empty if there was none).
  returned: success
  type: list
  elements: dict
clients:
  description:
    - Of clients that each send one short request after another, C(clients), C(requests) that
      ended, C(output_rate) in tokens per second, C(request_ms) and C(ttft_ms). Empty without
      O(clients).
  returned: success
  type: dict
prompts:
  description:
    - For each of O(prompts), C(prompt_tokens) and the time to the first token in milliseconds,
      C(cold) where no cache had the prompt, and C(warm) right after that.
  returned: success
  type: list
  elements: dict
shape:
  description: The bytes that decoding reads, as C(bench/roofline.py) names them; {} if it cannot
    be told.
  returned: success
  type: dict
running:
  description: C(release) and C(model) that were started on this host; empty on a gateway.
  returned: success
  type: dict
"""

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.bench import client
from ansible.module_utils.glm_fleet.bench.roofline import read_shape
from ansible.module_utils.glm_fleet.bench.stream import Server
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.serving.record import read_record


def _server(params: dict[str, Any]) -> Server:
    key = Path(params["api_key_file"])
    return Server(
        address=params["address"],
        port=params["port"],
        model=params["model"],
        api_key=key.read_text() if key.is_file() else params["api_key"],
        tls=params["tls"],
        verify=params["validate_certs"],
    )


def _load(params: dict[str, Any]) -> client.Load:
    return client.Load(
        prompt_tokens=params["prompt_tokens"],
        output_tokens=params["output_tokens"],
        warmup_tokens=params["warmup_tokens"],
        rounds=params["rounds"],
        seed=params["seed"],
        silence_s=params["silence_timeout"],
    )


def _clients(params: dict[str, Any], salt: str) -> dict[str, Any]:
    if not params["clients"]:
        return {}
    clients = client.Clients(params["clients"], params["clients_seconds"])
    return client.measure_clients(_server(params), clients, _load(params), salt=salt)


def _shape(folder: str) -> dict[str, Any]:
    try:
        return asdict(read_shape(Path(folder))) if folder else {}
    except FleetError:
        # The figures count without it.
        return {}


def _level(params: dict[str, Any], per_node: int, salt: str) -> dict[str, Any]:
    server, load = _server(params), _load(params)
    endpoints = [(str(each["address"]), int(each["port"])) for each in params["metrics"]]
    before = client.read_counters(endpoints)
    level = client.measure(server, load, per_node * params["nodes"], salt=salt)
    after = client.read_counters(endpoints)
    others = client.other_traffic(before, after, load, level["requests"]) if endpoints else ""
    return {**level, "per_node": per_node, "nodes": params["nodes"], "other_traffic": others}


def main() -> None:
    """Measure level by level."""
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "default": "127.0.0.1"},
            "port": {"type": "int", "required": True},
            "tls": {"type": "bool", "default": False},
            "validate_certs": {"type": "bool", "default": True},
            "model": {"type": "str", "required": True},
            "api_key": {"type": "str", "default": "", "no_log": True},
            "api_key_file": {"type": "path", "default": "", "no_log": False},
            "streams": {"type": "list", "elements": "int", "default": [1, 2, 4, 8, 16, 32]},
            "nodes": {"type": "int", "default": 1},
            "rounds": {"type": "int", "default": 3},
            "prompt_tokens": {"type": "int", "default": 512},
            "output_tokens": {"type": "int", "default": 256},
            "warmup_tokens": {"type": "int", "default": 32},
            "seed": {"type": "int", "default": 0},
            "silence_timeout": {"type": "float", "default": 300.0},
            "metrics": {"type": "list", "elements": "dict", "default": []},
            "clients": {"type": "int", "default": 0},
            "clients_seconds": {"type": "float", "default": 20.0},
            "prompts": {"type": "list", "elements": "int", "default": []},
            "weights": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg="check mode puts no load on a server")
    salt = uuid.uuid4().hex
    try:
        client.check_load(params)
        levels = [_level(params, each, salt) for each in params["streams"]]
        clients = _clients(params, salt)
        server, load = _server(params), _load(params)
        prompts = [
            client.measure_prompt(server, load, tokens, salt=salt) for tokens in params["prompts"]
        ]
    except FleetError as error:
        module.fail_json(**error.as_fail())
    module.exit_json(
        changed=False,
        levels=levels,
        clients=clients,
        prompts=prompts,
        shape=_shape(params["weights"]),
        running=read_record(),
    )


if __name__ == "__main__":
    main()
