# SPDX-License-Identifier: Apache-2.0
"""Talks to a running HAProxy over its runtime socket and keeps its admin states on disk.

A node takes traffic only in the admin state ``ready``. HAProxy forgets admin states on a
reload or restart unless it finds them in a server-state file, so every change made here
is followed by writing that file.
"""

from __future__ import annotations

import csv
import fcntl
import ipaddress
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import FleetError

BACKEND = "glm_nodes"
SOCKET = "/run/haproxy/admin.sock"
MASTER_SOCKET = "/run/haproxy-master.sock"
STATE_FILE = "/var/lib/haproxy/server-state"
STATES = ("ready", "drain", "maint")

_RELOAD_GAP_S = 3.0
_MENDING_S = 30.0

# How the configuration carries its own fingerprint: `description glm-fleet <revision>`.
_DESCRIPTION = "glm-fleet "
_STATE_FILE_VERSION = "1"

_HEADER = (
    "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight "
    "srv_iweight srv_time_since_last_change srv_check_status srv_check_result "
    "srv_check_health srv_check_state srv_agent_state bk_f_forced_id srv_f_forced_id "
    "srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port srv_check_addr srv_agent_addr "
    "srv_agent_port"
)

# Bits of srv_admin_state. The "configured as disabled" mark (0x04) stays set on a server
# that was made ready later, so it says nothing about the present.
_MAINT = 0x01 | 0x02 | 0x20 | 0x40
_DRAIN = 0x08 | 0x10

Transport = Callable[[str], str]
"""Sends one command line and returns the whole reply; raises `GatewayUnreachableError`."""


class GatewayUnreachableError(FleetError):
    """HAProxy's runtime socket does not answer."""


class UnknownServerError(FleetError):
    """HAProxy runs, but has no such server in such a backend."""


@dataclass(frozen=True)
class ServerState:
    """One line of ``show servers state``: who it is and what the operator wants of it.

    ``endpoint`` is ``address:port`` with the name as configured, or the IP address.
    """

    backend: str
    name: str
    endpoint: str
    admin_state: str
    line: str


@dataclass(frozen=True)
class Statistics:
    """One server line of ``show stat``.

    ``status`` is UP, DOWN, DRAIN or MAINT; ``settled`` is true when every check of the
    last round passed, so that a server that was never checked does not count as up.
    """

    status: str
    settled: bool
    check: str
    sessions_current: int
    sessions_total: int
    weight: int
    last_change_s: int


@dataclass(frozen=True)
class Change:
    """What `ensure_state` did, or in check mode would do."""

    before: str
    after: str
    changed: bool
    sessions: int


def unix_transport(
    path: str, *, timeout: float = 10.0, patience: float = _RELOAD_GAP_S
) -> Transport:
    """Return a `Transport` over the UNIX socket at ``path``.

    ``timeout`` is for each reply, ``patience`` how long nobody may listen, both in seconds.
    """

    def ask(command: str) -> str:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                _connect(connection, path, patience)
                connection.sendall(command.encode() + b"\n")
                # The master's socket keeps the connection open until our side is closed.
                connection.shutdown(socket.SHUT_WR)
                reply = b"".join(iter(lambda: connection.recv(65536), b""))
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


def _connect(connection: socket.socket, path: str, patience: float) -> None:
    # On a reload the master binds its socket anew a moment after the new worker is there, on
    # a restart there is none for a while.
    deadline = time.monotonic() + patience
    while True:
        try:
            return connection.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


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
            raise _unexpected("show info", "a line 'Name: HAProxy'", str(fields))
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

    def set_state(self, backend: str, name: str, state: str) -> None:
        """Set the admin state; raises `FleetError` with HAProxy's words on a refusal."""
        command = f"set server {backend}/{name} state {state}"
        reply = self._ask(command).strip()
        # On success HAProxy answers with an empty line; every word is a complaint.
        if reply:
            raise _unexpected(command, "an empty reply", reply)


