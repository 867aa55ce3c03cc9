# SPDX-License-Identifier: Apache-2.0
"""Hosts as systemd-nspawn machines on overlays of one root file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import gpu, network
from .settings import (
    ALL_HOSTS,
    BRIDGE_ADDRESS,
    CGROUP,
    GPU_STATE,
    HOSTS,
    SSH,
    SUFFIX,
    USER,
    Host,
    LabError,
)
from .system import mounts_below, processes, run, say, seconds_since_start, start, write_atomic

KEY = SSH / "id_ed25519"
KNOWN_HOSTS = SSH / "known_hosts"
NVIDIA_SMI = Path(__file__).with_name("node") / "nvidia-smi"
# Set in a host's folder by `power off`, so that `up` leaves it off.
POWERED_OFF = "powered-off"


def ensure_login_key() -> None:
    if not KEY.exists():
        SSH.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in SSH.glob("id_ed25519*"):
            stale.unlink()
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "glm-fleet-lab", "-f", KEY])


def create(host: Host) -> None:
    """Make the folder of a host: its identity, keys and files on top of the root file system.

    Built under a temporary name, so that a host with a folder is complete.
    """
    if host.folder.is_dir():
        return
    new = HOSTS / f".new-{host.name}"
    shutil.rmtree(new, ignore_errors=True)
    upper = new / "upper"
    for folder in (upper, new / "work", new / "root"):
        folder.mkdir(parents=True)
        folder.chmod(0o755)
    names = [f"{other.address}\t{other.name}" for other in ALL_HOSTS.values()]
    files = {
        "etc/machine-id": uuid.uuid4().hex + "\n",
        "etc/hostname": host.name + "\n",
        "etc/hosts": "\n".join(
            ["127.0.0.1\tlocalhost", f"{BRIDGE_ADDRESS}\tlab", *names, ""],
        ),
    }
    for name, content in files.items():
        path = upper / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="ascii")
    keys = upper / "etc/ssh"
    keys.mkdir()
    private = keys / "ssh_host_ed25519_key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", private])
    authorized = upper / f"home/{USER}/.ssh/authorized_keys"
    authorized.parent.mkdir(parents=True)
    shutil.copyfile(f"{KEY}.pub", authorized)
    for path, mode in ((authorized.parent.parent, 0o755), (authorized.parent, 0o700)):
        path.chmod(mode)
        os.chown(path, 1000, 1000)
    os.chown(authorized, 1000, 1000)
    authorized.chmod(0o600)
    (upper / "var/log/journal").mkdir(parents=True)
    if host.role == "gpu":
        command = upper / "usr/bin/nvidia-smi"
        command.parent.mkdir(parents=True)
        shutil.copyfile(NVIDIA_SMI, command)
        command.chmod(0o755)
    new.rename(host.folder)


def pin_host_keys(hosts: list[Host]) -> None:
    lines = []
    for host in hosts:
        key = (host.folder / "upper/etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
        lines.append(f"{host.name},{host.address} {key[0]} {key[1]}\n")
    write_atomic(KNOWN_HOSTS, "".join(lines))


def mount(host: Host, rootfs: Path) -> None:
    if host.root.is_mount():
        return
    options = f"lowerdir={rootfs},upperdir={host.folder}/upper,workdir={host.folder}/work"
    run(["mount", "-t", "overlay", "glm-fleet-lab", "-o", options, host.root])
    if host.role == "gpu" and not (host.root / GPU_STATE).exists():
        gpu.write_state(host, gpu.default_state(host.name))


def cgroup_roots() -> list[Path]:
    """The cgroup hierarchies that a systemd uses: the unified one, and the named one of v1."""
    base = Path("/sys/fs/cgroup")
    if (base / "cgroup.procs").exists():
        return [base]
    return [base / name for name in ("systemd", "unified") if (base / name).is_dir()]


def boot(host: Host) -> None:
    """Start a host's container; a running one is left alone."""
    if container_pids(host.name):
        return
    folders = [root / CGROUP / host.name for root in cgroup_roots()]
    for folder in folders:
        # Containers that share a cgroup would take each other's services for theirs.
        folder.mkdir(parents=True, exist_ok=True)
    command = [
        # A host that reboots ends nspawn with 133, and whoever started it has to start it again.
        *("sh", "-c", 'until "$@"; do [ $? = 133 ] || exit 0; done', "host"),
        "systemd-nspawn",
        "--quiet",
        "--boot",
        "--register=no",
        "--keep-unit",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        "--console=pipe",
        f"--machine={host.name}{SUFFIX}",
        f"--hostname={host.name}",
        f"--directory={host.root}",
        f"--network-namespace-path={network.NETNS_FOLDER / host.netns}",
    ]
    # /tmp on the overlay: a tmpfs of a tenth of the memory is too small for an installer.
    start(
        f"host:{host.name}:",
        command,
        log=host.folder / "console.log",
        env={"SYSTEMD_NSPAWN_TMPFS_TMP": "0"},
        cgroup_folders=folders,
    )


