# SPDX-License-Identifier: Apache-2.0
"""The bridge, and per host a network namespace with a veth pair into it."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

from .settings import BRIDGE, BRIDGE_ADDRESS, NETNS_PREFIX, NETWORK, VETH_PREFIX, Host, LabError
from .system import mounts_below, run

NETNS_FOLDER = Path("/run/netns")


def links() -> dict[str, dict[str, Any]]:
    """All network links of this machine by name, as `ip -j address` describes them."""
    listed = json.loads(run(["ip", "-json", "address", "show"]).stdout or "[]")
    return {link["ifname"]: link for link in listed if "ifname" in link}


def check_addresses() -> None:
    """Raise LabError when another interface or a route uses the lab's network."""
    for name, link in links().items():
        if name == BRIDGE or name.startswith(VETH_PREFIX):
            continue
        for address in link.get("addr_info", []):
            if address.get("family") != "inet":
                continue
            other = ipaddress.ip_interface(f"{address['local']}/{address['prefixlen']}").network
            if other.overlaps(NETWORK):
                raise LabError(
                    f"{NETWORK} is needed for the lab, but interface {name} has "
                    f"{address['local']}/{address['prefixlen']}; free it and run this again",
                    changed=False,
                )


def ensure_bridge() -> None:
    if BRIDGE not in links():
        run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    run(["ip", "address", "replace", f"{BRIDGE_ADDRESS}/{NETWORK.prefixlen}", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])


def ensure_host(host: Host) -> None:
    """Give a host its namespace and a configured veth pair; what exists is kept."""
    if not (NETNS_FOLDER / host.netns).exists():
        run(["ip", "netns", "add", host.netns])
        # A link that outlived its namespace leads nowhere.
        run(["ip", "link", "delete", host.veth], check=False)
    inside = ["ip", "-netns", host.netns]
    run([*inside, "link", "set", "lo", "up"])
    if host.veth not in links():
        peer = ["peer", "name", "eth0", "netns", host.netns]
        run(["ip", "link", "add", host.veth, "type", "veth", *peer])
    run(["ip", "link", "set", host.veth, "master", BRIDGE, "up"])
    run([*inside, "address", "replace", f"{host.address}/{NETWORK.prefixlen}", "dev", "eth0"])
    run([*inside, "link", "set", "eth0", "up"])


def set_link(host: Host, *, up: bool) -> None:
    """Plug a host's cable in, or pull it."""
    run(["ip", "link", "set", host.veth, "up" if up else "down"])


def leftovers() -> list[str]:
    """Names of the namespaces and links of the lab that exist."""
    spaces = [path.name for path in NETNS_FOLDER.glob(f"{NETNS_PREFIX}*")]
    found = [f"network namespace {name}" for name in spaces]
    for name in links():
        if name == BRIDGE or name.startswith(VETH_PREFIX):
            found.append(f"link {name}")
    return found


def remove_all() -> list[str]:
    """Remove every namespace and link of the lab; returns what was removed."""
    removed = leftovers()
    for item in removed:
        kind, name = item.rsplit(" ", 1)
        if kind == "link":
            # A veth may already have gone with its namespace.
            run(["ip", "link", "delete", name], check=False)
        else:
            run(["ip", "netns", "delete", name])
    # Not Path.is_mount, which does not see a bind mount within one file system.
    if mounts_below(NETNS_FOLDER) and not any(NETNS_FOLDER.iterdir()):
        # `ip netns add` made this mount; it makes a new one when somebody needs it.
        run(["umount", NETNS_FOLDER], check=False)
    return removed
