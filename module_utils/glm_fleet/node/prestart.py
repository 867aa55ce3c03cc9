# SPDX-License-Identifier: Apache-2.0
"""The pre-start check of the serving unit, and the record of what was started.

It runs as root before every start, also after a crash at night when no controller is there. An
engine that was orphaned holds its GPU memory while the port is free again; a start on top of it
dies of it, so the check ends vLLM's processes of the service's user, waits for the memory, and
refuses with names when something stays. When the way is clear it writes down what is about to
run: the attestation compares with that, not with what lies on the disk by then.

Run as a program: ``python3 -m glm_fleet.gate --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Callable

from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.format import parse_count
from ..core.procfs import Process, is_vllm, list_processes
from ..core.runner import Runner, run_program
from ..serving.record import START_RECORD, make_record


def left_over(processes: Iterable[Process], uid: int) -> list[Process]:
    """The processes of an earlier engine: vLLM's, of the service's user."""
    return [each for each in processes if each.uid == uid and is_vllm(each.command)]


def memory_in_use(runner: Runner) -> dict[int, int]:
    """Return MiB in use per GPU index, as the driver counts it."""
    answer = runner(
        ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"],
        timeout=60,
    )
    used = {}
    for line in answer.stdout.splitlines():
        index, _, mib = line.partition(",")
        number, amount = parse_count(index), parse_count(mib)
        if number is not None and amount is not None:
            used[number] = amount
    return used


def wait_until_clear(
    *,
    runner: Runner,
    processes: Callable[[], list[Process]],
    uid: int,
    limit_mib: int,
    patience_s: float,
    kill: Callable[[int, int], None] = os.kill,
    say: Callable[[str], object] = sys.stderr.write,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when no earlier engine lives and every GPU uses at most ``limit_mib``.

    What is left of the service's own engine gets SIGTERM, and SIGKILL when half of
    ``patience_s`` seconds are over. The driver gives memory back some seconds after a process
    ended, so the gate waits that long in all. Raises `FleetError` naming processes and GPUs
    after that. Nothing of another user is touched.
    """
    begin = clock()
    end = begin + patience_s
    asked: dict[int, int] = {}
    while True:
        engines = left_over(processes(), uid)
        number = signal.SIGTERM if clock() < begin + patience_s / 2 else signal.SIGKILL
        for each in engines:
            if asked.get(each.pid) != number:
                asked[each.pid] = number
                say(f"start gate: ended pid {each.pid} {each.command[:60]} ({number.name})\n")
                with contextlib.suppress(ProcessLookupError):
                    kill(each.pid, number)
        full = {index: mib for index, mib in memory_in_use(runner).items() if mib > limit_mib}
        if not engines and not full:
            return
        if clock() >= end:
            break
        sleep(1.0)
    named = [f"pid {each.pid} {each.command[:60]}" for each in engines]
    named += [f"GPU {index}: {mib} MiB" for index, mib in sorted(full.items())]
    raise FleetError(
        "An earlier engine still holds this node's GPUs",
        expected=f"no vLLM process and at most {limit_mib} MiB in use on each GPU",
        found="; ".join(named),
        remedy="stop those processes; a GPU that stays in use without one needs a reboot",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check, record, and return the exit status for the unit."""
    parser = argparse.ArgumentParser(description="Start gate of glm-serving.service.")
    parser.add_argument("--user", required=True, help="user of the service")
    parser.add_argument("--limit-mib", type=int, default=1024, help="memory a free GPU may use")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for it")
    parser.add_argument("--release-link", type=Path, required=True)
    parser.add_argument("--model-link", type=Path, required=True)
    parser.add_argument("--unit", type=Path, required=True)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--record", type=Path, default=START_RECORD)
    options = parser.parse_args(argv)
    try:
        wait_until_clear(
            runner=run_program,
            processes=list_processes,
            uid=pwd.getpwnam(options.user).pw_uid,
            limit_mib=options.limit_mib,
            patience_s=options.patience,
        )
    except FleetError as error:
        sys.stderr.write(f"start gate: {error}\n")
        return 1
    record = make_record(
        release_link=options.release_link,
        model_link=options.model_link,
        unit=options.unit,
        environment=options.environment,
        invocation=os.environ.get("INVOCATION_ID", ""),
    )
    options.record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.record, json.dumps(record, indent=1) + "\n")
    return 0
