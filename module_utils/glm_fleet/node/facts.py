# SPDX-License-Identifier: Apache-2.0
"""Everything that preflight and health ask of a host, read in one go and without writing.

Each fact is read on its own: what fails leaves its place empty and adds a sentence to
``errors``, so that one broken tool never hides the rest. What only some hosts are asked is
imported where it is asked: every call compiles the code anew.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..core.errors import FleetError
from ..core.runner import run_program
from ..core.systemd import read_units
from ..release.installed import COMPLETE, find_damage
from ..serving.rehearsals import REHEARSALS, read_rehearsals
from .acceptance.record import look
from .artifacts import protected_ids, read_artifacts, read_link, read_staging
from .certificate import read_certificate
from .gateway import read_gateway
from .kernel import read_xids
from .processes import read_listeners, unit_of, vllm_processes
from .query import TIMEOUT_S, Host, NodeQuery
from .system import (
    read_clock,
    read_disk,
    read_memory,
    read_os,
    read_systemd_version,
    read_uptime,
    read_user,
)

if TYPE_CHECKING:
    from ..serving.probe import Probe

FABRIC_MANAGER = "nvidia-fabricmanager.service"


def read(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `read_node` of the host that this runs on; the arguments are those of `NodeQuery`."""
    return read_node(NodeQuery(**arguments), Host(run_program))


