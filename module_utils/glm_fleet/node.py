# SPDX-License-Identifier: Apache-2.0
"""Everything that preflight and health ask of a host, read in one go and without writing.

Each fact is read on its own: what fails leaves its place empty and adds a sentence to
``errors``, so that one broken tool never hides the rest. What only some hosts are asked is
imported where it is asked: every call compiles the code anew.
"""

from __future__ import annotations

import json
import os
import platform
import pwd
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .artifact import PREVIOUS, find_damage, load_manifest, protected_by
from .environment import COMPLETE
from .errors import FleetError
from .runner import Runner, run_program

FABRIC_MANAGER = "nvidia-fabricmanager.service"

# What `NodeQuery` is made from, as Ansible's argument_spec; library/node_info.py documents it.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gpus": {"type": "bool", "default": True},
    "commands": {"type": "list", "elements": "str", "default": []},
    "paths": {"type": "list", "elements": "str", "default": []},
    "ports": {"type": "list", "elements": "int", "default": []},
    "users": {"type": "list", "elements": "str", "default": []},
    "links": {"type": "dict", "default": {}},
    "unit": {"type": "str", "default": "glm-serving.service"},
    "artifact_root": {"type": "str", "default": ""},
    "previous": {"type": "str", "default": PREVIOUS},
    "environment_root": {"type": "str", "default": ""},
    "provenance_keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
    "controller_epoch": {"type": "float"},
    "xid_window_s": {"type": "int", "default": 86400},
    "attest": {"type": "bool", "default": False},
    "canary_timeout_s": {"type": "float", "default": 20.0},
    "gateway_url": {"type": "str", "default": ""},
    "gateway_config": {"type": "path", "default": "/etc/haproxy/haproxy.cfg"},
}

_TIMEOUT_S = 30.0
_LISTEN = "0A"
_SYSTEM_UID_END = 1000
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_UNIT = re.compile(r"[^/]+\.(?:service|scope)")
_XID = re.compile(r"(?P<kind>S?Xid) \(PCI:(?P<device>[0-9A-Fa-f:.]+)\): (?P<code>\d+)")
_UNIT_FIELDS = (
    "Id,LoadState,ActiveState,SubState,NRestarts,MainPID,InvocationID,ActiveEnterTimestamp"
)


@dataclass(frozen=True)
class NodeQuery:
    """What to look for on a host.

    ``controller_epoch`` is the controller's clock in seconds since 1970 when the question
    was sent; ``xid_window_s`` is how far back the kernel's log is read; ``links`` are
    {name: path} of symbolic links to what is active, ``previous`` the file that names what was
    before; ``provenance_keys`` are copied out of each manifest.
    ``attest`` looks at the service too, wanting the release and model that the links
    ``current`` and ``model`` name; ``gateway_url`` asks HAProxy, and itself as a client does.
    """

    commands: Sequence[str] = ()
    paths: Sequence[str] = ()
    ports: Sequence[int] = ()
    users: Sequence[str] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    unit: str = "glm-serving.service"
    artifact_root: str = ""
    environment_root: str = ""
    previous: str = PREVIOUS
    provenance_keys: Sequence[str] = ()
    controller_epoch: float | None = None
    xid_window_s: int = 86400
    gpus: bool = True
    attest: bool = False
    canary_timeout_s: float = 20.0
    gateway_url: str = ""
    gateway_config: str = "/etc/haproxy/haproxy.cfg"


@dataclass(frozen=True)
class Host:
    """Where facts come from: programs, the process table, the clock, the system's files."""

    run: Runner
    now: Callable[[], float] = time.time
    proc: Path = Path("/proc")
    os_release: Path = Path("/etc/os-release")


