# SPDX-License-Identifier: Apache-2.0
"""Where hosts are reached: one answer for enrolment, gateways, swarm and Prometheus.

It is Ansible's: of the old and the new name of a variable the old one counts where both are set
(its ssh connection takes the last of a list that names the old ones last), and an empty value is
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.net import join_endpoint

SSH_PORT = 22
ADDRESS_VARIABLES = ("ansible_ssh_host", "ansible_host")
PORT_VARIABLES = ("ansible_ssh_port", "ansible_port")
# What `reached_at` reads.
REACHED_BY = ("gateway_node_address", *ADDRESS_VARIABLES)
_USER = ("ansible_ssh_user", "ansible_user")
_KEY = ("ansible_ssh_private_key_file", "ansible_private_key_file")


def first_set(variables: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the first of these variables that has a value, as text; '' if none has."""
    found = (variables.get(name) for name in names)
    return next((str(each) for each in found if each is not None and str(each) != ""), "")


def host_address(variables: Mapping[str, Any], name: str) -> str:
    """Return the address or name by which Ansible reaches a host."""
    return first_set(variables, ADDRESS_VARIABLES) or name


def host_port(variables: Mapping[str, Any]) -> str:
    """Return the SSH port that the inventory names, '' where ssh decides."""
    return first_set(variables, PORT_VARIABLES)


def host_user(variables: Mapping[str, Any]) -> str:
    """Return the user that the inventory names, '' where ssh decides."""
    return first_set(variables, _USER)


def host_key_file(variables: Mapping[str, Any]) -> str:
    """Return the private key that the inventory names, '' where ssh decides."""
    return first_set(variables, _KEY)


def node_endpoints(
    hostvars: Mapping[str, Any], nodes: Sequence[str], default_port: int
) -> dict[str, str]:
    """Return where the gateway reaches each node, by inventory name."""
    return {
        node: reached_at(hostvars, node, hostvars[node].get("serving_port") or default_port)
        for node in nodes
    }


def reached_at(hostvars: Mapping[str, Any], node: str, port: Any) -> str:
    """Return where the gateway reaches a node that listens on ``port``."""
    variables = hostvars[node]
    address = variables.get("gateway_node_address") or host_address(variables, node)
    return join_endpoint(str(address), int(port))


def plan_endpoints(
    wanted: Mapping[str, str], servers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Say which endpoints a gateway's configuration names now, so that nobody goes out by it.

    ``wanted`` is {node: endpoint} of the inventory, ``servers`` what HAProxy has, each with name,
    address, port and admin_state. A node that is in service keeps the endpoint that it has: its
    turn of the roll changes it, when it answers at the new one. Returns {endpoints, kept, renamed:
    {new name: old name}, leaving}: a server that is in service and that no node has any more is
    renamed when a new node has its endpoint, and leaving when none has and it takes requests:
    one that was drained before may go without a word.
    """
    known = {
        str(each["name"]): join_endpoint(str(each["address"]), int(each["port"]))
        for each in servers
        if each["admin_state"] != "maint"
    }
    all_names = {str(each["name"]) for each in servers}
    ready = {str(each["name"]) for each in servers if each["admin_state"] == "ready"}
    kept = {name: known[name] for name in wanted if name in known and known[name] != wanted[name]}
    gone = [name for name in known if name not in wanted]
    renamed = {
        name: old
        for name, endpoint in wanted.items()
        if name not in all_names
        for old in gone
        if known[old] == endpoint
    }
    return {
        "endpoints": {**wanted, **kept},
        "kept": sorted(kept),
        "renamed": renamed,
        "leaving": sorted(ready & set(gone) - set(renamed.values())),
    }
