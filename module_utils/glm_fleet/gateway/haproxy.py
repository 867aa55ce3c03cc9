# SPDX-License-Identifier: Apache-2.0
"""Talks to a running HAProxy over its runtime socket and keeps its admin states on disk.

A node takes traffic only in the admin state ``ready``. HAProxy forgets admin states on a
reload or restart unless it finds them in a server-state file, so every change made here
is followed by writing that file.
"""

from __future__ import annotations

import hashlib
import re
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from ..core.errors import FleetError
from ..core.format import parse_count
from .statistics import (
    ClientUsage,
    ServerState,
    Statistics,
    parse_clients,
    parse_old_workers,
    parse_servers_state,
    parse_statistics,
    parse_waiting,
    row_of,
    unexpected_answer,
)

BACKEND = "glm_nodes"
# The table that counts what clients do.
CLIENTS = "glm_clients"
# The table that remembers where conversations had to go; its numbers are a place in a line of
# `show servers state`.
CONVERSATIONS = "glm_conversations"
_SERVER_ID = 2
SOCKET = "/run/haproxy/admin.sock"
MASTER_SOCKET = "/run/haproxy-master.sock"
STATES = ("ready", "drain", "maint")
_RELOAD_GAP_S = 3.0
# How the configuration carries its own fingerprint: `description glm-fleet <revision>`.
_DESCRIPTION = "glm-fleet "
Transport = Callable[[str], str]


class GatewayUnreachableError(FleetError):
    """HAProxy's runtime socket does not answer."""


class UnknownServerError(FleetError):
    """HAProxy runs, but has no such server in such a backend."""


def unix_transport(
    path: str, *, timeout: float = 10.0, patience: float = _RELOAD_GAP_S
) -> Transport:
    """Return a `Transport` over the UNIX socket at ``path``.

    ``timeout`` is for each reply, ``patience`` how long nobody may answer, both in seconds.
    """

    def once(command: str) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(path)
            connection.sendall(command.encode() + b"\n")
            # The master's socket keeps the connection open until our side is closed.
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def ask(command: str) -> str:
        # On a reload the master binds its socket anew a moment after the new worker is there,
        # on a restart there is none for a while. HAProxy that ends while it is asked says
        # nothing, not even an empty line; every command can be repeated.
        deadline = time.monotonic() + patience
        try:
            while True:
                late = time.monotonic() >= deadline
                try:
                    reply = once(command)
                except (ConnectionError, FileNotFoundError):
                    if late:
                        raise
                else:
                    if reply or late:
                        break
                time.sleep(0.1)
        except OSError as error:
            raise GatewayUnreachableError(
                "HAProxy's runtime socket does not answer",
                expected=f"a reply to '{command}' on {path}",
                found=str(error),
                remedy="look at `systemctl status haproxy` on the gateway, then run "
                "playbooks/gateway.yml",
            ) from error
        return reply.decode(errors="replace")

    return ask


@dataclass(frozen=True)
class Certificate:
    """A certificate that HAProxy serves with; ``expires_s`` in seconds since 1970."""

    path: str
    expires_s: float


def _seconds(text: str) -> float:
    """Read a time as OpenSSL prints it, such as ``Nov 27 12:00:00 2027 GMT``."""
    parsed = datetime.strptime(text, "%b %d %H:%M:%S %Y %Z")
    return parsed.replace(tzinfo=timezone.utc).timestamp()


def is_edited(configuration: str) -> bool:
    """Tell whether a configuration is not as it was written: it carries its own fingerprint."""
    found = re.search(rf"^\s*description {_DESCRIPTION}([0-9a-f]{{12}})$", configuration, re.M)
    if not found:
        return True
    written = configuration[: found.start(1)] + configuration[found.end(1) :]
    return not hashlib.sha256(written.encode()).hexdigest().startswith(found[1])


def serves(configuration: str) -> str:
    """Tell how a configuration of ours serves clients: "tls" or "clear"; "" if it is none."""
    if not re.search(rf"^\s*description {_DESCRIPTION}", configuration, re.M):
        return ""
    front = re.search(r"^frontend glm$(.*?)(?=^\S|\Z)", configuration, re.M | re.DOTALL)
    bind = re.search(r"^\s+bind .*$", front[1], re.M) if front else None
    if not bind:
        return ""
    return "tls" if " ssl " in bind[0] else "clear"


