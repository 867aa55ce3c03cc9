# SPDX-License-Identifier: Apache-2.0
"""What the attestation of a node expects, and the key that its server asks for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..core.errors import FleetError


def read_api_key(environment_file: Path) -> str:
    """Return the key that clients have to send, '' if there is none."""
    try:
        text = environment_file.read_text()
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "VLLM_API_KEY":
            return "".join(shlex.split(value))
    return ""


def read_policy(path: Path) -> dict[str, Any]:
    """Return what the attestation of this node expects.

    Shape: {address, port, served_model_name, required, forbidden}.
    """
    try:
        policy = json.loads(path.read_text())
        return {
            "address": str(policy.get("address") or "127.0.0.1"),
            "port": int(policy["port"]),
            "served_model_name": str(policy["served_model_name"]),
            "required": list(policy["required"]),
            "forbidden": list(policy["forbidden"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetError(
            "This node has no attestation policy",
            expected=f"port, served_model_name, required and forbidden as JSON in {path}",
            found=f"{type(error).__name__}: {error}",
            remedy="run site.yml: the node is not set up to serve",
        ) from error
