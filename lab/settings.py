# SPDX-License-Identifier: Apache-2.0
"""Names, addresses and folders of the lab, in one place."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path("/var/cache/glm-fleet-lab")

# GLM_FLEET_LAB=1 to 9 is another lab beside the first: own hosts, network and upstreams, the
# same cache. One inventory a checkout, so each needs a checkout of its own.
NUMBER = int(os.environ.get("GLM_FLEET_LAB", "0") or "0")
SUFFIX = str(NUMBER) if NUMBER else ""

STATE = Path(f"/var/lib/glm-fleet-lab{SUFFIX}")
HOSTS = STATE / "hosts"
UPSTREAMS = STATE / "upstreams"
SSH = STATE / "ssh"
CLIENT_KEY = STATE / "client.key"
# Which checkout brought the lab up.
OWNER = STATE / "checkout"
AUTHORITY = STATE / "authority"
LOCK = Path(f"/run/lock/glm-fleet-lab{SUFFIX}.lock")
CACHE_LOCK = Path("/run/lock/glm-fleet-lab-cache.lock")
INVENTORY = REPOSITORY / "inventory" / "lab" / "hosts.yml"

BRIDGE = f"glmlab{NUMBER}"
NETWORK = ipaddress.ip_network(f"10.77.{NUMBER}.0/24")
BRIDGE_ADDRESS = str(NETWORK[1])
NETNS_PREFIX = f"glmlab{SUFFIX}-"
VETH_PREFIX = f"glmv{SUFFIX}-"
CGROUP = f"glm-fleet-lab{SUFFIX}"

GIT_PORT = 9418
HUB_PORT = 8500
FILES_PORT = 8501

MAX_NODES = 64
MAX_GATEWAYS = 2
USER = "ops"
GPU_STATE = "var/lib/glm-lab/gpu.json"

PULL_REQUEST = 38476
VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0+cpu"
MODEL_REPOSITORY = "lab/tiny-glm"
SHARDS_REPOSITORY = "lab/shards"


class LabError(Exception):
    """A problem the operator can act on; printed as one sentence, exit code 2 (nothing changed)
    when `changed` is False, else 1."""

    def __init__(self, message: str, *, changed: bool = True) -> None:
        super().__init__(message)
        self.changed = changed


@dataclass(frozen=True)
class Host:
    """One host of the lab: its name, role ("gpu" or "gateway") and IPv4 address."""

    name: str
    role: str
    address: str

    @property
    def folder(self) -> Path:
        return HOSTS / self.name

    @property
    def root(self) -> Path:
        """The mounted overlay: the root file system as the host sees it."""
        return self.folder / "root"

    @property
    def netns(self) -> str:
        return NETNS_PREFIX + self.name

    @property
    def veth(self) -> str:
        return VETH_PREFIX + self.name


def gpu_host(number: int) -> Host:
    return Host(f"gpu{number:02d}", "gpu", str(NETWORK[10 + number]))


def gateway_host(number: int) -> Host:
    return Host(f"gw{number:02d}", "gateway", str(NETWORK[100 + number]))


GATEWAY = gateway_host(1)


def fleet(nodes: int, gateways: int = 1) -> list[Host]:
    """The first `nodes` GPU nodes, and behind them the gateways."""
    gpus = [gpu_host(number) for number in range(1, nodes + 1)]
    return gpus + [gateway_host(number) for number in range(1, gateways + 1)]


ALL_HOSTS = {host.name: host for host in fleet(MAX_NODES, MAX_GATEWAYS)}


def existing_hosts() -> list[Host]:
    """The hosts that have a folder, in order."""
    return [host for host in ALL_HOSTS.values() if host.folder.is_dir()]
