# SPDX-License-Identifier: Apache-2.0
"""What a host is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact.retention import PREVIOUS
from ..core.runner import Runner

# What `NodeQuery` is made from, as Ansible's argument_spec; library/node_info.py documents it.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gpus": {"type": "bool", "default": True},
    "commands": {"type": "list", "elements": "str", "default": []},
    "paths": {"type": "list", "elements": "str", "default": []},
    "ports": {"type": "list", "elements": "int", "default": []},
    "users": {"type": "list", "elements": "str", "default": []},
    "links": {"type": "dict", "default": {}},
    "unit": {"type": "str", "default": "glm-serving.service"},
    "artifact_root": {"type": "str", "default": ""},
    "previous": {"type": "str", "default": PREVIOUS},
    "environment_root": {"type": "str", "default": ""},
    "provenance_keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
    "controller_epoch": {"type": "float"},
    "xid_window_s": {"type": "int", "default": 86400},
    "attest": {"type": "bool", "default": False},
    "canary_timeout_s": {"type": "float", "default": 20.0},
    "front_door": {"type": "str", "default": ""},
    "certificate": {"type": "str", "default": ""},
    "gateway_config": {"type": "path", "default": "/etc/haproxy/haproxy.cfg"},
}
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class NodeQuery:
    """What to look for on a host.

    ``controller_epoch`` is the controller's clock in seconds since 1970 when the question
    was sent; ``xid_window_s`` is how far back the kernel's log is read; ``links`` are
    {name: path} of symbolic links to what is active, ``previous`` the file that names what was
    before; ``provenance_keys`` are copied out of each manifest.
    ``attest`` looks at the service too, wanting the release and model that the links
    ``current`` and ``model`` name; ``front_door`` asks HAProxy, and itself as a client does;
    ``certificate`` is the PEM file that HAProxy is to serve with.
    """

    commands: Sequence[str] = ()
    paths: Sequence[str] = ()
    ports: Sequence[int] = ()
    users: Sequence[str] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    unit: str = "glm-serving.service"
    artifact_root: str = ""
    environment_root: str = ""
    previous: str = PREVIOUS
    provenance_keys: Sequence[str] = ()
    controller_epoch: float | None = None
    xid_window_s: int = 86400
    gpus: bool = True
    attest: bool = False
    canary_timeout_s: float = 20.0
    front_door: str = ""
    certificate: str = ""
    gateway_config: str = "/etc/haproxy/haproxy.cfg"


@dataclass(frozen=True)
class Host:
    """Where facts come from: programs, the process table, the clock, the system's files."""

    run: Runner
    now: Callable[[], float] = time.time
    proc: Path = Path("/proc")
    os_release: Path = Path("/etc/os-release")
