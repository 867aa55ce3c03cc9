# SPDX-License-Identifier: Apache-2.0
"""The lab's Ansible inventory."""

from __future__ import annotations

import os
import secrets
from typing import Any

import yaml

from .hosts import KEY, KNOWN_HOSTS
from .settings import AUTHORITY, CLIENT_KEY, INVENTORY, SSH, STATE, USER, Host
from .system import write_atomic

HEADER = "# Written by `make lab-up`; `make lab-down` removes it.\n---\n"


def client_key() -> str:
    """Return the key of the lab's one client, made when there is none."""
    if not CLIENT_KEY.is_file():
        CLIENT_KEY.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(CLIENT_KEY, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
            stream.write(secrets.token_urlsafe(32))
    return CLIENT_KEY.read_text()


def build(hosts: list[Host], upstream_vars: dict[str, Any]) -> dict[str, Any]:
    """The inventory as data: groups gpu_nodes and gateways, and what all hosts share."""

    def group(role: str) -> dict[str, Any]:
        members = [host for host in hosts if host.role == role]
        return {"hosts": {host.name: {"ansible_host": host.address} for host in members}}

    ssh_arguments = {
        "UserKnownHostsFile": KNOWN_HOSTS,
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        # Beside the lab's keys, so that `down` finds and ends shared connections to dead hosts.
        "ControlPath": SSH / "cp-%C",
    }
    shared = {
        "ansible_user": USER,
        "ansible_ssh_private_key_file": str(KEY),
        "ansible_ssh_common_args": " ".join(f"-o {k}={v}" for k, v in ssh_arguments.items()),
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    return {
        "all": {
            "vars": {**shared, **upstream_vars},
            "children": {"gpu_nodes": group("gpu"), "gateways": group("gateway")},
        }
    }


def write(hosts: list[Host], upstream_vars: dict[str, Any]) -> None:
    lab_vars = {
        **upstream_vars,
        "gateway_clients": [{"name": "demo", "keys": [client_key()]}],
        "gateway_clients_backup": str(STATE / "clients.json"),
        "gateway_authority": str(AUTHORITY),
    }
    text = yaml.safe_dump(build(hosts, lab_vars), sort_keys=False, width=200)
    write_atomic(INVENTORY, HEADER + text)
