# SPDX-License-Identifier: Apache-2.0
"""Processes, their users and units, and the ports that they listen on."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.procfs import is_vllm

_LISTEN = "0A"
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_UNIT = re.compile(r"[^/]+\.(?:service|scope)")


@dataclass(frozen=True)
class OwnedProcess:
    """A process: its unit is the systemd service or scope that its control group names."""

    pid: int
    name: str
    user: str
    unit: str
    command: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(vars(self))


def read_listeners(ports: Sequence[int], proc: Path) -> list[dict[str, Any]]:
    """Return who listens on the asked TCP ports: {port, pid, name, user, unit, command}.

    ``pid`` is None when the owner cannot be seen (not root, or another namespace).
    """
    inodes: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        path = proc / "net" / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            cells = line.split()
            port = int(cells[1].rpartition(":")[2], 16)
            if cells[3] == _LISTEN and port in ports:
                inodes[cells[9]] = port
    if not inodes:
        return []
    owners: dict[str, int] = {}
    for pid in sorted(_pids(proc)):
        for inode in _sockets(proc / str(pid) / "fd"):
            owners.setdefault(inode, pid)
        if inodes.keys() <= owners.keys():
            break
    found: dict[tuple[int, int | None], dict[str, Any]] = {}
    for inode, port in inodes.items():
        owner = owners.get(inode)
        process = read_process(owner, proc) if owner is not None else None
        found[port, owner] = {
            "port": port,
            **(process.as_dict() if process else {"pid": None, "name": "", "user": "", "unit": ""}),
        }
    return sorted(found.values(), key=lambda each: (each["port"], each["pid"] or 0))


def read_process(pid: int, proc: Path) -> OwnedProcess | None:
    """Return one process, or None when it has gone."""
    try:
        name, command = _names(pid, proc)
        uid = (proc / str(pid)).stat().st_uid
    except OSError:
        return None
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return OwnedProcess(pid, name, user, unit_of(pid, proc), command)


def _names(pid: int, proc: Path) -> tuple[str, str]:
    """Return a process's name and its command line, up to 2000 characters."""
    folder = proc / str(pid)
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return (folder / "comm").read_text(errors="replace").strip(), command.strip()[:2000]


def unit_of(pid: int, proc: Path) -> str:
    """Return the systemd service or scope of a process, or an empty string."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "name=systemd"):
            units = _UNIT.findall(path)
            if units:
                return str(units[-1])
    return ""


def vllm_processes(proc: Path) -> list[OwnedProcess]:
    """Return every process of a vLLM server: the API server, the engine and its workers.

    The engine and the workers rename themselves to ``VLLM::...``.
    """
    own = os.getpid()
    pids = [pid for pid in sorted(_pids(proc)) if pid != own and _is_vllm(pid, proc)]
    return [process for process in (read_process(pid, proc) for pid in pids) if process]


def _is_vllm(pid: int, proc: Path) -> bool:
    try:
        name, command = _names(pid, proc)
    except OSError:
        return False
    return is_vllm(name) or is_vllm(command)


def _pids(proc: Path) -> Iterator[int]:
    return (int(entry.name) for entry in proc.iterdir() if entry.name.isdigit())


def _sockets(folder: Path) -> Iterator[str]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        try:
            match = _SOCKET.fullmatch(str(entry.readlink()))
        except OSError:
            continue
        if match:
            yield match.group(1)