@dataclass(frozen=True)
class Process:
    """A process: its unit is the systemd service or scope that its control group names."""

    pid: int
    name: str
    user: str
    unit: str
    command: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(vars(self))


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
            slow["gpu"] = pool.submit(_read_gpu, host)
            slow["xids"] = pool.submit(attempt, "xids", [], read_xids, query.xid_window_s, host.run)
        facts = _read_system(query, host, attempt)
        facts["clock"] = clock
        if query.environment_root:
            # The file that the build of an environment writes last.
            built = Path(query.environment_root).glob(f"*/{COMPLETE}")
            facts["environments"] = sorted(path.parent.name for path in built)
        if query.artifact_root:
            root = Path(query.artifact_root)
            links = [Path(path) for path in query.links.values()]
            facts["protected"] = attempt("previous", None, _protected, links, Path(query.previous))
            facts["artifacts"] = read_artifacts(root, query.provenance_keys, errors)
            facts["staging_bytes"] = attempt("staging", {}, read_staging, root / ".staging")
        if query.attest:
            facts["attestation"], facts["attestation_error"] = read_attestation(query, facts, host)
        if query.gateway_url:
            facts["gateway"] = read_gateway(query, host.run)
        facts.update({name: each.result() for name, each in slow.items()})
    # In whatever order they were found.
    facts["errors"] = sorted(errors)
    return facts


def _read_system(query: NodeQuery, host: Host, attempt: Callable[..., Any]) -> dict[str, Any]:
    memory = attempt("memory", {}, read_memory, host.proc / "meminfo")
    names = [query.unit, FABRIC_MANAGER] if query.gpus else [query.unit]
    units = attempt("units", {}, read_units, names, host.run)
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


def read_clock(controller_epoch: float | None, host: Host) -> dict[str, float]:
    """Return {epoch_s, skew_s}; the skew contains the time that the question was under way."""
    now = host.now()
    if controller_epoch is None:
        return {"epoch_s": now}
    return {"epoch_s": now, "skew_s": round(now - controller_epoch, 3)}


def read_os(os_release: Path) -> dict[str, str]:
    """Return {id, version, name, kernel, arch} of the operating system."""
    pairs = (line.partition("=") for line in os_release.read_text().splitlines() if "=" in line)
    fields = {key: value.strip("\"'") for key, _, value in pairs}
    return {
        "id": fields.get("ID", ""),
        "version": fields.get("VERSION_ID", ""),
        "name": fields.get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        "arch": platform.machine(),
    }


def read_systemd_version(run: Runner) -> int | None:
    """Return the major version of systemd."""
    match = re.match(r"systemd (\d+)", run(["systemctl", "--version"], timeout=_TIMEOUT_S).stdout)
    return int(match.group(1)) if match else None


def read_memory(meminfo: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), flags=re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def read_uptime(uptime: Path) -> float:
    """Return the seconds since the host was started."""
    return float(uptime.read_text().split()[0])


def read_disk(path: Path) -> dict[str, Any]:
    """Return the file system that holds ``path``, or would: {path, exists, mount, ...} in bytes.

    ``device`` is equal for paths that share one file system and so its free space.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    existing = existing.resolve()
    mount = existing
    while not os.path.ismount(mount):
        mount = mount.parent
    space = os.statvfs(existing)
    return {
        "path": str(path),
        "existing": str(existing),
        "mount": str(mount),
        "device": existing.stat().st_dev,
        "free_bytes": space.f_bavail * space.f_frsize,
        "total_bytes": space.f_blocks * space.f_frsize,
    }


def read_user(name: str) -> dict[str, Any]:
    """Return {exists, uid, system}: a system user has a uid below 1000."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return {"exists": False}
    return {"exists": True, "uid": entry.pw_uid, "system": entry.pw_uid < _SYSTEM_UID_END}


def read_link(path: Path) -> dict[str, Any]:
    """Return where a symbolic link leads: {path, target (or None), exists}."""
    target = str(path.readlink()) if path.is_symlink() else None
    return {"path": str(path), "target": target, "exists": path.exists()}


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


