# SPDX-License-Identifier: Apache-2.0
"""The verdict on a gateway, and what the gateways say of a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gateway.answer import GatewayAnswer
from .verdict import BROKEN, DEGRADED, Finding, GatewayHealth


def judge_gateway(
    name: str, *, gateway: GatewayAnswer, before: Mapping[str, Any] | None = None
) -> GatewayHealth:
    """Judge one gateway from ``gateway`` of node_info."""
    sent_before: Mapping[str, int] = (before or {}).get("sent") or {}
    servers = []
    for server in gateway.get("servers", ()):
        total, earlier = server.get("sessions_total", 0), sent_before.get(server["name"], 0)
        # A reload counts anew.
        servers.append({**server, "sent": total - earlier if total >= earlier else total})
    up = sum(server["status"] == "UP" for server in servers)
    findings = []
    for error in gateway.get("errors", ()):
        cause, _, step = str(error).partition(" What to do: ")
        step = step.rstrip(".") or "on the gateway: journalctl -u haproxy"
        findings.append(Finding("HAProxy", BROKEN, cause.rstrip("."), step))
    if not gateway.get("valid") and not findings:
        findings.append(
            Finding("HAProxy", BROKEN, "HAProxy does not answer", "run playbooks/gateway.yml")
        )
    if gateway.get("config_error"):
        findings.append(
            Finding(
                "configuration",
                DEGRADED,
                f"the configuration on disk is not valid: {gateway['config_error']}",
                "run playbooks/gateway.yml before HAProxy is restarted",
            )
        )
    if not up and gateway.get("valid"):
        step = "mend the nodes, then run site.yml: it attests and joins them"
        findings.append(Finding("servers", BROKEN, "no server is UP", step))
    client = gateway.get("client") or {}
    if up and client and client.get("status") != 200:
        found = client.get("error") or f"HTTP {client.get('status')}"
        findings.append(
            Finding(
                "clients' path",
                BROKEN,
                f"a request through the front door failed: {found}",
                "on the gateway: journalctl -u haproxy; check certificate, port and firewall",
            )
        )
    return GatewayHealth(
        name,
        findings,
        str(gateway.get("version") or ""),
        up,
        servers,
        client,
        {"sent": {server["name"]: server.get("sessions_total", 0) for server in servers}},
    )


def states_of(node: str, gateways: Mapping[str, GatewayAnswer]) -> dict[str, str]:
    """Return the state of a node at each gateway; "?" where the gateway gave no answer."""
    states = {}
    for name, gateway in gateways.items():
        servers = {server["name"]: server["status"] for server in gateway.get("servers", ())}
        states[name] = str(servers.get(node, "absent")) if gateway.get("valid") else "?"
    return states


def gateway_step(state: str) -> str:
    return {
        "MAINT": "run site.yml when it should take requests: it attests and joins the node",
        "DRAIN": "run site.yml when it should take requests: it attests and joins the node",
        "DOWN": "from the gateway, ask the node for /health: firewall, address and port",
    }.get(state, "run playbooks/gateway.yml: the gateway does not know this node")
