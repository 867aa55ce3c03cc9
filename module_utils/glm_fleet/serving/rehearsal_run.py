# SPDX-License-Identifier: Apache-2.0
"""Doing a rehearsal on a node: start, watch, ask, stop. See `rehearsal` for what it is.

Nothing of it stays on the node but the record of how it ended: the unit and its files lie below
``/run``, and are gone when it is over, whatever happened.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from ..core.check import Check
from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.http import Http, local_http
from ..core.runner import Runner
from ..core.systemd import journal, unit_state
from .activation import stop_engine
from .deployment import ENVIRONMENT, Deployment, Deployments
from .diagnosis import diagnose, lower_graphs_help, relevant_lines
from .evidence import check_journal
from .policy import Policy, parse_policy, read_api_key
from .questions import ask_questions
from .record import running_release
from .rehearsal import (
    REHEARSAL_UNIT,
    Cut,
    command_digest,
    cut_config,
    exec_words,
    is_small_file,
    rehearsal_command,
    rehearsal_unit,
)
from .rehearsals import (
    REHEARSALS,
    Hardware,
    Rehearsed,
    known_to_pass,
    note_rehearsal,
    read_hardware,
    read_rehearsals,
)
from .startup import await_attestation

_LOOK_S = 5.0
# How far log probabilities may be apart where the deployment does not say it.
_TOLERANCE = 0.5


@dataclass(frozen=True)
class Stage:
    """Where a rehearsal lies while it lasts, and the drop-in that protects the real unit."""

    folder: Path = Path("/run/glm-fleet/rehearsal")
    units: Path = Path("/run/systemd/system")
    drop_in: Path = Path("/etc/systemd/system/glm-serving.service.d/10-glm-fleet.conf")
    records: Path = REHEARSALS
    proc: Path = Path("/proc")


@dataclass(frozen=True)
class Attempt:
    """One deployment that was rehearsed: what failed in words, '' if it passed."""

    deployment: Deployment
    checks: Sequence[Check]
    problem: str = ""
    diagnosis: str = ""
    step_down: bool = False
    journal: Sequence[str] = ()


@dataclass
class Rehearsal:
    """Rehearses deployments of this node, the wanted one first, until one passes.

    ``model`` is a folder with the small files of the model, its weights may be missing.
    ``clear`` returns when no other engine holds the GPUs, and raises `FleetError` otherwise.
    ``attested_now`` says whether the start that runs was attested: see `activation.activate`.
    ``say`` is told what goes on. Times are in seconds: a start that shows no progress for
    ``stall_s``, or that is not ready after ``limit_s``, has failed.
    """

    run: Runner
    deployments: Deployments
    model: Path
    clear: Callable[[], None]
    attested_now: bool = True
    layers: int = 0
    stall_s: float = 600.0
    limit_s: float = 1200.0
    stage: Stage = field(default_factory=Stage)
    client: Callable[..., Http] = local_http
    say: Callable[[str], None] = lambda _: None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time

    def known(self, identifier: str) -> Rehearsed | None:
        """Return the rehearsal by which a deployment is known to pass here, None without one."""
        wanted, config = self.deployments.read(identifier), self._config()
        return known_to_pass(
            read_rehearsals(self.stage.records),
            read_hardware(self.run),
            wanted.release,
            command_digest(wanted, config),
        )

    def rehearse(self, rungs: Sequence[str]) -> Attempt:
        """Rehearse one rung after the other while a lower mode of CUDA graphs may help.

        The node must be drained: an engine that runs is stopped, and is not started again here.
        A rung that fails so is remembered as known not to run. Returns the attempt that passed;
        raises `FleetError` with {diagnosis, step_down, journal, rehearsal}.
        """
        hardware, config = read_hardware(self.run), self._config()
        cut = cut_config(config, self.layers)
        failed: Attempt | None = None
        for place, identifier in enumerate(rungs):
            wanted = self.deployments.read(identifier)
            begun = self.clock()
            made = self._attempt(wanted, cut)
            self._note(wanted, made, hardware, command_digest(wanted, config), cut, begun)
            if not made.problem:
                return made
            failed = made
            if not made.step_down or place + 1 == len(rungs):
                break
            self.deployments.refuse(identifier, made.diagnosis)
        raise _refusal(failed, cut)

    def _config(self) -> str:
        path = self.model / "config.json"
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise FleetError(
                "There is nothing to rehearse with",
                expected=f"the model's {path}",
                found=f"{type(error).__name__}: {error}",
                remedy="run playbooks/rehearse.yml, which brings the small files of the model",
            ) from error

    def _note(
        self, wanted: Deployment, made: Attempt, hardware: Hardware, command: str, cut: Cut,
        begun: float,
    ) -> None:  # fmt: skip
        note_rehearsal(
            {
                "gpus": hardware["gpus"],
                "driver": hardware["driver"],
                "release": wanted.release,
                "cuda_graphs": wanted.cuda_graphs,
                "command": command,
                "passed": not made.problem,
                "problem": (made.diagnosis or made.problem)[:600],
                "seconds": round(self.clock() - begun, 1),
                "time_s": round(self.now(), 0),
                "layers": cut.layers,
                "of_layers": cut.of,
            },
            self.stage.records,
        )

    def _attempt(self, wanted: Deployment, cut: Cut) -> Attempt:
        """Start it, ask it, and stop it whatever happened."""
        home = self.deployments.places.releases / wanted.release
        policy = parse_policy(wanted.policy)
        with self._started(wanted, home, cut) as (port, words):
            api_key = read_api_key(self.stage.folder / ENVIRONMENT)
            http = self.client(port, address="127.0.0.1", api_key=api_key)
            problem = self._await_start(http)
            state = unit_state(self.run, REHEARSAL_UNIT)
            lines = journal(self.run, state["invocation_id"])
            checks: list[Check] = []
            if not problem:
                checks = self._ask(http, policy, lines, words, state["main_pid"], wanted.release)
                lines = journal(self.run, state["invocation_id"])
            wrong = [f"{each.name}: {each.detail}" for each in checks if not each.passed]
            problem = problem or "; ".join(wrong)
            if not problem:
                return Attempt(wanted, checks)
            return Attempt(
                wanted, checks, problem, diagnose(lines), lower_graphs_help(lines),
                relevant_lines(lines),
            )  # fmt: skip

    def _ask(
        self, http: Http, policy: Policy, lines: Sequence[str], words: Sequence[str],
        main_pid: int, release: str,
    ) -> list[Check]:  # fmt: skip
        runs = running_release(main_pid, self.stage.proc)
        checks = [
            Check("release that runs", runs == release, f"{runs or 'unknown'}, wanted {release}"),
            *check_journal(lines, policy["required"], policy["forbidden"]),
        ]
        sequences, limits = _option(words, "--max-num-seqs"), policy["answers"]
        checks += ask_questions(
            http,
            policy["served_model_name"],
            tolerance=limits["tolerance"] if limits else _TOLERANCE,
            sequences=int(sequences) if sequences.isdigit() else 0,
            say=lambda text: self.say(f"rehearsal: asks {text}"),
        )
        return checks

    def _await_start(self, http: Http) -> str:
        """Watch the start; return why it failed, '' when the server answers."""
        begun = moved = self.clock()
        progress = ""
        while True:
            watched = await_attestation(
                self.run, http, REHEARSAL_UNIT, seconds=_LOOK_S,
                evidence_path=self.stage.folder / "none", proc=self.stage.proc,
                sleep=self.sleep, clock=self.clock,
            )  # fmt: skip
            now = self.clock()
            if watched["ready"]:
                return ""
            if watched["failed"]:
                return f"{watched['failed']}; last seen: {watched['phase']}"
            if watched["progress"] != progress:
                progress, moved = watched["progress"], now
            self.say(f"rehearsal: {watched['phase']}")
            if now - moved > self.stall_s:
                return f"it makes no progress for {self.stall_s:.0f} s: {watched['phase']}"
            if now - begun > self.limit_s:
                return f"it is not ready after {self.limit_s:.0f} s: {watched['phase']}"

    @contextlib.contextmanager
    def _started(
        self, wanted: Deployment, home: Path, cut: Cut
    ) -> Iterator[tuple[int, Sequence[str]]]:
        """Start the rehearsal's unit; give the port and the command line, and clean up."""
        stage, unit = self.stage, self.stage.units / REHEARSAL_UNIT
        words = exec_words(wanted.unit)
        port = _free_port()
        # What an earlier run may have left that was cut off.
        self._remove()
        try:
            self._fill(cut)
            write_atomically(stage.folder / ENVIRONMENT, wanted.environment, 0o600)
            command = rehearsal_command(
                words, program=home / "bin/vllm", model=stage.folder / "model", port=port
            )
            drop_in = stage.drop_in.read_text() if stage.drop_in.is_file() else ""
            stage.units.mkdir(parents=True, exist_ok=True)
            write_atomically(
                unit, rehearsal_unit(wanted.unit, drop_in, command, stage.folder / ENVIRONMENT)
            )
            self.say("rehearsal: stops what runs")
            stop_engine(self.run, attested_now=self.attested_now)
            self.clear()
            self.say("rehearsal: starts")
            self.run(["systemctl", "daemon-reload"])
            self.run(["systemctl", "start", "--no-block", REHEARSAL_UNIT])
            yield port, command
        finally:
            self._remove()

    def _fill(self, cut: Cut) -> None:
        """Make the folder of the model: its small files, and the configuration that was cut."""
        folder = self.stage.folder / "model"
        folder.mkdir(parents=True)
        # The service's user reads it, whatever the umask is.
        for each in (self.stage.folder, folder):
            each.chmod(0o755)
        for path in sorted(self.model.rglob("*")):
            name = path.relative_to(self.model)
            small = path.is_file() and is_small_file(str(name), path.stat().st_size)
            if small and str(name) != "config.json":
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path.resolve())
        write_atomically(folder / "config.json", cut.text)

    def _remove(self) -> None:
        unit = self.stage.units / REHEARSAL_UNIT
        if unit.exists():
            self.run(["systemctl", "stop", REHEARSAL_UNIT], check=False)
            unit.unlink()
            self.run(["systemctl", "daemon-reload"])
            self.run(["systemctl", "reset-failed", REHEARSAL_UNIT], check=False)
        shutil.rmtree(self.stage.folder, ignore_errors=True)


def _option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words[:-1] else ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _refusal(failed: Attempt | None, cut: Cut) -> FleetError:
    if failed is None:
        return FleetError("There is nothing to rehearse", expected="a deployment", found="none")
    details: dict[str, Any] = {
        "diagnosis": failed.diagnosis,
        "step_down": False,
        "journal": list(failed.journal),
    }
    return FleetError(
        "The release does not run on this node: its rehearsal failed",
        expected=f"{cut.layers} of {cut.of} layers with random weights to start and to answer",
        found=failed.problem,
        remedy=failed.diagnosis
        or "read `journalctl -u glm-rehearsal` on the node, and name another release; "
        "serve_rehearsal=never goes on without",
        details=details,
    )
