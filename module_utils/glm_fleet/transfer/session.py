# SPDX-License-Identifier: Apache-2.0
"""What the torrent engine is told: settings, priorities, and one torrent on its way."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact.manifest import Manifest, parse_manifest
from ..core.errors import FleetError
from .torrent import Bundle

# Enough bundles on their way at once that the end of one hides behind the next.
WINDOW = 4


@dataclass(frozen=True)
class Job:
    """What an agent is told when it starts. Rates in bytes per second, 0 for no limit."""

    root: Path
    manifest: Manifest
    address: str
    port: int
    peers: Mapping[str, str]
    rate_limit: int
    stall_timeout: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """Read what `as_dict` wrote."""
        return cls(
            root=Path(data["root"]),
            manifest=parse_manifest(data["manifest"]),
            address=str(data["address"]),
            port=int(data["port"]),
            peers={str(name): str(address) for name, address in data["peers"].items()},
            rate_limit=int(data["rate_limit"]),
            stall_timeout=float(data["stall_timeout"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the job as JSON can hold it."""
        return {
            **vars(self),
            "root": str(self.root),
            "manifest": self.manifest.as_dict(),
            "peers": dict(self.peers),
        }


def resolve(host: str) -> str:
    """Return the address of a host that is named by name or address."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise FleetError(
            f"The host {host} cannot be found",
            expected="an address, or a name that this node can resolve",
            found=str(error),
            remedy="set artifact_address of that node to its address towards the other nodes",
        ) from error


def session_settings(address: str, port: int, rate_limit: int, peers: int) -> dict[str, Any]:
    """Return the engine's settings: few requests in flight, TCP alone, nobody discovered.

    The short request queues are what keeps a swarm near the speed of one link: with long
    ones a node that has the newest pieces answers one peer for seconds.
    """
    host = f"[{address}]" if ":" in address else address
    return {
        "listen_interfaces": f"{host}:{port}",
        # Peers let in the inventory's addresses only: a node with several uses that one.
        "outgoing_interfaces": address,
        "listen_system_port_fallback": False,
        "max_retry_port_bind": 0,
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_incoming_utp": False,
        "enable_outgoing_utp": False,
        "mixed_mode_algorithm": 0,
        "out_enc_policy": 2,
        "in_enc_policy": 2,
        "unchoke_slots_limit": -1,
        "connections_limit": max(500, 4 * WINDOW * peers),
        "connection_speed": 200,
        "min_reconnect_time": 1,
        "max_failcount": 1_000_000,
        "peer_connect_timeout": 5,
        "peer_timeout": 30,
        "piece_timeout": 5,
        "request_timeout": 15,
        "peer_turnover": 0,
        "request_queue_time": 1,
        "whole_pieces_threshold": 0,
        "max_out_request_queue": 32,
        "max_allowed_in_request_queue": 32,
        # At the default of 500 ms, what a limit allows leaves in bursts, which everything else on
        # the link waits for.
        "tick_interval": 20 if rate_limit else 500,
        "upload_rate_limit": rate_limit,
        "download_rate_limit": rate_limit,
        "ignore_limits_on_local_network": False,
        # Errors, peers, storage and status.
        "alert_mask": 0x1 | 0x2 | 0x8 | 0x40,
        "user_agent": "glm-fleet",
    }


def priorities(pieces: int, takers: Collection[str], own: str) -> list[int]:
    """Return the engine's priority, 1 to 7, of each piece for one of those who take a bundle.

    Each begins with other pieces. Two that take the same from a seed make it send them twice,
    and while there is one seed, its link is what everybody waits for. Nothing is reserved: who
    is done with its own goes on with the rest, so that a slow node holds nobody up.
    """
    mine = sorted(takers).index(own)
    return [7 if number % len(takers) == mine else 1 for number in range(pieces)]


def own_order(names: Sequence[str], own: str, others: Iterable[str]) -> list[str]:
    """Return bundles in the order in which this host makes torrents of them.

    Every host begins at another place, so that several that hold all share the work.
    """
    order = sorted([own, *others])
    start = order.index(own) * len(names) // len(order)
    return [*names[start:], *names[:start]]


@dataclass
class Travel:
    """How far one bundle has come on this node."""

    bundle: Bundle
    torrent: bytes = b""
    # Roots that the torrent leads to, and whether they are those of the bytes that are here.
    roots: dict[str, str] = field(default_factory=dict)
    proved: bool = False
    unsure: bool = True
    held: bool = False
    handle: Any = None
    flushed: bool = False
    check: Future[dict[str, bool]] | None = None
    make: Future[list[str]] | None = None
    seen: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    right: set[str] = field(default_factory=set)
    attempts: int = 0
    takers: set[str] = field(default_factory=set)
    moved: float = 0.0
    done: int = 0

    @property
    def paths(self) -> str:
        """Its files, for people."""
        names = [entry.path for entry in self.bundle.entries]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def lose(self) -> None:
        """Forget what was known of its files: some of them turned out to be damaged."""
        self.held = self.proved = False
        self.right.clear()
        self.seen.clear()
