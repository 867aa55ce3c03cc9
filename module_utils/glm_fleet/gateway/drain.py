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
from .statistics import row_of

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
    endpoint: str = "",
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

    With ``endpoint`` (``address:port``) a server that becomes ready is reached there from then on,
    and counts as ready when its check has passed there.
    """
    server = _Server(haproxy, backend, name, state_file, timeout, clock, sleep)
    known = haproxy.server(backend, name)
    before, moved = known.admin_state, bool(endpoint) and not known.is_at(endpoint)
    changed = before != state or moved
    if check_mode:
        changed = changed or not is_saved(state_file, haproxy.servers())
        return Change(before, state, changed, haproxy.sessions(backend, name))
    if moved:
        haproxy.set_endpoint(backend, name, endpoint)
    if changed and state != "ready":
        server.take_out(state, min_ready)
    elif changed:
        haproxy.set_state(backend, name, state)
    if wait and state == "ready":
        server.await_up(before, known.address if moved else "")
    # Before the long wait for the last request: should HAProxy restart meanwhile, the
    # server stays out.
    saved = server.save(before)
    if wait and state != "ready":
        server.await_idle(state, fail_when_busy)
    return Change(before, state, changed or saved, haproxy.sessions(backend, name))


@dataclass(frozen=True)
class _Server:
    """One server at one gateway, and what still stands against a change of its state."""

    haproxy: Haproxy
    backend: str
    name: str
    state_file: Path
    timeout: float
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def take_out(self, state: str, min_ready: int) -> None:
        """Let the server take no more requests, as soon as enough others take them."""
        with state_lock(self.state_file.with_name(f"{self.state_file.name}.turn")):
            self._wait_while(lambda: self.too_few_others(min_ready), _MENDING_S)
            self.haproxy.set_state(self.backend, self.name, state)

    def await_up(self, before: str, endpoint_before: str) -> None:
        """Wait until the gateway sends it requests; put it back where it does not."""
        try:
            self._wait_while(lambda: self.not_up(before), self.timeout)
        except FleetError:
            if endpoint_before:
                self.haproxy.set_endpoint(self.backend, self.name, endpoint_before)
            self.haproxy.set_state(self.backend, self.name, before)
            raise

    def save(self, before: str) -> bool:
        """Keep the state on disk; put the server back where that fails."""
        try:
            return save_states(self.haproxy, self.state_file)
        except FleetError:
            # What is not on disk would be another thing after a restart of HAProxy.
            self.haproxy.set_state(self.backend, self.name, before)
            raise

    def await_idle(self, state: str, fail_when_busy: bool) -> None:
        """Wait for its last request."""
        try:
            self._wait_while(lambda: self.not_idle(state), self.timeout)
        except FleetError:
            if fail_when_busy:
                raise

    def too_few_others(self, min_ready: int) -> FleetError | None:
        """Return why a server that takes requests must go on taking them."""
        statistics = self.haproxy.statistics()
        taking = {
            server.name
            for server in self.haproxy.servers()
            if server.backend == self.backend
            and server.admin_state == "ready"
            and row_of(statistics, self.backend, server.name).status == "UP"
        }
        others = sorted(taking - {self.name})
        if self.name not in taking or len(others) >= min_ready:
            return None
        return FleetError(
            f"{self.name} cannot be taken out of service",
            expected=f"at least {min_ready} other nodes that take requests (serve_min_ready)",
            found=f"{len(others)}: {', '.join(others) or 'none'}",
            remedy="mend or join the other nodes first, or allow an outage with a lower "
            "serve_min_ready",
        )

    def not_up(self, before: str) -> FleetError | None:
        """Return why the gateway sends it nothing yet."""
        server = row_of(self.haproxy.statistics(), self.backend, self.name)
        if server.settled:
            return None
        return FleetError(
            f"{self.name} did not become ready at the gateway",
            expected=f"health check passed within {self.timeout:g} s",
            found=f"{server.status}, last check {server.check or 'not yet made'}",
            remedy=f"ask the node for /health from the gateway; {self.name} was put back to "
            f"{before}",
        )

    def not_idle(self, state: str) -> FleetError | None:
        """Return how many requests still run, and keep it in ``state`` meanwhile."""
        # A restart between the change and its note on disk brings back the state before.
        if self.haproxy.server(self.backend, self.name).admin_state != state:
            self.haproxy.set_state(self.backend, self.name, state)
            save_states(self.haproxy, self.state_file)
        sessions = self.haproxy.sessions(self.backend, self.name)
        if sessions == 0:
            return None
        return FleetError(
            f"{self.name} still has requests running",
            expected=f"no request left within {self.timeout:g} s",
            found=f"{sessions} running",
            remedy=f"wait longer, or accept that they are cut; {self.name} takes no new ones",
            details={"sessions": sessions},
        )

    def _wait_while(self, problem: Callable[[], FleetError | None], timeout: float) -> None:
        """Ask for the problem until there is none, or raise it after ``timeout`` seconds."""
        deadline = self.clock() + timeout
        while (error := problem()) is not None:
            if self.clock() >= deadline:
                raise error
            self.sleep(0.5)
