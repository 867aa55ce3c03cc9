# SPDX-License-Identifier: Apache-2.0
"""A machine with a real systemd, of the lab's root file system, beside the lab and without it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from lab.hosts import cgroup_roots
from lab.rootfs import rootfs_folder


def missing() -> str:
    """Return what a container needs and this machine lacks, '' if nothing."""
    if os.geteuid() != 0:
        return "containers need root"
    if not shutil.which("systemd-nspawn"):
        return "no systemd-nspawn"
    return "" if rootfs_folder().is_dir() else "`make lab-up` makes the root file system"


class Machine:
    """A booted container.

    ``root`` is its file system, and ``init`` its first process, as this machine sees them.
    """

    def __init__(self, root: Path, init: int) -> None:
        self.root = root
        self.init = init

    def shell(self, script: str, *, user: str = "", check: bool = True) -> str:
        """Run a script there, as root or as a user; return what it printed."""
        words = ["/bin/sh", "-c", script]
        if user:
            words = ["/sbin/runuser", "-u", user, "--", *words]
        done = subprocess.run(
            ["nsenter", f"--target={self.init}", "--all", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{script}: {done.stdout}"
        return done.stdout.strip()

    def wait(self, script: str, seconds: float = 60) -> None:
        """Wait until a script ends with 0."""
        end = time.monotonic() + seconds
        while self.shell(f"{script} >/dev/null 2>&1; echo $?", check=False) != "0":
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {script}"
            time.sleep(0.2)


def _pids(folders: list[Path]) -> set[int]:
    found: set[int] = set()
    for folder in folders:
        for path, _, _ in os.walk(folder):
            with contextlib.suppress(OSError):
                found.update(map(int, Path(path, "cgroup.procs").read_text().split()))
    return found


def _init_of(folders: list[Path]) -> int:
    for pid in _pids(folders):
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{pid}/status").read_text()
            if status.split("NSpid:")[1].splitlines()[0].split()[1:] == ["1"]:
                return pid
    return 0


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    """Boot a machine on an overlay in ``folder``, and leave nothing of it."""
    name = f"glm-test-{uuid.uuid4().hex[:8]}"
    upper, work, root = (folder / each for each in ("upper", "work", "root"))
    for each in (upper, work, root):
        each.mkdir()
        each.chmod(0o755)
    (upper / "etc").mkdir()
    (upper / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
    layers = f"lowerdir={rootfs_folder()},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", name, "-o", layers, root], check=True)
    folders = [each / name for each in cgroup_roots()]
    process = None
    try:
        for each in folders:
            each.mkdir()

        def enter() -> None:
            for each in folders:
                (each / "cgroup.procs").write_text(str(os.getpid()))

        options = ("--quiet", "--boot", "--register=no", "--keep-unit", "--link-journal=no",
                   "--resolv-conf=off", "--timezone=off", "--console=pipe", "--private-network",
                   f"--machine={name}", f"--directory={root}")  # fmt: skip
        with (folder / "console.log").open("w") as log:
            process = subprocess.Popen(
                ["systemd-nspawn", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=enter,
                start_new_session=True,
            )
        end = time.monotonic() + 60
        while not _init_of(folders):
            assert time.monotonic() < end, (folder / "console.log").read_text()
            assert process.poll() is None, (folder / "console.log").read_text()
            time.sleep(0.1)
        machine = Machine(root, _init_of(folders))
        machine.wait("systemctl is-system-running | grep -E 'running|degraded'")
        yield machine
    finally:
        while pids := _pids(folders):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if process:
            process.wait()
        subprocess.run(["umount", "--lazy", root], check=True)
        for each in folders:
            for path, _, _ in os.walk(each, topdown=False):
                with contextlib.suppress(OSError):
                    Path(path).rmdir()
