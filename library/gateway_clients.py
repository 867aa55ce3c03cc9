#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Thin module over glm_fleet.gateway.clients and glm_fleet.gateway.client_store."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gateway_clients
short_description: Keeps the clients of the fleet on a gateway
version_added: "0.1.0"
description:
  - Keeps who may use the fleet, with keys as SHA-256 only, writes the maps that HAProxy reads, and
    changes those of the HAProxy that runs, without a reload.
  - Every gateway is given the lists of the others, so that all of them end with the same.
author: "glm-fleet contributors (@glm-fleet)"
attributes:
  check_mode:
    description: Tells what would change and changes nothing.
    support: full
  diff_mode:
    description: Shows clients and their keys' ids before and after, no digest.
    support: full
  idempotent:
    description: Clients that are as declared are no change. A new key always is one.
    support: partial
options:
  action:
    description:
      - V(list) only tells.
      - V(converge) takes over what the inventory declares.
      - V(add) gives O(client) the key O(sha256), and V(rotate) does so and ends the others.
      - V(revoke) ends the key O(key_id) of O(client), or the client with all of its keys.
    type: str
    choices: [list, converge, add, revoke, rotate]
    default: list
  authentication:
    description: What the gateway asks for. With V(none) nobody needs a key.
    type: str
    choices: [keys, none]
    default: keys
  declared:
    description:
      - Clients of the inventory, as name, sha256 (digests of the keys), expires, requests_a_minute,
        requests_at_once, priority and paths.
    type: list
    elements: dict
    default: []
  credential:
    description: What nodes ask the gateways for; empty leaves what the gateway knows.
    type: str
    default: ""
  credential_change:
    description: Whether O(credential) may be another than the one that the gateway knows.
    type: bool
    default: false
  copies:
    description: The lists of other gateways as RV(listing) gives them.
    type: list
    elements: str
    default: []
  backup:
    description: A list kept elsewhere, for a gateway that has none and is the only one.
    type: str
    default: ""
  client:
    description: Name of a client.
    type: str
    default: ""
  key_id:
    description: Name of a key of the client.
    type: str
    default: ""
  sha256:
    description: Digest of a new key.
    type: str
    default: ""
  expires:
    description: When the new key ends, as a date or an ISO 8601 time; empty for never.
    type: str
    default: ""
  overlap_s:
    description: Seconds until the client's other keys end at V(rotate); 0 for at once.
    type: int
    default: 0
  requests_a_minute:
    description: Most requests of O(client) in a minute; 0 for no limit.
    type: int
  requests_at_once:
    description: Most requests of O(client) at once; 0 for no limit.
    type: int
  priority:
    description: From -100 to 100; of requests that wait, the highest goes first.
    type: int
  paths:
    description: Ways in that O(client) may use, each as a method and a path.
    type: list
    elements: str
  socket:
    description: HAProxy's runtime socket with level admin.
    type: path
    default: /run/haproxy/admin.sock
  master_socket:
    description: Socket of HAProxy's master process; empty to change the present worker only.
    type: str
    default: /run/haproxy-master.sock
"""

EXAMPLES = r"""
- name: List the clients
  gateway_clients:

- name: Revoke a client
  gateway_clients:
    action: revoke
    client: batch
"""

RETURN = r"""
clients:
  description: A row for each key with client, key, state (valid, expired, no key), added, expires,
    declared and the client's limits.
  type: list
  elements: dict
  returned: success
listing:
  description: The list as JSON, for other gateways; empty if there is none or it is damaged.
  type: str
  returned: success