def read_process(pid: int, proc: Path) -> Process | None:
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
    return Process(pid, name, user, unit_of(pid, proc), command)


def _names(pid: int, proc: Path) -> tuple[str, str]:
    """Return a process's name and its command line, up to 2000 characters."""
    folder = proc / str(pid)
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return (folder / "comm").read_text().strip(), command.strip()[:2000]


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


def vllm_processes(proc: Path) -> list[Process]:
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
    words = command.split()
    return (
        name.startswith("VLLM::")
        or command.startswith("VLLM::")
        or "vllm.entrypoints" in command
        or any(
            word.rpartition("/")[2] == "vllm" and following == "serve"
            for word, following in zip(words, words[1:])
        )
    )


def read_units(names: Sequence[str], run: Runner) -> dict[str, dict[str, Any]]:
    """Ask systemd about units: {name: {name, load_state, active_state, n_restarts, ...}}."""
    answer = run(["systemctl", "show", "-p", _UNIT_FIELDS, *names], timeout=_TIMEOUT_S)
    units: dict[str, dict[str, Any]] = {}
    for block in answer.stdout.strip().split("\n\n"):
        fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in fields:
            units[fields["Id"]] = {
                "name": fields["Id"],
                "load_state": fields.get("LoadState", ""),
                "active_state": fields.get("ActiveState", ""),
                "sub_state": fields.get("SubState", ""),
                "n_restarts": int(fields.get("NRestarts") or 0),
                "main_pid": int(fields.get("MainPID") or 0),
                "invocation_id": fields.get("InvocationID", ""),
                "active_since": fields.get("ActiveEnterTimestamp", ""),
            }
    return units


def read_fabric(host: Host) -> dict[str, Any]:
    """Return {nvswitches, version}: boards with NVSwitch need a fabric manager like the driver."""
    switches = host.proc / "driver" / "nvidia-nvswitch" / "devices"
    count = len(list(switches.iterdir())) if switches.is_dir() else 0
    version = None
    if shutil.which("nv-fabricmanager"):
        answer = host.run(["nv-fabricmanager", "--version"], timeout=_TIMEOUT_S, check=False)
        match = re.search(r"\d+\.\d+(\.\d+)?", answer.stdout + answer.stderr)
        version = match.group() if match else None
    return {"nvswitches": count, "version": version}


def read_xids(window_s: int, run: Runner) -> list[dict[str, Any]]:
    """Return the GPU driver's Xid and SXid lines of this boot within the window.

    Each is {kind: Xid|SXid, code, device, time_s, message}.
    """
    answer = run(
        [
            "journalctl",
            "--boot",
            "--output=json",
            "--output-fields=MESSAGE",
            "--no-pager",
            f"--since=-{window_s}s",
            "SYSLOG_IDENTIFIER=kernel",
        ],
        timeout=_TIMEOUT_S,
    )
    return list(parse_xids(answer.stdout))


def parse_xids(journal: str) -> Iterator[dict[str, Any]]:
    """Pick the Xid and SXid lines out of the journal's JSON lines."""
    for line in journal.splitlines():
        if "Xid" not in line:
            continue
        entry = json.loads(line)
        message = entry.get("MESSAGE")
        match = _XID.search(message) if isinstance(message, str) else None
        if match:
            yield {
                "kind": match["kind"],
                "code": int(match["code"]),
                "device": match["device"],
                "time_s": int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6,
                "message": message,
            }


def read_attestation(
    query: NodeQuery, facts: Mapping[str, Any], host: Host
) -> tuple[dict[str, Any], str]:
    """Look at the service of this node: (what `engine.look` gives, why there is nothing)."""
    from . import engine

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
    except FleetError as error:
        return {}, str(error)
    return found, ""


