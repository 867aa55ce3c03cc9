# SPDX-License-Identifier: Apache-2.0
"""The server-state file: HAProxy's states, kept over a restart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import FleetError
from ..core.files import exclusive, write_atomically
from .haproxy import GatewayUnreachableError, Haproxy
from .statistics import STATE_FILE_VERSION, ServerState, parse_servers_state

STATE_FILE = "/var/lib/haproxy/server-state"
# Places in a line, by the header.
_WEIGHT, _WEIGHT_CONFIGURED = 7, 8
_HEADER = (
    "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight "
    "srv_iweight srv_time_since_last_change srv_check_status srv_check_result "
    "srv_check_health srv_check_state srv_agent_state bk_f_forced_id srv_f_forced_id "
    "srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port srv_check_addr srv_agent_addr "
    "srv_agent_port"
)


def save_states(
    haproxy: Haproxy,
    path: Path,
    endpoints: Mapping[str, str] | None = None,
    *,
    renamed: Mapping[str, str] | None = None,
    check_mode: bool = False,
) -> bool:
    """Write the admin states to the server-state file; true if that changes the file.

    With ``endpoints`` (server name to ``address:port``) only servers that keep their
    endpoint are written, so that a host that came under an old name does not inherit its
    state; ``renamed`` ({new name: old name}) are the hosts that only got another name, and
    keep theirs. Of a HAProxy that does not run the states last saved count. Raises `FleetError`.
    """
    if check_mode:
        return not is_saved(path, _states_to_keep(haproxy, path, endpoints, renamed))
    with state_lock(path):
        wanted = _states_to_keep(haproxy, path, endpoints, renamed)
        if is_saved(path, wanted):
            return False
        write_atomically(path, state_lines(wanted))
        return True


def state_lines(servers: Iterable[ServerState]) -> str:
    """Return the text of a server-state file for these servers.

    A server in maintenance gets no line: every server is `disabled` in the configuration,
    so one without a line starts in maintenance, which is what a node that was never
    attested must do. It is also the only way to let a changed port in: HAProxy (seen with
    2.6) takes the port from the state file over the one in its configuration.
    """
    lines = [STATE_FILE_VERSION, _HEADER]
    lines += [_own_weight(server.line) for server in servers if server.admin_state != "maint"]
    return "\n".join(lines) + "\n"


def _own_weight(line: str) -> str:
    """Return the line of a server with the weight of its configuration.

    Nobody of ours changes a weight. One that differs was set by a node's agent, under an earlier
    configuration that let agents do so, and would outlive it.
    """
    fields = line.split(" ")
    fields[_WEIGHT] = fields[_WEIGHT_CONFIGURED]
    return " ".join(fields)


def _states_to_keep(
    haproxy: Haproxy,
    path: Path,
    endpoints: Mapping[str, str] | None,
    renamed: Mapping[str, str] | None,
) -> list[ServerState]:
    try:
        servers = haproxy.servers()
    except GatewayUnreachableError:
        servers = _read(path) or []
    names = {old: new for new, old in (renamed or {}).items()}
    servers = [s.renamed(names[s.name]) if s.name in names else s for s in servers]
    return [s for s in servers if endpoints is None or s.is_at(endpoints.get(s.name, ""))]


def _read(path: Path) -> list[ServerState] | None:
    """Return what the server-state file says; None if it is missing or damaged."""
    try:
        return parse_servers_state(path.read_text(errors="replace"))
    except (FileNotFoundError, FleetError):
        return None


def is_saved(path: Path, servers: Iterable[ServerState]) -> bool:
    """Return whether the file says of these servers, and of no other, what they are now."""

    def keys(states: Iterable[ServerState]) -> set[tuple[str, str, str, str]]:
        return {
            (s.backend, s.name, s.endpoint, s.admin_state)
            for s in states
            if s.admin_state != "maint"
        }

    on_disk = _read(path)
    if on_disk is None or keys(on_disk) != keys(servers):
        return False
    return all(s.line == _own_weight(s.line) for s in on_disk if s.admin_state != "maint")


@contextmanager
def state_lock(path: Path) -> Iterator[None]:
    """Keep two writers from overwriting a newer dump with an older one."""
    try:
        with exclusive(Path(f"{path}.lock")):
            yield
    except OSError as error:
        raise FleetError(
            "The server-state file cannot be written",
            expected=f"a writable folder {path.parent}",
            found=str(error),
            remedy="check that haproxy is installed and that its disk is not full",
        ) from error
