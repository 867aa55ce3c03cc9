# SPDX-License-Identifier: Apache-2.0
"""What a host must have, compared with what it has.

`evaluate` takes the facts of node_info and the expectations of the role preflight, both
plain data, and returns every problem at once: an ``error`` stops the run, a ``warning`` is
only named. `hardware_problems` is the part that stays true while a node serves; the health
report uses it too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from datetime import datetime, timezone
from typing import Any

from ..artifact.retention import retirable
from ..core.causes import why_no_answer
from ..core.errors import split_remedy
from ..core.format import human_bytes, parse_version
from ..fleet.authority import wrong_with
from ..fleet.inventory import GATEWAYS, NODES
from ..node.answer import Facts
from .hardware import ERROR, WARNING, DiskNeed, Expectations, Problem, hardware_problems
from .records import read_records, wrong_problem

_EXPIRES_SOON_S = 21 * 86400.0
# What fills up unnoticed: records of starts, states of HAProxy, journals.
_SMALL_FOLDERS = ("/run", "/var/lib", "/var/log")


def query(settings: Mapping[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """Return what the module node_info is asked of a host of these groups.

    ``settings`` are the role's variables without their prefix, of the types that its
    argument_specs give them.
    """
    node = NODES in groups
    ports = [settings["port"], settings["gateway_port"]]
    return {
        "gpus": node,
        "commands": settings["commands"],
        "paths": [
            settings["artifact_root"],
            settings["release_root"],
            settings["gateway_disk_path"],
            *_SMALL_FOLDERS,
        ],
        "ports": ports + [each["port"] for each in settings["ports"]],
        "users": [settings["user"]],
        "links": settings["links"],
        "unit": settings["unit"],
        "environment_root": settings["release_root"] if node else "",
        "artifact_root": settings["artifact_root"] if node else "",
        "provenance_keys": [*_model_provenance(settings), *settings["release_provenance"]],
        "xid_window_s": settings["xid_window_s"],
        "certificate": settings["gateway_tls_certificate"] if GATEWAYS in groups else "",
    }


def expectations(settings: Mapping[str, Any], groups: Collection[str]) -> list[dict[str, Any]]:
    """Return what `evaluate` compares a host with, once for each of its groups.

    Each is {gpu_node, expect}; ``settings`` as for `query`, ``expect`` plain data for
    `Expectations.from_dict`.
    """
    found = []
    if NODES in groups:
        elsewhere = ("disk", "certificate_names")
        names = [each.name for each in fields(Expectations) if each.name not in elsewhere]
        expect = {name: settings[name] for name in names}
        found.append({"gpu_node": True, "expect": {**expect, "disk": _node_disk(settings)}})
    if GATEWAYS in groups:
        names = ["architectures", "python_min", "systemd_min", "clock_skew_s", "certificate_names"]
        expect = {name: settings[name] for name in names}
        expect |= {"port": settings["gateway_port"], "unit": settings["gateway_unit"]}
        disk = {"path": settings["gateway_disk_path"], "bytes": settings["gateway_disk_bytes"]}
        expect["disk"] = [{"what": "gateway", **disk}]
        found.append({"gpu_node": False, "expect": expect})
    return found


def _certificate(host: str, facts: Facts, names: Collection[str]) -> Iterable[Problem]:
    found = facts.get("certificate")
    if not found:
        return
    wrong, severity = found["error"], ERROR
    now = float((facts.get("clock") or {}).get("epoch_s") or 0.0)
    left = found["expires_s"] - now
    known = not wrong and found["expires_s"] > 0
    if known and left <= 0:
        wrong = f"it expired {-left / 86400:.0f} days ago"
    elif known and now and found.get("chain"):
        wrong = wrong_with(found["chain"], names, datetime.fromtimestamp(now, timezone.utc))
    if known and not wrong and left < _EXPIRES_SOON_S:
        wrong, severity = f"it expires in {left / 86400:.0f} days", WARNING
    if wrong:
        yield Problem(
            host,
            "certificate",
            "certificate, chain and key in one PEM file, in this order, good for three weeks"
            + (f", for {', '.join(names)}" if names else ""),
            f"{found['path']}: {wrong}",
            "put the right file there, or correct gateway_tls_certificate or gateway_tls_names",
            severity,
        )


def _model_provenance(settings: Mapping[str, Any]) -> dict[str, str]:
    """A commit names one content; a branch is what was asked for when the model was fetched."""
    revision = settings["model_revision"]
    key = "revision" if re.fullmatch("[0-9a-f]{40}", revision) else "requested"
    return {"repository": settings["model_repository"], key: revision}


def _node_disk(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    release = {"kind": "release", "provenance": settings["release_provenance"]}
    return [
        {
            "what": "model",
            "path": settings["artifact_root"],
            "bytes": settings["disk_model_bytes"],
            "kind": "model",
            "provenance": _model_provenance(settings),
        },
        {
            "what": "wheels",
            "path": settings["artifact_root"],
            "bytes": settings["disk_wheels_bytes"],
            **release,
        },
        {
            "what": "environment",
            "path": settings["release_root"],
            "bytes": settings["disk_release_bytes"],
            "built": True,
            **release,
        },
    ]


def judge_hosts(records: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Return every problem of every host; ``records`` as for `read_records`."""
    problems: list[Problem] = []
    for host, record in read_records(records).items():
        if record.message:
            problems.append(unreachable(host, record.message))
        elif record.wrong:
            problems.append(wrong_problem(host, record.wrong))
        else:
            for part in record.expect:
                expect = Expectations.from_dict(part["expect"])
                found = evaluate(host, record.facts, expect, gpu_node=part["gpu_node"])
                problems += [each for each in found if each not in problems]
    return problems


