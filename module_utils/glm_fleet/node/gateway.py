# SPDX-License-Identifier: Apache-2.0
"""What a gateway tells about itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from ..core.runner import Runner
from .query import TIMEOUT_S, NodeQuery


def read_gateway(query: NodeQuery, run: Runner) -> dict[str, Any]:
    """Return what HAProxy says of itself, of its configuration on disk and as a client sees it."""
    from ..fleet.lock import FleetLock
    from ..gateway.client_store import ClientStore
    from ..gateway.haproxy import MASTER_SOCKET, SOCKET, Haproxy, describe, unix_transport

    haproxy = Haproxy(unix_transport(SOCKET), unix_transport(MASTER_SOCKET))
    found = describe(haproxy)
    # One that did not answer within its patience is not waited for a second time.
    found["certificates"] = read_certificates(haproxy) if found["version"] else []
    found["config_edited"] = was_edited(Path(query.gateway_config))
    found["config_error"] = check_config(query.gateway_config, run)
    # As it runs, which can be another way than the inventory says.
    scheme = "https" if found["tls"] else "http"
    found["client"] = ask_as_client(f"{scheme}://{query.front_door}", ClientStore().own_key)
    try:
        found["held"] = FleetLock().held()
    except FleetError as error:
        found["held_error"] = str(error)
    return found


def read_certificates(haproxy: Any) -> list[dict[str, Any]]:
    """Return {path, expires_s} of each certificate that HAProxy serves with."""
    try:
        return [vars(each) for each in haproxy.certificates()]
    except (FleetError, ValueError):
        return []


def was_edited(path: Path) -> bool:
    """Tell whether somebody changed the configuration by hand since it was written."""
    from ..gateway.haproxy import is_edited

    try:
        return is_edited(path.read_text(errors="replace"))
    except OSError:
        return False


def check_config(path: str, run: Runner) -> str:
    """Return HAProxy's complaint about a configuration, '' when it is valid."""
    try:
        answer = run(["haproxy", "-c", "-q", "-f", path], timeout=TIMEOUT_S, check=False)
    except FleetError as error:
        return f"{error.message}: {error.found}"
    if answer.rc == 0:
        return ""
    lines = [line for line in answer.stderr.splitlines() if "[ALERT]" in line]
    return " ".join((lines or answer.stderr.splitlines() or ["it is not valid"])[0].split())[:300]


def ask_as_client(url: str, key_file: Path) -> dict[str, Any]:
    """Ask the gateway's own front door for its models: {status, seconds, node, error}.

    ``key_file`` holds the gateway's own key. A gateway that was set up before it had one lets
    every path through, and is asked for a node's health.
    """
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    begun = time.monotonic()
    result: dict[str, Any] = {"status": 0, "node": "", "error": ""}
    # From the gateway to itself, where the certificate's name cannot match.
    context = ssl._create_unverified_context() if url.startswith("https") else None  # noqa: S323
    try:
        request = urllib.request.Request(f"{url}/health")  # noqa: S310
        if key_file.is_file():
            request = urllib.request.Request(f"{url}/v1/models")  # noqa: S310
            request.add_header("Authorization", f"Bearer {key_file.read_text()}")
        answer = urllib.request.urlopen(request, timeout=10, context=context)  # noqa: S310
    except urllib.error.HTTPError as error:
        result.update(status=error.code, node=error.headers.get("X-Glm-Fleet-Node", ""))
        error.close()
    except (OSError, http.client.HTTPException) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    else:
        with answer:
            answer.read()
        result.update(status=answer.status, node=answer.headers.get("X-Glm-Fleet-Node", ""))
    return {**result, "seconds": round(time.monotonic() - begun, 4)}
