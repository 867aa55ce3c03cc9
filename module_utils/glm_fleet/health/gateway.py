# SPDX-License-Identifier: Apache-2.0
"""The verdict on a gateway, and what the gateways say of a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..core.errors import split_remedy
from ..gateway.answer import GatewayAnswer
from .verdict import BROKEN, DEGRADED, Finding, GatewayHealth

_EXPIRES_SOON_S = 21 * 86400.0


def _certificate_findings(gateway: GatewayAnswer, now: float) -> Iterator[Finding]:
    for each in gateway.get("certificates", ()):
        left = each["expires_s"] - now
        step = (
            "run playbooks/gateway.yml: it renews one of the fleet's authority; put one of yours "
            "there before"
        )
        if left <= 0:
            cause = f"the certificate {each['path']} has expired: clients refuse it"
            yield Finding("certificate", BROKEN, cause, step)
        elif left < _EXPIRES_SOON_S:
            cause = f"the certificate {each['path']} expires in {left / 86400:.0f} days"
            yield Finding("certificate", DEGRADED, cause, step)


def _program_findings(gateway: GatewayAnswer) -> Iterator[Finding]:
    errors = gateway.get("errors", ())
    for error in errors:
        cause, step = split_remedy(str(error), "on the gateway: journalctl -u haproxy")
        yield Finding("HAProxy", BROKEN, cause, step)
    if not gateway.get("valid") and not errors:
        yield Finding("HAProxy", BROKEN, "HAProxy does not answer", "run playbooks/gateway.yml")
    if gateway.get("held_error"):
        cause, _, step = gateway["held_error"].partition(" What to do: ")
        cause = f"it cannot be told which nodes are held: {cause.rstrip('.')}"
        yield Finding("holds", BROKEN, cause, step.rstrip("."))


def _configuration_findings(gateway: GatewayAnswer) -> Iterator[Finding]:
    if gateway.get("config_error"):
        yield Finding(
            "configuration",
            DEGRADED,
            f"the configuration on disk is not valid: {gateway['config_error']}",
            "run playbooks/gateway.yml before HAProxy is restarted",
        )
    if gateway.get("config_edited"):
        yield Finding(
            "configuration",
            DEGRADED,
            "haproxy.cfg was changed by hand since it was written",
            "put what it needs into the gateway_ variables; playbooks/gateway.yml writes the "
            "file anew",
        )


def _traffic_findings(gateway: GatewayAnswer, up: int) -> Iterator[Finding]:
    if not up and gateway.get("valid"):
        step = "mend the nodes, then run site.yml: it attests and joins them"
        yield Finding("servers", BROKEN, "no server is UP", step)
    client = gateway.get("client") or {}
    if up and client and client.get("status") != 200:
        found = client.get("error") or f"HTTP {client.get('status')}"
        yield Finding(
            "clients' path",
            BROKEN,
            f"a request through the front door failed: {found}",
            "on the gateway: journalctl -u haproxy; check certificate, port and firewall",
        )


def judge_gateway(
    name: str,
    *,
    gateway: GatewayAnswer,
    before: Mapping[str, Any] | None = None,
    now: float = 0.0,
) -> GatewayHealth:
    """Judge one gateway from ``gateway`` of node_info."""
    sent_before: Mapping[str, int] = (before or {}).get("sent") or {}
    servers = []
    for server in gateway.get("servers", ()):
        total, earlier = server.get("sessions_total", 0), sent_before.get(server["name"], 0)
        # A reload counts anew.
        servers.append({**server, "sent": total - earlier if total >= earlier else total})
    up = sum(server["status"] == "UP" for server in servers)
    findings = [
        *_program_findings(gateway),
        *_configuration_findings(gateway),
        *_certificate_findings(gateway, now),
        *_traffic_findings(gateway, up),
    ]
    return GatewayHealth(
        name,
        findings,
        str(gateway.get("version") or ""),
        up,
        servers,
        gateway.get("client") or {},
        {"sent": {server["name"]: server.get("sessions_total", 0) for server in servers}},
        list(gateway.get("clients", ())),
        list(gateway.get("certificates", ())),
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