def without_model(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the nodes that answered and do not have the wanted model yet."""
    found = []
    for host, record in read_records(records).items():
        parts = [each for each in record.expect if each["gpu_node"] and record.answered]
        needs = [need for part in parts for need in Expectations.from_dict(part["expect"]).disk]
        if any(need.kind == "model" and not _published(need, record.facts) for need in needs):
            found.append(host)
    return found


def evaluate(host: str, facts: Facts, expect: Expectations, *, gpu_node: bool) -> list[Problem]:
    """Return every problem of one host; ``gpu_node`` is false for a gateway."""
    problems = [*_system(host, facts, expect), *_disk(host, facts, expect)]
    problems += _port(host, facts, expect)
    if not gpu_node:
        problems += _certificate(host, facts, expect.certificate_names)
    if gpu_node:
        problems += _user(host, facts, expect)
        problems += hardware_problems(host, facts, expect)
        problems += _left_over(host, facts, expect)
    for error in facts.get("errors", ()):
        cause, step = split_remedy(str(error), "look at this tool on the host")
        known = why_no_answer(cause, host=host)
        remedy = known.remedy if known else step
        problems.append(Problem(host, "facts", "an answer", cause, remedy, WARNING))
    return problems


def unreachable(host: str, message: str) -> Problem:
    """Return the problem of a host that could not be asked at all."""
    said = " ".join(message.split())[:300] or "no answer"
    known = why_no_answer(message, host=host)
    return Problem(
        host,
        "connection",
        "an answer over SSH, with root by become",
        f"{known.cause} ({said})" if known else said,
        known.remedy if known else f"try: ansible -i INVENTORY -b -m ping {host}",
    )


def _system(host: str, facts: Facts, expect: Expectations) -> Iterable[Problem]:
    def wrong(check: str, expected: str, found: Any, remedy: str) -> Problem:
        return Problem(host, check, expected, str(found), remedy)

    arch = facts.get("os", {}).get("arch")
    if arch not in expect.architectures:
        yield wrong(
            "architecture",
            " or ".join(expect.architectures),
            arch or "unknown",
            "use a host of that architecture",
        )
    python = facts.get("python") or "unknown"
    if parse_version(python) < parse_version(expect.python_min):
        yield wrong(
            "Python",
            f"{expect.python_min} or newer",
            python,
            "install it and set ansible_python_interpreter",
        )
    systemd = facts.get("systemd")
    if systemd is None or systemd < expect.systemd_min:
        yield wrong(
            "systemd",
            f"{expect.systemd_min} or newer, as PID 1",
            systemd or "none",
            "use a newer distribution",
        )
    elif not facts.get("unit"):
        yield wrong(
            "systemd",
            "it answers, as PID 1",
            "installed, but no answer",
            "boot the host with systemd",
        )
    missing = [name for name in expect.commands if not facts.get("commands", {}).get(name)]
    if missing:
        yield wrong(
            "commands",
            ", ".join(expect.commands),
            f"missing: {', '.join(missing)}",
            "install the packages that provide them",
        )
    memory = facts.get("memory_total_bytes")
    if memory is None or memory < expect.ram_bytes:
        yield wrong(
            "RAM",
            f"{human_bytes(expect.ram_bytes)} or more",
            "unknown" if memory is None else human_bytes(memory),
            "use a bigger host, or set preflight_ram_bytes",
        )
    skew = facts.get("clock", {}).get("skew_s")
    if skew is not None and abs(skew) > expect.clock_skew_s:
        yield wrong(
            "clock",
            f"within {expect.clock_skew_s:g} s of the controller",
            f"{abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}",
            "start a time service (chrony) on the host, or on the controller",
        )


def _disk(host: str, facts: Facts, expect: Expectations) -> Iterable[Problem]:
    """Compare what is missing with what is free, per file system: paths may share one."""
    disks = {disk["path"]: disk for disk in facts.get("disks", ())}
    missing: dict[Any, dict[str, int]] = {}
    staged = dict(facts.get("staging_bytes", {}))
    for need in expect.disk:
        disk = disks.get(need.path)
        if disk is None:
            yield Problem(
                host,
                "disk",
                f"{human_bytes(need.bytes)} below {need.path}",
                "unknown",
                "check that the path can be read",
            )
            continue
        lacking = 0 if _published(need, facts) else need.bytes - staged.pop(need.kind, 0)
        if lacking > 0:
            missing.setdefault(disk["device"], {})[need.what] = lacking
    freed = _freed(facts, expect)
    for device, parts in missing.items():
        disk = next(each for each in disks.values() if each["device"] == device)
        going = sum(freed.get(path, 0) for path, each in disks.items() if each["device"] == device)
        if sum(parts.values()) > disk["free_bytes"] + going:
            listed = " + ".join(f"{what} {human_bytes(size)}" for what, size in parts.items())
            yield Problem(
                host,
                f"disk {disk['mount']}",
                f"{human_bytes(sum(parts.values()))} free for {listed}",
                f"{human_bytes(disk['free_bytes'])} free of {human_bytes(disk['total_bytes'])}"
                + (f", and {human_bytes(going)} of old artifacts that will go" if going else ""),
                "free space, mount a bigger disk there, or remove old artifacts",
            )


def _freed(facts: Facts, expect: Expectations) -> dict[str, int]:
    """Return {path: bytes} that the run retires before it brings anything."""
    freed: dict[str, int] = {}
    protected = facts.get("protected")
    if not expect.artifact_keep or protected is None:
        return freed
    for need in expect.disk:
        if not need.kind or need.built:
            continue
        here = {
            each["id"]: each for each in facts.get("artifacts", ()) if each["kind"] == need.kind
        }
        wanted = [
            name
            for name, each in here.items()
            if need.provenance and _is_subset(need.provenance, each.get("provenance"))
        ]
        going = retirable(
            {name: each.get("published_at", 0.0) for name, each in here.items()},
            keep=expect.artifact_keep,
            protected=protected,
            coming=wanted or ["what comes"],
        )
        size = sum(int(here[each]["bytes"]) for each in going)
        freed[need.path] = freed.get(need.path, 0) + size
    return freed


def _published(need: DiskNeed, facts: Facts) -> bool:
    return bool(need.provenance) and any(
        artifact["kind"] == need.kind
        and _is_subset(need.provenance, artifact.get("provenance"))
        and (not need.built or artifact["id"] in facts.get("environments", ()))
        for artifact in facts.get("artifacts", ())
    )


def _is_subset(wanted: Any, actual: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(actual, Mapping) and all(
            key in actual and _is_subset(value, actual[key]) for key, value in wanted.items()
        )
    return bool(wanted == actual)


def _port(host: str, facts: Facts, expect: Expectations) -> Iterable[Problem]:
    units = {expect.port: expect.unit}
    units.update({int(each["port"]): each["unit"] for each in expect.ports})
    for listener in facts.get("listeners", ()):
        port = listener["port"]
        if port in units and listener["unit"] != units[port]:
            owner = (
                f"{listener.get('name') or 'a process'} (pid {listener['pid']}, "
                f"user {listener['user']}, {listener['unit'] or 'no unit'})"
                if listener["pid"]
                else "a process that cannot be seen"
            )
            yield Problem(
                host,
                f"port {port}",
                f"free, or held by {units[port]}",
                f"held by {owner}",
                "stop it, or choose another port",
            )


def _user(host: str, facts: Facts, expect: Expectations) -> Iterable[Problem]:
    user = facts.get("users", {}).get(expect.user, {})
    if user.get("exists") and not user.get("system"):
        yield Problem(
            host,
            f"user {expect.user}",
            "a system user (uid below 1000), or none yet",
            f"uid {user.get('uid', 'unknown')}: a person's account",
            "choose another name for the service's user",
        )


def _left_over(host: str, facts: Facts, expect: Expectations) -> Iterable[Problem]:
    """Name engines and GPU memory that are not our running service's.

    A SIGKILL of the API server leaves engine and workers behind with the memory held while
    the port is free.
    """
    # A unit that is being stopped, by a run that was killed since, ends its processes by itself.
    alive = ("active", "activating", "deactivating", "reloading")
    serving = facts.get("unit", {}).get("active_state") in alive

    def ours(process: Mapping[str, Any]) -> bool:
        return serving and process.get("unit") == expect.unit

    strangers = [each for each in facts.get("vllm_processes", ()) if not ours(each)]
    if strangers:
        yield Problem(
            host,
            "vLLM processes",
            f"none outside the running {expect.unit}",
            "; ".join(
                f"pid {p['pid']} ({p['user']}): {p.get('command', '')[:80]}" for p in strangers[:4]
            ),
            "end them: they hold GPU memory that the service needs",
        )
    gpus = facts.get("gpu", {}).get("gpus", ())
    full = [gpu for gpu in gpus if (gpu["memory_used_mib"] or 0) > expect.gpu_memory_in_use_mib]
    # In a container the driver lists no processes: then a service that runs on every GPU
    # is taken as the owner of memory that is in use on every GPU.
    if serving and len(full) == len(gpus) and not any(gpu["processes"] for gpu in gpus):
        return
    for gpu in gpus:
        foreign = [process for process in gpu["processes"] if not ours(process)]
        if foreign or (gpu in full and not gpu["processes"]):
            holders = ", ".join(f"pid {p['pid']} {p['name']}" for p in foreign)
            yield Problem(
                host,
                "GPU memory in use",
                f"only by the running {expect.unit}",
                f"{gpu['memory_used_mib']} MiB on GPU {gpu['index']} "
                f"by {holders or 'no process that is listed'}",
                "end what uses it" if holders else "reset the GPU or reboot the node",
            )