"""

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.glm_fleet.core.errors import FleetError
from ansible.module_utils.glm_fleet.gateway import clients
from ansible.module_utils.glm_fleet.gateway.client_store import MAPS, STORE, ClientStore
from ansible.module_utils.glm_fleet.gateway.haproxy import (
    MASTER_SOCKET,
    SOCKET,
    unix_transport,
)

_LIMITS = ("requests_a_minute", "requests_at_once", "priority", "paths")


def changed_clients(known: clients.Clients, params: dict[str, Any], now: str) -> clients.Clients:
    """Return the clients after the action."""
    action, name = params["action"], params["client"]
    key = clients.Key(params["key_id"], params["sha256"], expires=params["expires"])
    if action == "converge":
        return clients.converge(known, params["declared"], now)
    if action == "add":
        limits = {each: params[each] for each in _LIMITS}
        return clients.add(known, name, key, limits, now)
    if action == "revoke":
        return clients.revoke(known, name, params["key_id"])
    if action == "rotate":
        end = datetime.fromisoformat(now) + timedelta(seconds=params["overlap_s"])
        return clients.rotate(known, name, key, end.isoformat() if params["overlap_s"] else "", now)
    return known


def run(module: AnsibleModule, store: ClientStore) -> dict[str, Any]:
    """Do what the action asks for; return the module's result."""
    params = module.params
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    # A gateway that is not there yet is not waited for.
    ask = unix_transport(params["socket"], patience=0.5)
    master = params["master_socket"]
    ask_master = unix_transport(master, patience=0.5) if master else None
    if params["action"] == "list":
        known = store.merged(params["copies"])
        return {"changed": False, "clients": clients.listed(known, now), "listing": store.copy()}
    with store.turn():
        known = store.merged(params["copies"], params["backup"])
        if params["action"] == "converge":
            same = store.credential() == params["credential"]
            clients.refuse_weak(
                known, params["declared"], shared_is_known=same or store.asks_nobody(ask)
            )
        wanted = changed_clients(known, params, now)
        if params["authentication"] == "keys" and params["action"] == "converge":
            store.refuse_lockout(wanted, ask)
        credential = store.next_credential(
            params["credential"], allowed=params["credential_change"]
        )
        changed = store.write(wanted, credential, check_mode=module.check_mode)
        if not module.check_mode:
            changed |= store.apply(ask, ask_master)
    rows = clients.listed(wanted, now)
    if params["authentication"] == "keys" and not any(row["state"] == "valid" for row in rows):
        module.warn(
            "No client has a valid key, so the gateway refuses every request. Add one with "
            "playbooks/clients.yml -e clients_action=add -e clients_name=NAME."
        )
    return {
        "changed": changed,
        "clients": rows,
        "listing": wanted.text(),
        "diff": {
            "before": _summary(clients.listed(known, now)),
            "after": _summary(rows),
            "before_header": "clients",
            "after_header": "clients",
        },
    }


def _summary(rows: list[dict[str, Any]]) -> str:
    keys = ("client", "key", "expires", "requests_a_minute", "requests_at_once", "priority")
    return "".join(
        " ".join(f"{key}={row[key]}" for key in keys) + f" paths={','.join(row['paths'])}\n"
        for row in rows
    )


def main() -> None:
    """Wire the clients to Ansible."""
    module = AnsibleModule(
        argument_spec={
            "action": {
                "type": "str",
                "choices": ["list", "converge", "add", "revoke", "rotate"],
                "default": "list",
            },
            "authentication": {"type": "str", "choices": ["keys", "none"], "default": "keys"},
            "declared": {"type": "list", "elements": "dict", "default": []},
            "credential": {"type": "str", "default": "", "no_log": True},
            "credential_change": {"type": "bool", "default": False},
            "copies": {"type": "list", "elements": "str", "default": []},
            "backup": {"type": "str", "default": ""},
            "client": {"type": "str", "default": ""},
            # The name of a key, no secret.
            "key_id": {"type": "str", "default": "", "no_log": False},
            "sha256": {"type": "str", "default": ""},
            "expires": {"type": "str", "default": ""},
            "overlap_s": {"type": "int", "default": 0},
            "requests_a_minute": {"type": "int"},
            "requests_at_once": {"type": "int"},
            "priority": {"type": "int"},
            "paths": {"type": "list", "elements": "str"},
            "socket": {"type": "path", "default": SOCKET},
            "master_socket": {"type": "str", "default": MASTER_SOCKET},
        },
        required_if=[
            ("action", "add", ["client", "sha256", "key_id"]),
            ("action", "rotate", ["client", "sha256", "key_id"]),
            ("action", "revoke", ["client"]),
        ],
        supports_check_mode=True,
    )
    try:
        result = run(module, ClientStore(Path(STORE), Path(MAPS)))
    except FleetError as error:
        module.fail_json(**error.as_fail())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
