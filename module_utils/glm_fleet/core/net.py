# SPDX-License-Identifier: Apache-2.0
"""Addresses and ports as text."""

from __future__ import annotations

import ipaddress


def join_endpoint(address: str, port: int) -> str:
    """Return ``address:port`` as HAProxy's configuration takes it, IPv6 in brackets."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return f"{address}:{port}"
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"
