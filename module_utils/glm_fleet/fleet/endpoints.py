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
_ADDRESS = ("ansible_ssh_host", "ansible_host")
_PORT = ("ansible_ssh_port", "ansible_port")
_USER = ("ansible_ssh_user", "ansible_user")
_KEY = ("ansible_ssh_private_key_file", "ansible_private_key_file")


def first_set(variables: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the first of these variables that has a value, as text; '' if none has."""
    found = (variables.get(name) for name in names)
    return next((str(each) for each in found if each is not None and str(each) != ""), "")


def host_address(variables: Mapping[str, Any], name: str) -> str:
    """Return the address or name by which Ansible reaches a host."""
    return first_set(variables, _ADDRESS) or name


def host_port(variables: Mapping[str, Any]) -> str:
    """Return the SSH port that the inventory names, '' where ssh decides."""
    return first_set(variables, _PORT)


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
    endpoints = {}
    for node in nodes:
        variables = hostvars[node]
        address = variables.get("gateway_node_address") or host_address(variables, node)
        port = int(variables.get("serving_port") or default_port)
        endpoints[node] = join_endpoint(str(address), port)
    return endpoints