def parse_servers_state(text: str) -> list[ServerState]:
    """Parse ``show servers state``, which is also the format of the server-state file."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2 or lines[0].strip() != _STATE_FILE_VERSION or lines[1][:2] != "# ":
        raise _unexpected("show servers state", "version 1 and a header line", text[:200])
    columns = lines[1][2:].split()
    servers = []
    for line in lines[2:]:
        row = dict(zip(columns, line.split(" ")))
        try:
            bits = int(row["srv_admin_state"])
            address = row["srv_fqdn"] if row["srv_fqdn"] != "-" else row["srv_addr"]
            endpoint = join_endpoint(address, int(row["srv_port"]))
            names = row["be_name"], row["srv_name"]
        except (KeyError, ValueError) as error:
            raise _unexpected("show servers state", "a line per server", line) from error
        state = "maint" if bits & _MAINT else "drain" if bits & _DRAIN else "ready"
        servers.append(ServerState(*names, endpoint, state, line.rstrip()))
    return servers


def parse_statistics(text: str) -> dict[tuple[str, str], Statistics]:
    """Parse the CSV of ``show stat``; frontends and backend sums are left out."""
    text = text.lstrip()
    if not text.startswith("# pxname,"):
        raise _unexpected("show stat", "a CSV table", text[:200])
    found = {}
    for row in csv.DictReader(text[2:].splitlines()):
        if row["svname"] in ("FRONTEND", "BACKEND"):
            continue
        # "* " marks a check in progress, "UP 1/3" a server on its way down or up.
        check = row["check_status"].removeprefix("* ")
        found[row["pxname"], row["svname"]] = Statistics(
            status="DRAIN" if row["status"] == "NOLB" else row["status"].split(" ")[0],
            settled=row["status"] == "UP" and check in ("L4OK", "L6OK", "L7OK"),
            check=" ".join(part for part in (check, row.get("last_chk", "")) if part),
            sessions_current=int(row["scur"] or 0),
            sessions_total=int(row["stot"] or 0),
            weight=int(row["weight"] or 0),
            last_change_s=int(row["lastchg"] or 0),
        )
    return found


def parse_old_workers(text: str) -> list[int]:
    """Return the process ids of the workers that a reload left behind (``show proc``)."""
    pids: list[int] = []
    old = False
    for line in text.splitlines():
        if line.startswith("# "):
            old = line.strip() == "# old workers"
        elif old and line.split()[1:2] == ["worker"]:
            pids.append(int(line.split()[0]))
    return pids


def join_endpoint(address: str, port: int) -> str:
    """Return ``address:port`` as HAProxy's configuration takes it, IPv6 in brackets."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return f"{address}:{port}"
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"


def node_endpoints(
    hostvars: Mapping[str, Any], nodes: Sequence[str], default_port: int
) -> dict[str, str]:
    """Return where the gateway reaches each node, by inventory name."""
    endpoints = {}
    for node in nodes:
        variables = hostvars[node]
        address = variables.get("gateway_node_address") or variables.get("ansible_host") or node
        port = int(variables.get("serving_port") or default_port)
        endpoints[node] = join_endpoint(str(address), port)
    return endpoints


def describe(haproxy: Haproxy) -> dict[str, Any]:
    """Return what ``haproxy_info`` reports; a gateway that does not answer is not valid."""
    report: dict[str, Any] = {
        "valid": False,
        "version": "",
        "revision": "",
        "uptime_s": 0,
        "servers": [],
        "errors": [],
    }
    try:
        info = haproxy.info()
        statistics = haproxy.statistics()
        servers = haproxy.servers()
        report.update(
            version=info.get("Version", ""),
            revision=haproxy.revision(),
            uptime_s=int(info.get("Uptime_sec", "0")),
            servers=[
                {
                    "name": server.name,
                    "backend": server.backend,
                    "address": server.endpoint.rpartition(":")[0],
                    "port": int(server.endpoint.rpartition(":")[2]),
                    "admin_state": server.admin_state,
                    **_public(statistics[server.backend, server.name]),
                    "sessions_current": haproxy.sessions(server.backend, server.name),
                }
                for server in servers
            ],
        )
    except FleetError as error:
        report["errors"].append(str(error))
    report["valid"] = not report["errors"]
    return report


