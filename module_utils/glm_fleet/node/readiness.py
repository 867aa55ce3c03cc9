# SPDX-License-Identifier: Apache-2.0
"""The sentry of a node: tells the gateways whether what runs was attested.

An engine that died at night comes back by itself and answers ``/health``, and nobody is there
to attest it. So every gateway also asks the sentry (HAProxy's agent check, one line a second):
``up`` while the very start that runs was attested, ``down`` otherwise. A start that nobody
attests, because no controller is at work, the sentry attests itself.

It is not root: what it has attested, `helper` does for it.

Run as a program: ``python3 -m glm_fleet.sentry --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socketserver
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.http import local_http
from ..serving.deployment import POLICY, Places
from ..serving.evidence import EVIDENCE
from ..serving.policy import read_policy
from ..serving.record import START_RECORD, read_note, read_record
from .helper import ask

# Names the start of which the watch sees that it makes no progress.
STALLED = Path("/run/glm-fleet/watch/stalled")
# The last word that each gateway got, by its address: the watchdog waits until all were told.
TOLD = Path("/run/glm-fleet/sentry/told.json")
# A controller that waits for the start attests it within seconds.
_GRACE_S = 10.0
_LONGEST_PAUSE_S = 900.0


def answer(record: Path = START_RECORD, evidence: Path = EVIDENCE, stalled: Path = STALLED) -> str:
    """Return the line for HAProxy: ``up``, or ``down`` with the reason.

    HAProxy (2.6) takes no notice of a word that the reason follows without a space.
    """
    invocation = read_record(record).get("invocation", "")
    if not invocation:
        return "down #nothing was started"
    flag = read_note(stalled)
    # A flag that cannot be read was set for something.
    if flag.get("invocation") == invocation or (not flag and stalled.exists()):
        return "down #the engine makes no progress"
    if read_note(evidence).get("invocation") != invocation:
        return "down #not attested"
    return "up"


class Told:
    """Notes the last word of each gateway; what did not change is not written again."""

    def __init__(self, path: Path = TOLD) -> None:
        self._path = path
        self._words: dict[str, str] = {}
        self._lock = threading.Lock()

    def note(self, gateway: str, line: str) -> None:
        """Note what a gateway was answered. A full disk keeps no answer from it."""
        word = line.split()[0]
        with self._lock:
            if self._words.get(gateway) == word:
                return
            self._words[gateway] = word
            with contextlib.suppress(OSError):
                write_atomically(self._path, json.dumps(self._words) + "\n")


class Attestor:
    """Attests a start when no controller does. After each failure it waits longer."""

    def __init__(
        self,
        *,
        ready: Callable[[], bool],
        attested: Callable[[], bool],
        attest_now: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ready = ready
        self._attested = attested
        self._attest_now = attest_now
        self._clock = clock
        self._due = 0.0
        self._pause = _GRACE_S

    def look(self) -> None:
        """Look once; called every second."""
        if self._attested() or not self._ready():
            self._due, self._pause = 0.0, _GRACE_S
            return
        now = self._clock()
        if not self._due:
            self._due = now + _GRACE_S
        elif now >= self._due and not self._attest_now():
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
            self._due = self._clock() + self._pause


def attest_now() -> bool:
    """Have what runs attested; tell whether it passed, and say why not in the journal."""
    try:
        answer = ask({"do": "attest"})
    except FleetError as error:
        sys.stderr.write(f"sentry: {error}\n")
        return False
    sys.stderr.write(f"sentry: {answer['said']}\n")
    return answer["done"]


def is_ready(places: Places) -> bool:
    """Tell whether the server answers."""
    try:
        policy = read_policy(places.etc / POLICY)
    except FleetError:
        return False
    http = local_http(policy["port"], address=policy["address"], timeout_s=10)
    return http("/health")[0] == 200


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class _Handler(socketserver.BaseRequestHandler):
    told = Told()

    def handle(self) -> None:
        line = answer()
        self.request.sendall(f"{line}\n".encode())
        self.told.note(str(self.client_address[0]), line)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the end."""
    parser = argparse.ArgumentParser(description="Tells gateways whether this node is attested.")
    parser.add_argument("--bind", default="0.0.0.0", help="address to listen on")  # noqa: S104
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(argv)
    places = Places()
    watch = Attestor(
        ready=lambda: is_ready(places),
        attested=lambda: answer() == "up",
        attest_now=attest_now,
    )
    with _Server((options.bind, options.port), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while True:
            try:
                watch.look()
            except (FleetError, OSError) as error:
                sys.stderr.write(f"sentry: {error}\n")
            time.sleep(1.0)
