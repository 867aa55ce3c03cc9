# SPDX-License-Identifier: Apache-2.0
"""Commands, marked processes, locks and atomic files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .settings import CACHE_LOCK, LOCK, SUFFIX, LabError

# Every long-lived process of the lab carries this in its environment, so that it can be found
# and told apart without trusting a recorded pid.
MARKER = f"GLM_FLEET_LAB{SUFFIX}_PROCESS"

_started = time.monotonic()
_print_lock = threading.Lock()


def say(text: str) -> None:
    """Print one progress line with the seconds since the start."""
    with _print_lock:
        print(f"[{time.monotonic() - _started:5.1f}s] {text}", flush=True)


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return it; a failure becomes a LabError with its last lines.

    It is marked, so that `down` ends it should this program be killed.
    """
    result = subprocess.run(
        command,
        env={**os.environ, **(env or {}), MARKER: "command:"},
        cwd=cwd,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        check=False,
    )
    if check and result.returncode != 0:
        tail = " / ".join((result.stderr or result.stdout).strip().splitlines()[-4:])
        words = " ".join(str(word) for word in command[:6])
        raise LabError(f"`{words} ...` ended with {result.returncode}: {tail}")
    return result


@dataclass(frozen=True)
class Process:
    """A running process of the lab: its pid and what it was started for."""

    pid: int
    name: str

    def signal(self, number: int) -> bool:
        """Send a signal, if the pid is still this process. True when it was sent."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The descriptor pins the pid; only now is the marker a proof.
            if _marker(self.pid) != self.name:
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


def seconds_since_start(pid: int) -> float | None:
    """How long a process has run; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    since_boot = float(Path("/proc/uptime").read_text().split()[0])
    return since_boot - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _marker(pid: int) -> str | None:
    """What the process was started for; None for one that is not ours, or is a zombie."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    prefix = f"{MARKER}=".encode()
    for item in environment.split(b"\0"):
        if item.startswith(prefix):
            return item[len(prefix) :].decode()
    return None


def processes(prefix: str = "") -> list[Process]:
    """All running processes of the lab whose name starts with `prefix`, oldest pid first."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        name = _marker(int(entry.name))
        if name is not None and name.startswith(prefix):
            found.append(Process(int(entry.name), name))
    return sorted(found, key=lambda process: process.pid)


def start(
    name: str,
    command: Sequence[str | os.PathLike[str]],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cgroup_folders: Sequence[Path] = (),
    cwd: Path | None = None,
) -> int:
    """Start a marked process in a session of its own, with its output appended to `log`.

    `cgroup_folders` are joined by the process before it executes. Returns the pid.
    """

    log.parent.mkdir(parents=True, exist_ok=True)
    targets = [folder / "cgroup.procs" for folder in cgroup_folders]

    def join() -> None:
        for target in targets:
            target.write_text("0", encoding="ascii")

    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {}), MARKER: name},
            start_new_session=True,
            preexec_fn=join if targets else None,
            cwd=cwd,
        )
    threading.Thread(target=process.wait, daemon=True).start()  # reap it, should it end early
    return process.pid


def stop(prefix: str, *, grace_seconds: float, first_signal: int = signal.SIGTERM) -> list[str]:
    """End all processes of the lab with that name prefix; SIGKILL after the grace time.

    Returns their names. Raises LabError when one survives.
    """
    names = sorted({process.name for process in processes(prefix)})
    for process in processes(prefix):
        process.signal(first_signal)
    for seconds, number in ((grace_seconds, signal.SIGKILL), (10.0, None)):
        deadline = time.monotonic() + seconds
        while (left := processes(prefix)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if number is not None:
            for process in left:
                process.signal(number)
    if left:
        listed = ", ".join(f"{process.name} (pid {process.pid})" for process in left)
        raise LabError(f"these processes survived SIGKILL: {listed}")
    return names


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Hold the lab's lock; a LabError says so when another command holds it."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a+", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise LabError(
                f"another lab command is running (pid {handle.read().strip() or 'unknown'}); "
                "wait for it, then run this again",
                changed=False,
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Hold the lock of the cache, which all labs here share; waits for whoever has it."""
    CACHE_LOCK.parent.mkdir(parents=True, exist_ok=True)
    with CACHE_LOCK.open("a", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another lab fills the cache: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomic(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file under a temporary name and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
        os.fchmod(handle.fileno(), mode)
    temporary.replace(path)


def mounts_below(folder: Path) -> list[str]:
    """Mount points at or below a folder, deepest first."""
    prefix = str(folder)
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point == prefix or point.startswith(prefix + "/"):
            found.append(point)
    return sorted(found, reverse=True)


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
