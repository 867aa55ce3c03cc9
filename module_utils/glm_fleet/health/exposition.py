# SPDX-License-Identifier: Apache-2.0
"""The health report as Prometheus text, and where Prometheus finds the fleet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from ..core.net import join_endpoint
from ..fleet.endpoints import host_address, node_endpoints
from .verdict import HEALTHY, VERDICTS

_Sample = tuple[Mapping[str, str], float]


def exposition(report: Mapping[str, Any]) -> str:
    """Return the report for the textfile collector of the node exporter."""
    lines = []
    for name, meaning, samples in _metrics(report):
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
        lines += [f"{name}{_labels(labels)} {value!r}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def targets(
    hostvars: Mapping[str, Any], nodes: Sequence[str], gateways: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the fleet for ``file_sd_configs``: vLLM on each node, HAProxy on each gateway."""
    found = [
        {"targets": [endpoint], "labels": {"role": "node", "host": name}}
        for name, endpoint in node_endpoints(hostvars, nodes, 8000).items()
    ]
    for name in gateways:
        variables = hostvars[name]
        bind = str(variables.get("gateway_metrics_bind", "127.0.0.1:8405") or "")
        if bind:
            endpoint = join_endpoint(host_address(variables, name), int(bind.rpartition(":")[2]))
            found.append({"targets": [endpoint], "labels": {"role": "gateway", "host": name}})
    return found


_Metric = tuple[str, str, list[_Sample]]


def _metrics(report: Mapping[str, Any]) -> Iterator[_Metric]:
    checked = datetime.fromisoformat(report["time"]).timestamp()
    yield "glm_fleet_health_time_seconds", "When the fleet was last checked.", [({}, checked)]
    yield from _verdicts(report["nodes"], report["gateways"])
    yield from _figures(report["nodes"])
    yield (
        "glm_fleet_gateway_servers_up",
        "Servers that take requests, as the gateway sees them.",
        [({"host": each["name"]}, float(each["up"])) for each in report["gateways"]],
    )
    yield (
        "glm_fleet_certificate_end_time_seconds",
        "When a certificate of the front door ends.",
        [
            ({"host": each["name"], "path": certificate["path"]}, float(certificate["expires_s"]))
            for each in report["gateways"]
            for certificate in each.get("certificates") or ()
        ],
    )
    yield from _clients(report["gateways"])


def _clients(gateways: Sequence[Mapping[str, Any]]) -> Iterator[_Metric]:
    for key, text in (
        ("requests", "Requests of a client that were let through since the last reload."),
        ("refused", "Requests of a client above a limit of its own since the last reload."),
        ("failed", "Requests of a client that a node failed since the last reload."),
        ("bytes_in", "Bytes from a client since the last reload."),
        ("bytes_out", "Bytes to a client since the last reload."),
        ("tokens_in", "Tokens of prompts, where answers told them, since the last reload."),
        ("tokens_out", "Tokens of answers that told them, since the last reload."),
    ):
        yield (
            f"glm_fleet_client_{key}",
            text,
            [
                ({"host": gateway["name"], "client": each["name"]}, float(each.get(key, 0)))
                for gateway in gateways
                for each in gateway.get("clients") or ()
            ],
        )


def _verdicts(
    nodes: Sequence[Mapping[str, Any]], gateways: Sequence[Mapping[str, Any]]
) -> Iterator[_Metric]:
    hosts = [("node", each) for each in nodes] + [("gateway", each) for each in gateways]
    yield (
        "glm_fleet_host_verdict",
        "1 for the verdict of the last check, 0 for the others.",
        [
            (
                {"host": each["name"], "role": role, "verdict": verdict},
                float(each["verdict"] == verdict),
            )
            for role, each in hosts
            for verdict in VERDICTS
        ],
    )
    found = {
        (each["name"], finding["check"], finding["verdict"])
        for _, each in hosts
        for finding in each["findings"]
        if finding["verdict"] != HEALTHY
    }
    yield (
        "glm_fleet_finding",
        "1 for each fault that the last check found.",
        [
            ({"host": host, "check": check, "verdict": verdict}, 1.0)
            for host, check, verdict in sorted(found)
        ],
    )


def _figures(nodes: Sequence[Mapping[str, Any]]) -> Iterator[_Metric]:
    known = [(node, node["facts"].get("gpu") or {}) for node in nodes if node["facts"]]
    yield (
        "glm_fleet_node_info",
        "What a node runs.",
        [
            (
                {
                    "host": node["name"],
                    "release": node["release"],
                    "model": node["model"],
                    "driver": str(gpu.get("driver_version") or ""),
                },
                1.0,
            )
            for node, gpu in known
        ],
    )
    yield (
        "glm_fleet_gpus",
        "GPUs that the node's driver lists.",
        [({"host": node["name"]}, float(len(gpu.get("gpus", ())))) for node, gpu in known],
    )
    yield (
        "glm_fleet_canary_tokens_per_second",
        "Speed of the one short request of the last check.",
        [
            ({"host": node["name"]}, float(node["tokens_per_second"]))
            for node in nodes
            if node["tokens_per_second"] is not None
        ],
    )
    yield (
        "glm_fleet_engine_restarts",
        "Restarts of the service by systemd since the check before.",
        [
            ({"host": node["name"]}, float(node["engine"]["restarts"]))
            for node in nodes
            if node["engine"]
        ],
    )


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
