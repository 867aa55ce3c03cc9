# SPDX-License-Identifier: Apache-2.0
"""Where the gateways reach each node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.net import join_endpoint


def node_endpoints(
    hostvars: Mapping[str, Any], nodes: Sequence[str], default_port: int
) -> dict[str, str]:
    """Return where the gateway reaches each node, by inventory name."""
    endpoints = {}
    for node in nodes:
        variables = hostvars[node]
        address = variables.get("gateway_node_address") or variables.get("ansible_host") or node
        port = int(variables.get("serving_port") or default_port)
        endpoints[node] = join_endpoint(str(address), port)
    return endpoints
