# SPDX-License-Identifier: Apache-2.0
"""Watches the engine of this node and restarts one that no longer moves.

An engine hangs when somebody waits for it and nothing that it counts changes: no step, no token
read or written, no request, no part of the KV cache. Whether it is busy does not matter: a busy
one moves. When nobody waits, the watch itself asks for one token.

The gateway is told first, by way of the sentry, which HAProxy asks every second: it says
``down`` while the file `sentry.STALLED` names the start that runs. The next start is another
one, of which the sentry says ``down`` until it is attested: there is no moment in between.

Run as a program: ``python3 -m glm_fleet.watch --help``.
"""

from __future__ import annotations

import argparse
import calendar
import json
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from ..core.decode import read
from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.http import Http, local_http
from ..core.procfs import Process, list_processes
from ..core.runner import Runner, run_program
from ..core.systemd import journal, unit_state
from ..serving.client import complete
from ..serving.engine import ENVIRONMENT_PATH, POLICY_PATH, progress_mark, read_sample
from ..serving.policy import Policy, read_api_key, read_policy
from ..serving.probe import Nothing, Sample
from ..serving.record import read_note
from .helper import Answer, Question, ask
from .prestart import left_over
from .readiness import STALLED, TOLD

FINE = "fine"
SUSPECT = "suspect"
HUNG = "hung"
# The name of the thread that waits for a canary.
CANARY = "glm-fleet canary"
_HOUR_S = 3600.0
# A gateway asks every second: one that did not within this time is gone.
_TELL_S = 3.0
_PAUSE_S = 0.1
_KILL_AFTER_S = 10
_JOURNAL_LINES = 500
_INCIDENTS_KEPT = 20
_STAMP = "%Y-%m-%dT%H-%M-%SZ"
# What the server says of itself comes at once, but for one that is very busy.
_QUICK_S = 5.0
_PATIENCE_S = 20.0


@dataclass
class EngineProgress:
    """Decides from one look to the next; times are seconds of any steady clock."""

    timeout_s: float
    mark: tuple[float, ...] | None = None
    moved_at: float = 0.0
    wanted_at: float | None = None

    def observe(self, now: float, mark: tuple[float, ...] | None, *, wanted: bool) -> str:
        """Return fine, suspect (a quarter of the time-out) or hung.

        ``mark`` is `engine.progress_mark`, None when the server gave no answer; ``wanted``
        says whether anybody waits for the engine.
        """
        if mark is not None and mark != self.mark:
            self.mark, self.moved_at, self.wanted_at = mark, now, None
        if not wanted:
            self.wanted_at = None
            return FINE
        if self.wanted_at is None:
            self.wanted_at = now
        left = self.seconds_left(now)
        if left <= 0:
            return HUNG
        return SUSPECT if left <= self.timeout_s * 3 / 4 else FINE

    def seconds_left(self, now: float) -> float:
        """Return the seconds until the engine counts as hung if nothing moves from now on."""
        since = now if self.wanted_at is None else max(self.moved_at, self.wanted_at)
        return self.timeout_s - (now - since)

    def idle_for(self, now: float) -> float:
        """Return the seconds since the engine moved last."""
        return now - self.moved_at