class Haproxy:
    """A running HAProxy: the present worker and, over the master, the workers before it.

    A reload leaves the old worker alive until its last stream ends. It no longer answers
    on the runtime socket, so its streams are counted through ``ask_master``; without it
    only the present worker is seen.
    """

    def __init__(self, ask: Transport, ask_master: Transport | None = None) -> None:
        self._ask = ask
        self._ask_master = ask_master

    def info(self) -> dict[str, str]:
        """Return ``show info`` as it is, one string per field."""
        lines = (line.partition(":") for line in self._ask("show info").splitlines())
        fields = {key.strip(): value.strip() for key, colon, value in lines if colon}
        if fields.get("Name") != "HAProxy":
            raise unexpected_answer("show info", "a line 'Name: HAProxy'", str(fields))
        return fields

    def revision(self) -> str:
        """Return the fingerprint of the configuration that runs; empty if not ours."""
        description = self.info().get("description", "")
        if not description.startswith(_DESCRIPTION):
            return ""
        return description[len(_DESCRIPTION) :]

    def servers(self) -> list[ServerState]:
        """Return every server of every backend."""
        return parse_servers_state(self._ask("show servers state"))

    def server(self, backend: str, name: str) -> ServerState:
        """Return one server; raises `UnknownServerError`."""
        servers = self.servers()
        for server in servers:
            if (server.backend, server.name) == (backend, name):
                return server
        known = ", ".join(f"{s.backend}/{s.name}" for s in servers) or "none"
        raise UnknownServerError(
            f"HAProxy knows no server {backend}/{name}",
            expected=f"server {name} in backend {backend}",
            found=f"servers: {known}",
            remedy="add the host to gpu_nodes and run playbooks/gateway.yml",
        )

    def statistics(self) -> dict[tuple[str, str], Statistics]:
        """Return the statistics of the present worker, by backend and server."""
        return parse_statistics(self._ask("show stat"))

    def waiting(self) -> int:
        """Return the requests that wait until a node takes them."""
        return parse_waiting(self._ask("show stat"))

    def clients(self) -> list[ClientUsage]:
        """Return what each client did since the start or the last reload, by name."""
        return parse_clients(self._ask(f"show table {CLIENTS}"))

    def sessions(self, backend: str, name: str) -> int:
        """Return the requests that run on a server, those of old workers included."""
        replies = [self._ask("show stat")]
        if self._ask_master is not None:
            replies += [
                self._ask_master(f"@!{pid} show stat")
                for pid in parse_old_workers(self._ask_master("show proc"))
            ]
        total = 0
        # An old worker may end between the two questions: the master then answers with a
        # sentence instead of a table, and that worker has no sessions left.
        for number, reply in enumerate(replies):
            if number > 0 and not reply.lstrip().startswith("# pxname"):
                continue
            server = parse_statistics(reply).get((backend, name))
            total += server.sessions_current if server else 0
        return total

    def certificate_files(self) -> list[str]:
        """Return the files of certificates that HAProxy serves with; none in clear text."""
        lines = [line.strip() for line in self._ask("show ssl cert").splitlines()]
        return [line for line in lines if line and not line.startswith(("#", "*", "Unknown", "'"))]

    def certificates(self) -> list[Certificate]:
        """Return the certificates that HAProxy serves with, and when each expires."""
        found = []
        for path in self.certificate_files():
            text = self._ask(f"show ssl cert {path}")
            until = re.search(r"^\s*Not After:\s*(.+)$", text, re.MULTILINE | re.IGNORECASE)
            until = until or re.search(r"^\s*notAfter:\s*(.+)$", text, re.MULTILINE)
            if until:
                found.append(Certificate(path, _seconds(until[1].strip())))
        return found

    def set_state(self, backend: str, name: str, state: str) -> None:
        """Set the admin state; raises `FleetError` with HAProxy's words on a refusal.

        What is ready takes requests: also a weight of 0, which somebody set, is taken back.
        """
        self._set(f"set server {backend}/{name} state {state}")
        if state == "ready":
            self._set(f"set server {backend}/{name} weight 100%")
            return
        # A conversation that is remembered on a node goes there even while it is drained. From here
        # on none is remembered there anew. A HAProxy without that table says so.
        number = self.server(backend, name).line.split(" ")[_SERVER_ID]
        self._ask(f"clear table {CONVERSATIONS} data.server_id eq {number}")

    def set_endpoint(self, backend: str, name: str, endpoint: str) -> None:
        """Send a server's requests and checks to another endpoint, ``address:port``.

        It counts as down until a check there has passed: what was true of the old one is not.
        """
        host, _, port = endpoint.rpartition(":")
        address = resolve_address(host.strip("[]"))
        self._set(f"set server {backend}/{name} health down")
        command = f"set server {backend}/{name} addr {address} port {port}"
        reply = self._ask(command).strip()
        if not re.search(r"changed from|no need to change", reply):
            raise unexpected_answer(command, "a word about what changed", reply)

    def _set(self, command: str) -> None:
        reply = self._ask(command).strip()
        # On success HAProxy answers with an empty line; every word is a complaint.
        if reply:
            raise unexpected_answer(command, "an empty reply", reply)


def resolve_address(host: str) -> str:
    """Return the IP address of a name, as this gateway knows it. Raises `FleetError`."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise FleetError(
            f"The gateway does not know the host {host}",
            found=str(error),
            remedy="correct ansible_host or gateway_node_address, or the gateway's name service",
        ) from error


def describe(haproxy: Haproxy) -> dict[str, Any]:
    """Return what ``haproxy_info`` reports; a gateway that does not answer is not valid."""
    report: dict[str, Any] = {
        "valid": False,
        "version": "",
        "revision": "",
        "uptime_s": 0,
        "tls": False,
        "servers": [],
        "waiting": 0,
        "clients": [],
        "errors": [],
    }
    try:
        info = haproxy.info()
        statistics = haproxy.statistics()
        servers = haproxy.servers()
        report.update(
            version=info.get("Version", ""),
            revision=haproxy.revision(),
            tls=bool(haproxy.certificate_files()),
            uptime_s=parse_count(info.get("Uptime_sec", "")) or 0,
            servers=[
                {
                    "name": server.name,
                    "backend": server.backend,
                    "address": server.endpoint.rpartition(":")[0],
                    "port": int(server.endpoint.rpartition(":")[2]),
                    "admin_state": server.admin_state,
                    **_public(row_of(statistics, server.backend, server.name)),
                    "sessions_current": haproxy.sessions(server.backend, server.name),
                }
                for server in servers
            ],
            waiting=haproxy.waiting(),
            clients=[asdict(client) for client in haproxy.clients()],
        )
    except FleetError as error:
        report["errors"].append(str(error))
    report["valid"] = not report["errors"]
    return report


def _public(statistics: Statistics) -> dict[str, Any]:
    fields = asdict(statistics)
    del fields["settled"]
    return fields