def read_gateway(query: NodeQuery, run: Runner) -> dict[str, Any]:
    """Return what HAProxy says of itself, of its configuration on disk and as a client sees it."""
    from .fleet_lock import FleetLock
    from .haproxy import MASTER_SOCKET, SOCKET, Haproxy, describe, unix_transport

    found = describe(Haproxy(unix_transport(SOCKET), unix_transport(MASTER_SOCKET)))
    found["config_error"] = check_config(query.gateway_config, run)
    found["client"] = ask_as_client(query.gateway_url)
    found["held"] = FleetLock().held()
    return found


def check_config(path: str, run: Runner) -> str:
    """Return HAProxy's complaint about a configuration, '' when it is valid."""
    try:
        answer = run(["haproxy", "-c", "-q", "-f", path], timeout=_TIMEOUT_S, check=False)
    except FleetError as error:
        return f"{error.message}: {error.found}"
    if answer.rc == 0:
        return ""
    lines = [line for line in answer.stderr.splitlines() if "[ALERT]" in line]
    return " ".join((lines or answer.stderr.splitlines() or ["it is not valid"])[0].split())[:300]


def ask_as_client(url: str) -> dict[str, Any]:
    """Ask the gateway's own front door for a node's health: {status, seconds, node, error}."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    begun = time.monotonic()
    result: dict[str, Any] = {"status": 0, "node": "", "error": ""}
    # From the gateway to itself, where the certificate's name cannot match.
    context = ssl._create_unverified_context() if url.startswith("https") else None  # noqa: S323
    try:
        answer = urllib.request.urlopen(url, timeout=10, context=context)  # noqa: S310
    except urllib.error.HTTPError as error:
        result.update(status=error.code, node=error.headers.get("X-Glm-Fleet-Node", ""))
        error.close()
    except (OSError, http.client.HTTPException) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    else:
        with answer:
            answer.read()
        result.update(status=answer.status, node=answer.headers.get("X-Glm-Fleet-Node", ""))
    return {**result, "seconds": round(time.monotonic() - begun, 4)}


def read_damage(folder: Path) -> list[str]:
    """Name the files of a published artifact that are missing, foreign or of another size."""
    try:
        damage = find_damage(folder, load_manifest(folder), deep=False)
    except FleetError as error:
        return [f"manifest.json damaged ({error.message}: {error.found})"]
    return [str(each) for each in damage]


def read_artifacts(root: Path, keys: Sequence[str], errors: list[str]) -> list[dict[str, Any]]:
    """Return the published artifacts: {kind, id, bytes, published_at, damage, provenance}.

    ``published_at`` is in seconds since 1970, ``damage`` comes from sizes alone, one look a
    file, and of the provenance there are only the asked keys.

    A manifest that cannot be read is named in ``errors`` and its artifact left out.
    """
    found = []
    for path in sorted(root.glob("[!.]*/[!.]*/manifest.json")):
        try:
            manifest = json.loads(path.read_text())
            provenance = manifest["provenance"]
            found.append(
                {
                    "kind": manifest["kind"],
                    "id": manifest["id"],
                    "bytes": sum(int(each["size"]) for each in manifest["files"]),
                    "published_at": path.stat().st_mtime,
                    "damage": read_damage(path.parent),
                    "provenance": {key: provenance[key] for key in keys if key in provenance},
                }
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            errors.append(f"manifest {path}: {type(error).__name__}: {error}")
    return found


def _protected(links: Sequence[Path], previous: Path) -> list[str]:
    return sorted(protected_by(links, previous))


def read_staging(staging: Path) -> dict[str, int]:
    """Return the bytes on disk of artifacts that are still on their way, by kind."""
    return {
        kind.name: sum(_disk_usage(path) for path in kind.rglob("*"))
        for kind in (staging.iterdir() if staging.is_dir() else ())
        if kind.is_dir()
    }


def _disk_usage(path: Path) -> int:
    """Return allocated bytes, because a preallocated file has a size and no content yet."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return min(status.st_size, status.st_blocks * 512)


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
