# SPDX-License-Identifier: Apache-2.0
"""Running other programs, injected so that tests can answer in their place."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import FleetError, disk_full

# glibc's own locale, so that messages we match on do not depend on the operator's.
_LOCALE = {"LC_ALL": "C.UTF-8"}
# git does not always pass on why it could not write.
_NO_SPACE = ("No space left on device", "Disk quota exceeded", "error: unable to write file")


@dataclass(frozen=True)
class RunResult:
    """Exit status and text output of one program."""

    rc: int
    stdout: str
    stderr: str


class Runner(Protocol):
    """What a core needs to run programs: see `run_program` for the meaning."""

    def __call__(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input_text: str | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> RunResult: ...


def run_program(
    argv: Sequence[str],
    *,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    input_text: str | None = None,
    timeout: float | None = None,
    check: bool = True,
    environ: Mapping[str, str] | None = None,
) -> RunResult:
    """Run ``argv`` (no shell) and return its exit status and output.

    ``env`` is added to the caller's environment, or to ``environ`` in its place; ``timeout`` is
    in seconds. Raises `FleetError` when the program is missing, takes too long, or (with
    ``check``) exits with another status than 0.
    """
    name = os.path.basename(argv[0])  # noqa: PTH119 - argv may be a bare program name
    try:
        done = subprocess.run(
            list(argv),
            cwd=cwd,
            env={**(os.environ if environ is None else environ), **_LOCALE, **(env or {})},
            input=input_text,
            stdin=None if input_text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise FleetError(
            f"The program {name} is missing",
            expected=f"{name} on PATH",
            found=str(error),
            remedy=f"install the package that provides {name}",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise FleetError(
            f"{name} did not finish",
            expected=f"an end within {timeout:g} s",
            found=f"still running: {' '.join(argv)}",
            remedy="look for a hung device, disk or network, then run again",
        ) from error
    result = RunResult(done.returncode, done.stdout, done.stderr)
    lines = result.stderr.splitlines() if result.rc != 0 else []
    full = [line for line in lines if any(words in line for words in _NO_SPACE)]
    if full:
        raise disk_full(f"{name}: {full[0].strip()[:300]}")
    if check and result.rc != 0:
        tail = (result.stderr.strip() or result.stdout.strip())[-2000:]
        raise FleetError(
            f"{name} failed",
            expected=f"exit status 0 of: {' '.join(argv)}",
            found=f"exit status {result.rc}: {tail}",
        )
    return result


def as_user(user: str) -> list[str]:
    """Return what to put before a command so that it runs with no more rights than ``user`` has.

    ``user`` is a name or a number. Only root can become somebody else: the list is empty for
    anybody else, who has no rights to lose.
    """
    if os.geteuid() != 0:
        return []
    groups = "--clear-groups" if user.isdigit() else "--init-groups"
    return [
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        groups,
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    ]
