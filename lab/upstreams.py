# SPDX-License-Identifier: Apache-2.0
"""What the fleet fetches from: git, the hub, the Debian repository, and the wheelhouse."""

from __future__ import annotations

import hashlib
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import model, source
from .settings import (
    BRIDGE_ADDRESS,
    FILES_PORT,
    GIT_PORT,
    HUB_PORT,
    MODEL_REPOSITORY,
    PULL_REQUEST,
    REPOSITORY,
    UPSTREAMS,
    VLLM_VERSION,
    LabError,
)
from .standin import CUDA_STUB, FAULT, SYMPTOM, VARIANTS
from .system import processes, run, start

HUB_FAULTS = UPSTREAMS / "hub-faults.json"


@dataclass(frozen=True)
class Upstream:
    """A server on the bridge: its name, port, the URL shown, and its command."""

    name: str
    port: int
    url: str
    command: list[str]

    def answers(self) -> bool:
        try:
            with socket.create_connection((BRIDGE_ADDRESS, self.port), timeout=1):
                return True
        except OSError:
            return False


def servers(debs: Path | None = None, git: Path | None = None) -> list[Upstream]:
    """The upstreams. The folders are only needed to start them."""
    served = UPSTREAMS / "files"
    base = f"http://{BRIDGE_ADDRESS}"
    if debs is not None:
        served.mkdir(parents=True, exist_ok=True)
        link = served / "debian"
        link.unlink(missing_ok=True)
        link.symlink_to(debs)
    git_command = [
        "git",
        "daemon",
        "--reuseaddr",
        "--export-all",
        f"--listen={BRIDGE_ADDRESS}",
        f"--port={GIT_PORT}",
        f"--base-path={git}",
        str(git),
    ]
    hub_command = [sys.executable, "-m", "lab.hub", "--bind", BRIDGE_ADDRESS]
    hub_command += ["--port", str(HUB_PORT), "--faults", str(HUB_FAULTS), str(model.HUB_FOLDER)]
    files_command = [sys.executable, "-m", "http.server", str(FILES_PORT)]
    files_command += ["--bind", BRIDGE_ADDRESS, "--directory", str(served)]
    return [
        Upstream("git", GIT_PORT, f"git://{BRIDGE_ADDRESS}:{GIT_PORT}/vllm.git", git_command),
        Upstream("hub", HUB_PORT, f"{base}:{HUB_PORT}", hub_command),
        Upstream("files", FILES_PORT, f"{base}:{FILES_PORT}/debian", files_command),
    ]


def ensure(debs: Path, git: Path) -> None:
    """Start the servers that do not run, and wait until all answer."""
    listed = servers(debs, git)
    for server in listed:
        if processes(f"upstream:{server.name}:"):
            continue
        if server.answers():
            raise LabError(f"port {server.port} on {BRIDGE_ADDRESS} belongs to another program")
        start(
            f"upstream:{server.name}:",
            server.command,
            log=UPSTREAMS / f"{server.name}.log",
            cwd=REPOSITORY,
        )
    deadline = time.monotonic() + 15
    while silent := [server for server in listed if not server.answers()]:
        if time.monotonic() > deadline:
            names = ", ".join(server.name for server in silent)
            raise LabError(f"no answer from upstream {names} after 15 s; see {UPSTREAMS}/*.log")
        time.sleep(0.1)


def inventory_vars(git: Path) -> dict[str, Any]:
    """The values that point the roles at the lab's upstreams."""
    repository = git / "vllm.git"

    def pull_request(number: int) -> dict[str, Any]:
        reference = f"refs/pull/{number}/head"
        head = run(["git", "-C", repository, "rev-parse", reference]).stdout.strip()
        return {"number": number, "head": head}

    main = [{**pull_request(PULL_REQUEST), "drop": [CUDA_STUB]}]
    patch = git / source.CORRECTION
    return {
        "release_repository": f"git://{BRIDGE_ADDRESS}:{GIT_PORT}/vllm.git",
        "release_ref": f"v{VLLM_VERSION}",
        "release_pull_requests": main,
        "release_patches": [
            {"file": str(patch), "sha256": hashlib.sha256(patch.read_bytes()).hexdigest()}
        ],
        "release_known_faults": [{"name": FAULT, "heads": [main[0]["head"]], "symptom": SYMPTOM}],
        # What to give as release_pull_requests for another release of the lab.
        "lab_releases": {
            name: [*main, pull_request(number)] for name, (number, *_) in VARIANTS.items()
        },
        "release_find_links": [str(source.WHEELS)],
        "release_base_wheel": str(source.base_wheel()),
        "model_endpoint": f"http://{BRIDGE_ADDRESS}:{HUB_PORT}",
        "model_repository": MODEL_REPOSITORY,
        "model_revision": model.main_revision(),
    }
