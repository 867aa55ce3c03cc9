# SPDX-License-Identifier: Apache-2.0
"""How far a start has come, and whether it failed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

from ..core.errors import FleetError
from ..core.http import Http
from ..core.runner import Runner
from ..core.systemd import journal, unit_state
from .diagnosis import diagnose, lower_graphs_help, relevant_lines
from .evidence import EVIDENCE, READY, read_evidence

_RECENT_LINES = 500
# Of a start that was attested, for a check every few minutes.
CHECKED_LINES = 5000
# What an operator sees while a node loads: the last of these that the journal holds.
_PHASES: tuple[tuple[str, str], ...] = (
    (r"non-default args", "reading the model's configuration"),
    (r"Resolved architecture", "preparing the engine"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"Starting to load model", "loading the model"),
    (r"Completed \| (\d+/\d+)", "loading shard {0}"),
    (r"Loading weights took ([\d.]+)", "weights loaded in {0} s"),
    (r"Dynamo bytecode transform time", "compiling"),
    (r"Compiling a graph", "compiling"),
    (r"KV cache size: ([\d,]+) tokens", "KV cache of {0} tokens"),
    (r"Capturing CUDA graphs", "capturing CUDA graphs"),
    (r"init engine .* took ([\d.]+)", "engine ready after {0} s"),
    (r"Waiting for application startup", "opening the port"),
    (READY.pattern, "ready"),
)


def start_phase(lines: Sequence[str]) -> str:
    """Say how far a start has come, from its journal."""
    for line in reversed(lines):
        for pattern, text in reversed(_PHASES):
            found = re.search(pattern, line)
            if found:
                return text.format(*found.groups())
    return "importing vLLM"


def await_attestation(
    runner: Runner,
    http: Http,
    unit: str,
    *,
    seconds: float,
    evidence_path: Path = EVIDENCE,
    proc: Path = Path("/proc"),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Look at a starting node for up to ``seconds``.

    Returns {ready, failed, phase, progress}: ``ready`` when the journal says so and
    ``/health`` answers; ``failed`` says why a start is over; ``progress`` changes as long as
    anything moves (its phase, new kinds of journal lines, bytes read by the service).
    """
    end = clock() + seconds
    while True:
        state = unit_state(runner, unit)
        lines = journal(runner, state["invocation_id"], _RECENT_LINES)
        # A hung engine repeats itself every minute: only what was not said before is progress.
        said = len({re.sub(r"\d+", "", line) for line in lines})
        result: dict[str, Any] = {
            "ready": False,
            "failed": "",
            "phase": start_phase(lines),
            "progress": f"{start_phase(lines)}, {said} different lines, "
            f"{_bytes_read(state['main_pid'], proc)} bytes",
            "invocation_id": state["invocation_id"],
        }
        if state["active_state"] not in ("active", "activating"):
            result["failed"] = f"the unit is {state['active_state']} ({state['result']})"
            return result
        # Before the restarts are counted: a node that died once, weeks ago, is ready now.
        if _came_up(runner, state["invocation_id"], lines, evidence_path) and (
            http("/health")[0] == 200
        ):
            result["ready"] = True
            return result
        if state["n_restarts"] or state["sub_state"] == "auto-restart":
            result["failed"] = f"the service died ({state['n_restarts']} restarts so far)"
            return result
        if clock() >= end:
            return result
        sleep(1.0)


def _came_up(runner: Runner, invocation: str, lines: Sequence[str], evidence_path: Path) -> bool:
    """Tell whether the journal of a start says, or said, that the server is up.

    ``lines`` are its last ones. A server that has answered for a while has pushed its own first
    words out of them, and at last out of the journal.
    """
    if any(READY.search(line) for line in lines) or read_evidence(evidence_path, invocation):
        return True
    return len(lines) >= _RECENT_LINES and any(
        READY.search(line) for line in journal(runner, invocation)
    )


def unproven(
    runner: Runner,
    http: Http,
    running: Mapping[str, Any],
    required: Sequence[str],
    evidence_path: Path = EVIDENCE,
) -> bool:
    """Tell whether a server answers of whose start nothing is left to prove it.

    Its journal is gone, and so is what an attestation kept: no wait brings that back, only
    another start does. ``running`` is what `record.read_running` gives.
    """
    invocation = str(running.get("invocation") or "")
    if not running.get("active") or read_evidence(evidence_path, invocation):
        return False
    lines = journal(runner, invocation)
    lost = any(not any(re.search(each, line) for line in lines) for each in required)
    return lost and http("/health")[0] == 200


def _bytes_read(main_pid: int, proc: Path) -> int:
    """Bytes that a process and its descendants have read from storage, in steps of 64 MiB."""
    parents: dict[int, int] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    total = 0
    for pid in parents:
        ancestor = pid
        while ancestor not in (0, main_pid):
            ancestor = parents.get(ancestor, 0)
        if ancestor:
            try:
                text = (proc / str(pid) / "io").read_text()
            except OSError:
                continue
            total += sum(
                int(line.partition(":")[2])
                for line in text.splitlines()
                if line.startswith("rchar")
            )
    return total // (64 << 20) * (64 << 20)


def failed_start(watched: Mapping[str, Any], lines: Sequence[str], reason: str) -> FleetError:
    """Make the error for a start that did not come up, with a diagnosis where one is known."""
    known = diagnose(lines)
    return FleetError(
        "The node did not come up",
        expected="the server to be ready",
        found=f"{reason}; last seen: {watched.get('phase', '')}",
        remedy=known or "read `journalctl -u glm-serving` on the node",
        details={
            "journal": relevant_lines(lines),
            "diagnosis": known,
            "step_down": lower_graphs_help(lines),
        },
    )
