# SPDX-License-Identifier: Apache-2.0
"""Processes, as /proc lists them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process: id, owner's user id and command line."""

    pid: int
    uid: int
    command: str


def is_vllm(command: str) -> bool:
    """Tell whether a command line is of a vLLM server: the API server, the engine or a worker.

    Engine and workers rename themselves to ``VLLM::...``; before that, and the server always, they
    have the command line of ``vllm serve`` or of a module of ``vllm.entrypoints``.
    """
    words = command.split()
    return (
        command.startswith("VLLM::")
        or "vllm.entrypoints" in command
        or any(
            word.rpartition("/")[2] == "vllm" and following == "serve"
            for word, following in zip(words, words[1:])
        )
    )


def list_processes(proc: Path = Path("/proc")) -> list[Process]:
    """List the processes of this host; those that end meanwhile are left out."""
    found = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            raw = (entry / "cmdline").read_bytes()
            uid = entry.stat().st_uid
        except OSError:
            continue
        command = raw.replace(b"\0", b" ").decode(errors="replace").strip()
        if command:
            found.append(Process(int(entry.name), uid, command))
    return found