def container_pids(name: str = "") -> list[int]:
    """The pids here of everything that runs in a host, or in all hosts, oldest first.

    Taken from the cgroup: it holds the host's processes also when its nspawn was killed, which
    leaves PID 1 of the container running.
    """
    found: set[int] = set()
    for root in cgroup_roots():
        # os.walk, unlike rglob, passes over a cgroup that goes while it is read.
        for folder, _, _ in os.walk(root / CGROUP / name):
            with contextlib.suppress(OSError):
                procs = Path(folder, "cgroup.procs").read_text()
                found.update(int(pid) for pid in procs.split())
    # Not by number: numbers begin anew when they are used up.
    ages = {pid: seconds_since_start(pid) for pid in found}
    alive = {pid: age for pid, age in ages.items() if age is not None}
    return sorted(alive, key=lambda pid: (-alive[pid], pid))


def is_init(pid: int) -> bool:
    """Whether a process is PID 1 of its host; the last of its ids is the one that it has there."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.split("NSpid:")[1].splitlines()[0].split()[-1] == "1"


def kill_containers(name: str = "", seconds: float = 10) -> None:
    """SIGKILL everything in a host, or in all hosts; LabError when something survives."""
    begin = time.monotonic()
    while pids := container_pids(name):
        if time.monotonic() > begin + seconds:
            raise LabError(f"these processes survived SIGKILL: {pids}")
        # nspawn ends by itself once it has reaped its container.
        patient = time.monotonic() < begin + 2
        nspawn = {process.pid for process in processes("host:")} if patient else set()
        for pid in set(pids) - nspawn:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                handle = os.pidfd_open(pid)
                try:
                    # The descriptor pins the pid; only now is its cgroup a proof.
                    if f"/{CGROUP}/{name}" in Path(f"/proc/{pid}/cgroup").read_text():
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        time.sleep(0.05)


def set_ssh(host: Host, *, on: bool) -> None:
    """Start a host's sshd, or stop it and end its sessions; everything else goes on."""
    init = next(filter(is_init, container_pids(host.name)))
    enter = ["nsenter", f"--target={init}", "--all"]
    if on:
        run([*enter, "systemctl", "start", "ssh.service"])
    else:
        run([*enter, "systemctl", "stop", "ssh.service", "ssh.socket"], check=False)
        run([*enter, "pkill", "--exact", "sshd"], check=False)


def power_off(host: Host) -> None:
    """Cut the power: SIGKILL, nothing is told. The overlay stays."""
    (host.folder / POWERED_OFF).touch()
    kill_containers(host.name)


def answers_ssh(host: Host) -> bool:
    """Whether sshd sends its greeting within a second."""
    try:
        with socket.create_connection((host.address, 22), timeout=1) as connection:
            connection.settimeout(1)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def ssh_command(host: Host) -> list[str]:
    return [
        "ssh",
        "-F",
        "none",
        "-i",
        str(KEY),
        "-o",
        f"UserKnownHostsFile={KNOWN_HOSTS}",
        "-o",
        "StrictHostKeyChecking=yes",
        "-o",
        "IdentitiesOnly=yes",
        "-o",
        "ConnectTimeout=5",
        f"{USER}@{host.address}",
    ]


def can_log_in(host: Host) -> bool:
    return run([*ssh_command(host), "true"], check=False).returncode == 0


def wait_for_ssh(hosts: list[Host], seconds: float = 60) -> None:
    """Wait until a login works on every host (one that refuses while booting is asked again)."""

    def wait(host: Host) -> str | None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not container_pids(host.name):
                return f"{host.name} ended while it booted"
            if answers_ssh(host) and can_log_in(host):
                return None
            time.sleep(0.2)
        return f"{host.name} does not answer on {host.address}:22 after {seconds:.0f} s"

    with ThreadPoolExecutor(max_workers=16) as pool:
        problems = [problem for problem in pool.map(wait, hosts) if problem]
    if problems:
        raise LabError("; ".join(problems) + f"; see {HOSTS}/<host>/console.log")


def ensure(hosts: list[Host], rootfs: Path) -> None:
    """Create, mount and boot the hosts, and wait until each takes a login."""
    ensure_login_key()
    HOSTS.mkdir(parents=True, exist_ok=True)

    def bring_up(host: Host) -> None:
        create(host)
        mount(host, rootfs)
        network.ensure_host(host)
        if not (host.folder / POWERED_OFF).exists():
            boot(host)

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(bring_up, hosts))
    pin_host_keys(hosts)
    on = [host for host in hosts if not (host.folder / POWERED_OFF).exists()]
    say(f"{len(on)} hosts are booting")
    wait_for_ssh(on)
    say(f"{len(on)} hosts answer over SSH")


def remove_cgroup(folder: Path, seconds: float = 5) -> None:
    """Remove an empty cgroup; the kernel may need a moment after its last process."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            folder.rmdir()
        except OSError as error:
            if time.monotonic() > deadline:
                raise LabError(f"cgroup {folder} could not be removed: {error}") from error
            time.sleep(0.05)
        else:
            return


def remove_all() -> list[str]:
    """Remove the mounts, folders and cgroups of all hosts; they must have stopped."""
    removed = []
    for point in mounts_below(HOSTS):
        run(["umount", point], check=False)
        if point in mounts_below(Path(point)):
            run(["umount", "--lazy", point])
        removed.append(f"mount {point}")
    for root in cgroup_roots():
        top = root / CGROUP
        for folder, _, _ in os.walk(top, topdown=False):
            remove_cgroup(Path(folder))
    if HOSTS.is_dir():
        shutil.rmtree(HOSTS)
        removed.append(f"folder {HOSTS}")
    return removed