def read_node(query: NodeQuery, host: Host) -> dict[str, Any]:
    """Return the facts of this host as plain data; see RETURN of the module node_info."""
    errors: list[str] = []

    def attempt(what: str, default: Any, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except FleetError as error:
            errors.append(f"{what}: {error.message}: {error.found}")
        except (OSError, ValueError, LookupError) as error:
            errors.append(f"{what}: {error}")
        return default

    # The clock first: every later second of reading would count as skew.
    clock = attempt("clock", {}, read_clock, query.controller_epoch, host)
    with ThreadPoolExecutor(2) as pool:
        slow = {}
        if query.gpus:
            # Under way while the rest is read.
            unread = {"gpus": [], "error": "what nvidia-smi says cannot be read"}
            slow["gpu"] = pool.submit(attempt, "gpu", unread, _read_gpu, host)
            slow["xids"] = pool.submit(attempt, "xids", [], read_xids, query.xid_window_s, host.run)
        facts = _read_system(query, host, attempt)
        facts["clock"] = clock
        if query.environment_root:
            # The file that the build of an environment writes last.
            built = Path(query.environment_root).glob(f"*/{COMPLETE}")
            facts["environments"] = sorted(path.parent.name for path in built)
            facts["environment"] = attempt("environment", {}, _read_environment, query, facts)
        if query.artifact_root:
            root = Path(query.artifact_root)
            links = [Path(path) for path in query.links.values()]
            facts["protected"] = attempt(
                "previous", None, protected_ids, links, Path(query.previous)
            )
            facts["artifacts"] = read_artifacts(root, query.provenance_keys, errors)
            facts["staging_bytes"] = attempt("staging", {}, read_staging, root / ".staging")
        if query.attest:
            rehearsed = attempt("rehearsals", [], read_rehearsals, REHEARSALS)
            facts.update({"rehearsal": rehearsed[-1]} if rehearsed else {})
            facts["attestation"], facts["attestation_error"] = read_attestation(query, facts, host)
        if query.certificate:
            facts["certificate"] = read_certificate(Path(query.certificate))
        if query.front_door:
            facts["gateway"] = attempt("gateway", {}, read_gateway, query, host.run)
        facts.update({name: each.result() for name, each in slow.items()})
    if query.gpus and query.environment_root:
        facts["acceptance"] = attempt("acceptance", {}, _read_acceptance, query, facts)
    # Tools answer in any order; the report should not change with it.
    facts["errors"] = sorted(errors)
    return facts


def _home(query: NodeQuery, facts: Mapping[str, Any]) -> Path | None:
    """Return the environment that the next start runs from, None without one."""
    target = (facts["links"].get("current") or {}).get("target")
    home = Path(query.environment_root, Path(target).name) if target else None
    return home if home is not None and home.is_dir() else None


def _read_acceptance(query: NodeQuery, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Look whether the GPUs were accepted as they are: see `acceptance.record.look`."""
    report = facts["gpu"]
    return look(report["gpus"], report.get("driver_version"), _home(query, facts))


def _read_environment(query: NodeQuery, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Look whether what the next start runs from is whole: {release, damage}, {} without one."""
    home = _home(query, facts)
    if home is None:
        return {}
    return {"release": home.name, "damage": [str(each) for each in find_damage(home)[:100]]}


def _read_system(query: NodeQuery, host: Host, attempt: Callable[..., Any]) -> dict[str, Any]:
    memory = attempt("memory", {}, read_memory, host.proc / "meminfo")
    names = [query.unit, FABRIC_MANAGER] if query.gpus else [query.unit]
    units = attempt("units", {}, read_units, host.run, names)
    disks = [attempt(f"disk {path}", {}, read_disk, Path(path)) for path in query.paths]
    facts: dict[str, Any] = {
        "os": attempt("os", {}, read_os, host.os_release),
        "python": platform.python_version(),
        "systemd": attempt("systemd", None, read_systemd_version, host.run),
        "commands": {name: shutil.which(name) for name in query.commands},
        "memory_total_bytes": memory.get("MemTotal"),
        "memory_available_bytes": memory.get("MemAvailable"),
        "uptime_s": attempt("uptime", None, read_uptime, host.proc / "uptime"),
        "disks": [disk for disk in disks if disk],
        "listeners": attempt("listeners", [], read_listeners, query.ports, host.proc),
        "users": {name: read_user(name) for name in query.users},
        "links": {
            name: attempt(f"link {path}", None, read_link, Path(path))
            for name, path in query.links.items()
        },
        "unit": units.get(query.unit, {}),
        "vllm_processes": [
            each.as_dict() for each in attempt("processes", [], vllm_processes, host.proc)
        ],
        "artifacts": [],
        "protected": None,
        "environments": [],
        "staging_bytes": {},
    }
    if query.gpus:
        fabric = attempt("fabric manager", {}, read_fabric, host)
        facts["fabric_manager"] = {**units.get(FABRIC_MANAGER, {}), **fabric}
    return facts


def _read_gpu(host: Host) -> dict[str, Any]:
    from .gpu import read_gpus

    gpu = read_gpus(host.run).as_dict()
    for each in gpu["gpus"]:
        each["processes"] = [
            {**process, "unit": unit_of(process["pid"], host.proc)} for process in each["processes"]
        ]
    return gpu


def read_fabric(host: Host) -> dict[str, Any]:
    """Return {nvswitches, version}: boards with NVSwitch need a fabric manager like the driver."""
    switches = host.proc / "driver" / "nvidia-nvswitch" / "devices"
    count = len(list(switches.iterdir())) if switches.is_dir() else 0
    version = None
    if shutil.which("nv-fabricmanager"):
        answer = host.run(["nv-fabricmanager", "--version"], timeout=TIMEOUT_S, check=False)
        match = re.search(r"\d+\.\d+(\.\d+)?", answer.stdout + answer.stderr)
        version = match.group() if match else None
    return {"nvswitches": count, "version": version}


def read_attestation(query: NodeQuery, facts: Mapping[str, Any], host: Host) -> tuple[Probe, str]:
    """Look at the service of this node: (what `engine.look` gives, why there is nothing)."""
    from ..serving import engine

    wanted = {
        name: PurePosixPath((facts["links"].get(name) or {}).get("target") or "").name
        for name in ("current", "model")
    }
    if facts["unit"].get("load_state") != "loaded":
        return {}, ""
    try:
        found = engine.look(
            host.run,
            unit=query.unit,
            release=wanted["current"],
            model=wanted["model"],
            canary_timeout_s=query.canary_timeout_s,
            proc=host.proc,
        )
    except (FleetError, OSError, ValueError, LookupError) as error:
        return {}, str(error)
    return found, ""
