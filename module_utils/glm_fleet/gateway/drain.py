# SPDX-License-Identifier: Apache-2.0
"""Taking a server out of service at a gateway, and letting it back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FleetError
from .haproxy import Haproxy
from .state_file import is_saved, save_states, state_lock

_MENDING_S = 30.0


@dataclass(frozen=True)
class Change:
    """What `ensure_state` did, or in check mode would do."""

    before: str
    after: str
    changed: bool
    sessions: int


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
        # A restart between the change and its note on disk brings back the state before.
        if haproxy.server(backend, name).admin_state != state:
            haproxy.set_state(backend, name, state)
            save_states(haproxy, state_file)
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
        changed = changed or not is_saved(state_file, haproxy.servers())
        return Change(before, state, changed, haproxy.sessions(backend, name))
    if changed and state != "ready":
        with state_lock(state_file.with_name(f"{state_file.name}.turn")):
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
