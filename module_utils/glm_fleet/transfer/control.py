# SPDX-License-Identifier: Apache-2.0
"""Starting the agent, and asking it.

python3 -m glm_fleet.swarm agent < job.json      the agent (needs libtorrent)
python3 -m glm_fleet.swarm ask < request.json    one question to it, one answer
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ..artifact.manifest import KINDS, Manifest
from ..artifact.store import Store
from ..core.decode import Words, parse, read
from ..core.errors import FleetError
from .agent import Agent
from .session import Job

RUN_FOLDER = Path("/run/glm-fleet/swarm")
UNIT = "glm-swarm.service"
# The service on a node comes first.
NICE = 10


class _Handler(socketserver.StreamRequestHandler):
    """One question, one answer: JSON, a line each."""

    server: _Server

    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        self.wfile.write(json.dumps(self.server.agent.answer(request)).encode() + b"\n")


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path, agent: Agent) -> None:
        self.agent = agent
        path.unlink(missing_ok=True)
        super().__init__(str(path), _Handler)


def ask(request: Mapping[str, Any], folder: Path = RUN_FOLDER) -> dict[str, Any]:
    """Ask the agent of this host."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(float(request.get("wait", 0)) + 30)
        try:
            connection.connect(str(folder / "socket"))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
            return parse(dict[str, Any], line, what="The answer of the swarm's agent")
        except OSError as error:
            raise FleetError(
                "The swarm's agent on this node does not answer",
                expected=f"an answer on {folder / 'socket'}",
                found=str(error),
                remedy=f"read journalctl -u {UNIT} on the node, then run again",
            ) from error


# What the agent needs nothing of.
_FENCES = (
    "PrivateDevices",
    "PrivateTmp",
    "NoNewPrivileges",
    "ProtectKernelTunables",
    "ProtectKernelModules",
    "ProtectKernelLogs",
    "ProtectControlGroups",
    "ProtectClock",
    "ProtectHostname",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "LockPersonality",
    "MemoryDenyWriteExecute",
)


def untouchable(store: Store, manifest: Manifest) -> list[Path]:
    """Return the published folders of this host that an agent for this artifact only reads.

    These are all of them, but the artifact's own while a file of it is not known to be right: what
    is damaged there is moved back and fetched again.
    """
    own = store.published_path(manifest.kind, manifest.id)
    proven = store.proven(manifest.kind, manifest.id)
    sound = store.is_published(manifest) and all(
        proven.known(own, entry.path) == entry.sha256 for entry in manifest.files
    )
    found = (path for kind in KINDS for path in sorted((store.root / kind).glob("*")))
    return [
        path for path in found if path.is_dir() and not path.is_symlink() and (sound or path != own)
    ]


def unit_command(
    job_file: Path,
    root: Path,
    python: str,
    path: str,
    addresses: Iterable[str],
    fixed: Sequence[Path] = (),
) -> list[str]:
    """Return the command that starts the agent as a unit of its own, fenced in.

    ``addresses`` are those of the nodes; the kernel lets it talk with nobody else. ``fixed`` are
    folders below ``root`` that it can read alone.
    """
    properties = {
        "Description": "glm-fleet: take and give an artifact while it is distributed",
        "StandardInput": f"file:{job_file}",
        "Nice": str(NICE),
        "LimitNOFILE": "65536",
        "RuntimeMaxSec": "7d",
        "TimeoutStopSec": "20",
        "ProtectSystem": "strict",
        "ReadWritePaths": f"{root} {job_file.parent}",
        "CapabilityBoundingSet": "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "IPAddressDeny": "any",
        "IPAddressAllow": " ".join(sorted(set(addresses))),
        "ProtectProc": "invisible",
        "ProcSubset": "pid",
        "SystemCallArchitectures": "native",
        "SystemCallErrorNumber": "EPERM",
        **dict.fromkeys(_FENCES, "yes"),
    }
    if fixed:
        properties["ReadOnlyPaths"] = " ".join(map(str, fixed))
    if root.parts[1:2] not in (("home",), ("root",)):
        properties["ProtectHome"] = "yes"
    # Two lists: what a service needs, without what only root may do, but for giving files to root.
    calls = ("@system-service", "~@privileged @resources", "@chown setpriority sched_setaffinity")
    return [
        "systemd-run",
        "--quiet",
        "--collect",
        f"--unit={UNIT}",
        f"--setenv=PYTHONPATH={path}",
        *(f"--property={name}={value}" for name, value in properties.items()),
        *(f"--property=SystemCallFilter={each}" for each in calls),
        python,
        "-B",
        "-m",
        "glm_fleet.swarm",
        "agent",
        str(job_file.parent),
    ]


class _Failure(TypedDict):
    message: Words
    expected: Words
    found: Words
    remedy: Words


def failure_of(folder: Path) -> FleetError | None:
    """Return what an agent died of, if it said so."""
    try:
        said = read(_Failure, folder / "failure.json")
    except (FileNotFoundError, FleetError):
        return None
    return FleetError(
        said["message"], expected=said["expected"], found=said["found"], remedy=said["remedy"]
    )


def run_agent(job: Job, folder: Path) -> int:
    """Run until nobody needs it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.umask(0o022)
    engine = importlib.import_module("libtorrent")
    with Store(job.root).using(job.manifest.kind, job.manifest.id):
        agent = Agent(job, folder, engine=engine)
        server = _Server(folder / "socket", agent)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            while not agent.ended():
                agent.tick()
                agent.wait()
        finally:
            server.shutdown()
            agent.close()
            # Torrents are as good as a key: they go with the agent.
            for path in (folder / "socket", folder / "job.json", *folder.glob("*.torrent")):
                path.unlink(missing_ok=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Be the agent, or ask it: see the top."""
    words = list(sys.argv[1:] if argv is None else argv)
    folder = Path(words[1]) if len(words) > 1 else RUN_FOLDER
    try:
        if words[:1] == ["agent"]:
            return run_agent(Job.from_dict(json.load(sys.stdin)), folder)
        json.dump(ask(json.load(sys.stdin), folder), sys.stdout)
    except FleetError as error:
        if words[:1] == ["agent"]:
            said = {**error.as_fail(), "message": error.message}
            (folder / "failure.json").write_text(json.dumps(said))
        json.dump({"standing": "gone", "failure": error.as_fail()}, sys.stdout)
        return 1
    return 0