def ensure_state(
    haproxy: Haproxy,
    backend: str,
    name: str,
    state: str,
    *,
    state_file: Path,
    wait: bool,
    timeout: float,
    min_ready: int = 0,
    fail_when_busy: bool = True,
    check_mode: bool = False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Change:
    """Bring a server into ``state``, keep that on disk, and with ``wait`` see it happen.

    Waiting means: for drain and maint until no request runs on the server, for ready
    until its health check has passed. ``timeout`` is in seconds. Raises `FleetError`;
    a server that does not become ready in time is put back, one that does not empty in
    time stays drained, which is an error unless ``fail_when_busy`` is false.

    A server that takes requests is taken out only if ``min_ready`` others go on taking them;
    they get half a minute to come back, and two callers do not count on each other.
    """

    def too_few() -> FleetError | None:
        statistics = haproxy.statistics()
        taking = {
            server.name
            for server in haproxy.servers()
            if server.backend == backend
            and server.admin_state == "ready"
            and statistics[backend, server.name].status == "UP"
        }
        others = sorted(taking - {name})
        if name not in taking or len(others) >= min_ready:
            return None
        return FleetError(
            f"{name} cannot be taken out of service",
            expected=f"at least {min_ready} other nodes that take requests (serve_min_ready)",
            found=f"{len(others)}: {', '.join(others) or 'none'}",
            remedy="mend or join the other nodes first, or allow an outage with a lower "
            "serve_min_ready",
        )

    def not_up() -> FleetError | None:
        server = haproxy.statistics()[backend, name]
        if server.settled:
            return None
        return FleetError(
            f"{name} did not become ready at the gateway",
            expected=f"health check passed within {timeout:g} s",
            found=f"{server.status}, last check {server.check or 'not yet made'}",
            remedy=f"ask the node for /health from the gateway; {name} was put back to {before}",
        )

    def not_idle() -> FleetError | None:
        sessions = haproxy.sessions(backend, name)
        if sessions == 0:
            return None
        return FleetError(
            f"{name} still has requests running",
            expected=f"no request left within {timeout:g} s",
            found=f"{sessions} running",
            remedy=f"wait longer, or accept that they are cut; {name} takes no new ones",
            details={"sessions": sessions},
        )

    before = haproxy.server(backend, name).admin_state
    changed = before != state
    if check_mode:
        changed = changed or not _saved(state_file, haproxy.servers())
        return Change(before, state, changed, haproxy.sessions(backend, name))
    if changed and state != "ready":
        with _locked(state_file.with_name(f"{state_file.name}.turn")):
            _wait_while(too_few, _MENDING_S, clock, sleep)
            haproxy.set_state(backend, name, state)
    elif changed:
        haproxy.set_state(backend, name, state)
    if wait and state == "ready":
        try:
            _wait_while(not_up, timeout, clock, sleep)
        except FleetError:
            haproxy.set_state(backend, name, before)
            raise
    # Before the long wait for the last request: should HAProxy restart meanwhile, the
    # server stays out.
    saved = save_states(haproxy, state_file)
    if wait and state != "ready":
        try:
            _wait_while(not_idle, timeout, clock, sleep)
        except FleetError:
            if fail_when_busy:
                raise
    return Change(before, state, changed or saved, haproxy.sessions(backend, name))


def save_states(
    haproxy: Haproxy,
    path: Path,
    endpoints: Mapping[str, str] | None = None,
    *,
    check_mode: bool = False,
) -> bool:
    """Write the admin states to the server-state file; true if that changes the file.

    With ``endpoints`` (server name to ``address:port``) only servers that keep their
    endpoint are written, so that a host that came under an old name does not inherit its
    state. Of a HAProxy that does not run the states last saved count. Raises `FleetError`.
    """
    if check_mode:
        return not _saved(path, _states_to_keep(haproxy, path, endpoints))
    with _locked(path):
        wanted = _states_to_keep(haproxy, path, endpoints)
        if _saved(path, wanted):
            return False
        _write(path, state_lines(wanted))
        return True


def state_lines(servers: Iterable[ServerState]) -> str:
    """Return the text of a server-state file for these servers.

    A server in maintenance gets no line: every server is `disabled` in the configuration,
    so one without a line starts in maintenance, which is what a node that was never
    attested must do. It is also the only way to let a changed port in: HAProxy (seen with
    2.6) takes the port from the state file over the one in its configuration.
    """
    lines = [_STATE_FILE_VERSION, _HEADER]
    lines += [server.line for server in servers if server.admin_state != "maint"]
    return "\n".join(lines) + "\n"


def _public(statistics: Statistics) -> dict[str, Any]:
    fields = asdict(statistics)
    del fields["settled"]
    return fields


def _states_to_keep(
    haproxy: Haproxy, path: Path, endpoints: Mapping[str, str] | None
) -> list[ServerState]:
    try:
        servers = haproxy.servers()
    except GatewayUnreachableError:
        servers = _read(path) or []
    return [s for s in servers if endpoints is None or endpoints.get(s.name) == s.endpoint]


def _read(path: Path) -> list[ServerState] | None:
    """Return what the server-state file says; None if it is missing or damaged."""
    try:
        return parse_servers_state(path.read_text())
    except (FileNotFoundError, FleetError):
        return None


def _saved(path: Path, servers: Iterable[ServerState]) -> bool:
    """Return whether the file says of these servers, and of no other, what they are now."""

    def keys(states: Iterable[ServerState]) -> set[tuple[str, str, str, str]]:
        return {
            (s.backend, s.name, s.endpoint, s.admin_state)
            for s in states
            if s.admin_state != "maint"
        }

    on_disk = _read(path)
    return on_disk is not None and keys(on_disk) == keys(servers)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep two writers from overwriting a newer dump with an older one."""
    try:
        with Path(f"{path}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise FleetError(
            "The server-state file cannot be written",
            expected=f"a writable folder {path.parent}",
            found=str(error),
            remedy="check that haproxy is installed and that its disk is not full",
        ) from error


def _write(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink()
        raise


def _wait_while(
    problem: Callable[[], FleetError | None],
    timeout: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Ask for the problem until there is none, or raise it after ``timeout`` seconds."""
    deadline = clock() + timeout
    while (error := problem()) is not None:
        if clock() >= deadline:
            raise error
        sleep(0.5)


def _unexpected(command: str, expected: str, found: str) -> FleetError:
    return FleetError(
        f"HAProxy answered '{command}' in an unexpected way",
        expected=expected,
        found=found.strip() or "nothing",
        remedy="check that the socket has `level admin` and belongs to HAProxy 2.6 or newer",
    )