class Flag:
    """A file that the sentry looks for whenever a gateway asks it, which is every second."""

    def __init__(
        self,
        path: Path = STALLED,
        told: Path = TOLD,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path, self._told, self._clock, self._sleep = path, told, clock, sleep

    def take_out(self, invocation: str, reason: str) -> None:
        """Let the gateways take the node out of service for as long as this start lives."""
        if read_note(self._path).get("invocation") != invocation:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            said = {"invocation": invocation, "reason": reason}
            write_atomically(self._path, json.dumps(said) + "\n")

    def let_in(self) -> None:
        """Take the flag back: the gateways may send requests again once the start is attested."""
        self._path.unlink(missing_ok=True)

    def wait_until_told(self) -> None:
        """Wait until the readiness agent has told every gateway that asks it, or 3 s.

        An agent of an earlier version notes nobody: then it is 3 s.
        """
        deadline = self._clock() + _TELL_S
        while set(read_note(self._told).values()) != {"down"} and self._clock() < deadline:
            self._sleep(_PAUSE_S)


class Canary:
    """One token, asked for in the background: a hung engine never answers."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.answered = False

    @property
    def waiting(self) -> bool:
        """Tell whether an answer is still awaited."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self, http: Http, model: str) -> None:
        """Ask, unless an earlier question waits."""
        if self.waiting:
            return
        self.answered = False

        def run() -> None:
            self.answered = not complete(http, model, "Hello", tokens=1).problem

        self._thread = threading.Thread(target=run, daemon=True, name=CANARY)
        self._thread.start()


@dataclass
class Settings:
    """The command line of the watch."""

    unit: str
    stall_timeout_s: float
    restarts_per_hour: int
    incidents: Path
    policy: Path = POLICY_PATH
    environment: Path = ENVIRONMENT_PATH


@dataclass
class Watchdog:
    """The state of the watch between two looks."""

    settings: Settings
    run: Runner
    flag: Flag
    client: Callable[..., Http] = local_http
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    processes: Callable[[], Sequence[Process]] = list_processes
    helper: Callable[[Question], Answer] = ask
    canary: Canary = field(default_factory=Canary)
    invocation: str = ""
    ready: bool = False
    given_up: bool = False
    ending_until: float = 0.0
    progress: EngineProgress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = EngineProgress(self.settings.stall_timeout_s)

    def look(self) -> str:
        """Look once and act; return what was seen: inactive, starting, fine, suspect, hung."""
        state = unit_state(self.run, self.settings.unit)
        now = self.clock()
        if state["invocation_id"] != self.invocation:
            self.invocation, self.ready, self.given_up = state["invocation_id"], False, False
            self.ending_until = 0.0
            self.progress = EngineProgress(self.settings.stall_timeout_s, moved_at=now)
            self.canary = Canary()
        if state["active_state"] != "active":
            # A start that is being killed can still answer health checks: its flag stays.
            return "inactive"
        try:
            policy = read_policy(self.settings.policy)
        except FleetError:
            return "starting"
        sample = self._sample(policy, now)
        self.ready = self.ready or bool(sample)
        if not self.ready:
            return "starting"
        busy = bool(sample and (sample["running"] or sample["waiting"]))
        if not busy and self._quiet(now):
            self._ask(policy)
        wanted = busy or self.canary.waiting or not sample
        seen = self.progress.observe(now, progress_mark(sample), wanted=wanted)
        if seen == HUNG:
            self._incident(state, sample)
        elif seen == SUSPECT:
            self.flag.take_out(self.invocation, "no progress")
        else:
            self.given_up = False
            self.flag.let_in()
        return seen

    def _sample(self, policy: Policy, now: float) -> Sample | Nothing:
        """Ask the server for its figures; {} when it is silent.

        A busy server misses a short look now and then. It is asked again with the patience that a
        canary has, as long as there is time left before the verdict.
        """
        sample = read_sample(self._http(policy, _QUICK_S))
        patience = min(_PATIENCE_S, self.progress.seconds_left(now))
        if not sample and self.ready and patience > _QUICK_S:
            sample = read_sample(self._http(policy, patience))
        return sample

    def _quiet(self, now: float) -> bool:
        return self.progress.idle_for(now) >= min(self.settings.stall_timeout_s / 4, 60.0)

    def _ask(self, policy: Mapping[str, Any]) -> None:
        # Longer than the stall is allowed to be: it must not end before the verdict.
        patience = self.settings.stall_timeout_s * 2
        self.canary.ask(self._http(policy, patience), policy["served_model_name"])

    def _http(self, policy: Mapping[str, Any], timeout_s: float) -> Http:
        return self.client(
            policy["port"],
            address=policy["address"],
            api_key=read_api_key(self.settings.environment),
            timeout_s=timeout_s,
        )

    def _incident(self, state: Mapping[str, Any], sample: Mapping[str, Any]) -> None:
        """Tell the gateway, keep the evidence, restart: in this order."""
        # A start that was killed takes a while to die, and is no second incident.
        if self.given_up or self.clock() < self.ending_until:
            return
        self.flag.take_out(self.invocation, "hung")
        timeout = self.settings.stall_timeout_s
        _log(3, f"nothing moved in the engine for {timeout:g} s although it was asked to")
        self.flag.wait_until_told()
        recent = self._recent_restarts()
        try:
            folder = self._keep_evidence(state, sample)
        except OSError as error:
            # A full disk must not keep a hung engine.
            folder = self.settings.incidents
            _log(3, f"the evidence could not be kept: {error}")
        if len(recent) >= self.settings.restarts_per_hour:
            self.given_up = True
            _log(
                2,
                f"restarted {len(recent)} times within an hour: left alone for a person, and out "
                f"at the gateway; evidence in {folder}",
            )
            return
        self._write_restarts([*recent, time.time()])
        _log(4, f"restarting {self.settings.unit}; evidence in {folder}")
        # Not `systemctl restart`: it would wait for requests that will never end.
        end: Question = {"do": "signal", "invocation": state["invocation_id"]}
        self.helper({**end, "signal": "SIGTERM"})
        for _ in range(_KILL_AFTER_S):
            self.sleep(1.0)
            if unit_state(self.run, self.settings.unit)["invocation_id"] != state["invocation_id"]:
                break
        else:
            self.helper({**end, "signal": "SIGKILL"})
        self.ending_until = self.clock() + timeout

    def _keep_evidence(self, state: Mapping[str, Any], sample: Mapping[str, Any]) -> Path:
        stamp = time.strftime(_STAMP, time.gmtime())
        folder = self.settings.incidents / stamp
        folder.mkdir(parents=True, exist_ok=True)
        lines = journal(self.run, state["invocation_id"], _JOURNAL_LINES)
        write_atomically(folder / "journal.txt", "\n".join(lines) + "\n", mode=0o640)
        facts = {"unit": dict(state), "metrics": dict(sample)}
        write_atomically(folder / "facts.json", json.dumps(facts, indent=1) + "\n", mode=0o640)
        for process in self._engine_processes(int(state["main_pid"])):
            name = re.sub(r"\W+", "-", process.command.split(" ")[0].rpartition("/")[2])
            path = folder / f"stack-{process.pid}-{name}.txt"
            write_atomically(path, f"{process.command}\n\n{self._stack(process.pid)}", mode=0o640)
        for old in sorted(self.settings.incidents.glob("20*"))[:-_INCIDENTS_KEPT]:
            for path in old.iterdir():
                path.unlink()
            old.rmdir()
        return folder

    def _engine_processes(self, main_pid: int) -> list[Process]:
        found = self.processes()
        owner = next((each.uid for each in found if each.pid == main_pid), None)
        return left_over(found, owner) if owner is not None else []

    def _stack(self, pid: int) -> str:
        """Return the stacks of a process, or why they cannot be had."""
        try:
            return self.helper({"do": "stack", "pid": pid})["said"]
        except FleetError as error:
            return f"{error}\n"

    def _recent_restarts(self) -> list[float]:
        try:
            times = read(list[float], self.settings.incidents / "restarts.json")
        except FileNotFoundError:
            return []
        except FleetError as error:
            # An empty list would restart a hopeless engine without end.
            _log(4, f"{error}: restarts are counted by the evidence that was kept")
            times = list(map(_time_of, self.settings.incidents.glob("20*")))
        return [each for each in times if 0 <= time.time() - each < _HOUR_S]

    def _write_restarts(self, times: Sequence[float]) -> None:
        write_atomically(self.settings.incidents / "restarts.json", json.dumps(list(times)) + "\n")


def _time_of(incident: Path) -> float:
    """Return when an incident was, in seconds since 1970; 0 for a folder of another name."""
    try:
        return float(calendar.timegm(time.strptime(incident.name, _STAMP)))
    except ValueError:
        return 0.0


def _log(level: int, text: str) -> None:
    """Write to the journal with a syslog level."""
    sys.stderr.write(f"<{level}>{text}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Watch until somebody stops the unit."""
    parser = argparse.ArgumentParser(description="Restarts an engine that no longer moves.")
    parser.add_argument("--unit", default="glm-serving.service")
    parser.add_argument("--stall-timeout", type=float, required=True, help="seconds")
    parser.add_argument("--restarts-per-hour", type=int, required=True)
    parser.add_argument("--incidents", type=Path, default=Path("/var/lib/glm-fleet/incidents"))
    # Units of earlier versions name it; the helper knows it by itself.
    parser.add_argument("--py-spy", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    watch = Watchdog(
        Settings(
            options.unit,
            options.stall_timeout,
            options.restarts_per_hour,
            options.incidents,
        ),
        run_program,
        Flag(),
    )
    interval = min(max(options.stall_timeout / 20, 0.5), 5.0)
    seen = ""
    while True:
        try:
            now = watch.look()
            if now != seen:
                _log(6, f"{options.unit}: {now}")
            seen = now
        except (FleetError, OSError) as error:
            _log(3, str(error))
        time.sleep(interval)
