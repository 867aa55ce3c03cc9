# SPDX-License-Identifier: Apache-2.0
"""Filters of the playbooks: short names for what takes more than one look as an expression.

plugins/filter/fleet.py registers them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

# Ansible finds module_utils for modules only; plugins on the controller use the same code.
_LIBRARY = Path(__file__).resolve().parents[2] / "module_utils"
sys.path.insert(0, str(_LIBRARY))

from glm_fleet.artifact.manifest import parse_manifest
from glm_fleet.core import closure
from glm_fleet.core.errors import FleetError
from glm_fleet.core.table import render_table
from glm_fleet.fleet import rollout
from glm_fleet.fleet.endpoints import host_address as host_address
from glm_fleet.fleet.endpoints import node_endpoints as node_endpoints
from glm_fleet.fleet.endpoints import plan_endpoints as plan_endpoints
from glm_fleet.fleet.endpoints import reached_at as reached_at
from glm_fleet.gateway import clients
from glm_fleet.release.variant import choose_variant
from glm_fleet.serving import command, graphs, speculation
from glm_fleet.serving.rehearsal import is_small_file
from glm_fleet.transfer import torrent
from glm_terminal import plain, width

HostVars = Mapping[str, Mapping[str, Any]]


def doors_of(hostvars: HostVars, gateways: Sequence[str]) -> dict[str, Any]:
    """Give what certificate_file found at each gateway, for front_door."""
    return {name: hostvars[name]["__gateway_found"]["door"] for name in gateways}


def lacking(
    hostvars: HostVars, hosts: Sequence[str], offers: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Name the hosts where one of the artifacts just planned is not published."""
    wanted = {str(each["id"]) for each in offers}
    return [
        host
        for host in hosts
        if wanted - set(hostvars[host].get("artifact_plan", {}).get("published", []))
    ]


def taking_part(
    hostvars: HostVars, hosts: Sequence[str], nodes: Sequence[str], offer: Mapping[str, Any]
) -> list[str]:
    """Name the hosts that distribute an artifact: the nodes, and others that have or fetch it."""
    lack = lacking(hostvars, hosts, [offer])
    fetch = offer.get("fetchers", [])
    return [host for host in hosts if host in nodes or host in fetch or host not in lack]


def pushed_to(hostvars: HostVars, hosts: Sequence[str], offer: Mapping[str, Any]) -> str:
    """Name the host that gets the first copy from the controller; "" when a host has one."""
    lack = lacking(hostvars, hosts, [offer])
    return str(hosts[0]) if offer.get("push") and len(lack) == len(hosts) else ""


def hub_share(
    hostvars: HostVars,
    host: str,
    hosts: Sequence[str],
    offer: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Give the options by which a host fetches its share of an artifact from the hub.

    {} when there is nothing for it to fetch, and when a host has the whole artifact.
    """
    fetchers = list(offer.get("fetchers", []))
    if host not in fetchers or len(lacking(hostvars, hosts, [offer])) < len(hosts):
        return {}
    manifest = plain(offer["manifest"])
    files = torrent.shares(parse_manifest(manifest), fetchers, offer["missing"])[host]
    return {**options, "manifest": manifest, "files": files} if files else {}


def offers(hostvars: HostVars, sources: Mapping[str, str]) -> list[dict[str, Any]]:
    """Give the artifacts that hosts made or fetched in this run: {kind: host}."""
    found = []
    for kind, source in sources.items():
        artifact = artifact_of(hostvars, kind, source)
        if artifact:
            local = hostvars[source].get("ansible_connection") == "local"
            found.append({**artifact, "kind": kind, "push": local})
    return found


def addresses(hostvars: HostVars, hosts: Sequence[str]) -> list[str]:
    """Give the addresses under which hosts reach each other."""
    return [
        str(hostvars[host].get("artifact_address") or host_address(hostvars[host], host))
        for host in hosts
    ]


def artifact_of(hostvars: HostVars, kind: str, source: str) -> dict[str, Any]:
    """Give the artifact that a host made or fetched in this run; {} when there is none."""
    found = hostvars[source].get(f"{kind}_artifact") or {}
    return dict(found) if found.get("manifest") else {}


def artifacts_of_run(hostvars: HostVars, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Name the release and the model that this run made or fetched so far."""
    makers = {"release": groups.get("builders", []), "model": groups.get("fetchers", [])}
    found = [
        artifact_of(hostvars, kind, hosts[0]).get("id") for kind, hosts in makers.items() if hosts
    ]
    return [str(each) for each in found if each]


def protected_on(hostvars: HostVars, hosts: Sequence[str]) -> list[str]:
    """Name what is active on any of the hosts, or needed there for a roll-back."""
    return sorted(
        {
            str(each)
            for host in hosts
            for each in hostvars[host].get("artifact_retired", {}).get("protected", [])
        }
    )


def drivers(hostvars: HostVars, hosts: Sequence[str]) -> dict[str, str]:
    """Give the NVIDIA driver of every host that preflight looked at in this run."""
    found = {}
    for host in hosts:
        node = hostvars[host].get("preflight_read", {}).get("record", {}).get("node", {})
        driver = node.get("gpu", {}).get("driver_version")
        if driver:
            found[host] = str(driver)
    return found


def cuda_variant(
    variants: Sequence[Mapping[str, Any]], drivers: Mapping[str, str], stated: str
) -> dict[str, Any]:
    """Choose the CUDA build that every driver runs: {variant, reason, problem}."""
    try:
        return {**choose_variant(variants, drivers, stated), "problem": ""}
    except FleetError as error:
        # Not an error of the expression: the role says it in one place, in one sentence.
        return {"variant": {}, "reason": "", "problem": str(error)}


def correction_texts(patches: Sequence[Mapping[str, str]], folder: str) -> list[dict[str, str]]:
    """Read the files of release_patches on the controller; ``folder`` has the shipped ones."""
    try:
        return [
            {
                "name": Path(each["file"]).name,
                "sha256": each["sha256"],
                "text": Path(folder, each["file"]).expanduser().read_text(encoding="utf-8"),
            }
            for each in patches
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise AnsibleFilterError(f"A file of release_patches cannot be read: {error}") from error


def pinned_lock(locks: Sequence[Mapping[str, Any]], folder: str, inputs: Mapping[str, Any]) -> str:
    """Give the lock of release_pinned_locks that is for these inputs, '' if none is.

    ``folder`` has the shipped files. A file with another SHA-256 than its entry names is refused.
    """
    for each in locks:
        wanted = {name: value for name, value in each.items() if name not in ("file", "sha256")}
        if wanted != {name: inputs.get(name) for name in wanted}:
            continue
        try:
            text = Path(folder, each["file"]).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AnsibleFilterError(
                f"A file of release_pinned_locks cannot be read: {error}"
            ) from error
        found = hashlib.sha256(text.encode()).hexdigest()
        if found != each["sha256"]:
            raise AnsibleFilterError(
                f"The lock {each['file']} is another text than the one that was pinned. Expected: "
                f"SHA-256 {each['sha256']}. Found: SHA-256 {found}. What to do: review the file; "
                "to accept it, name its SHA-256 in release_pinned_locks."
            )
        return text
    return ""


def serve_command(settings: Mapping[str, Any]) -> str:
    """Give the arguments of vLLM, quoted for a systemd unit."""
    try:
        return command.unit_words(command.serve_command(settings))
    except FleetError as error:
        raise AnsibleFilterError(str(error)) from error


def environment_file(variables: Mapping[str, Any]) -> str:
    """Give the lines of a systemd environment file."""
    try:
        return command.environment_file(variables)
    except FleetError as error:
        raise AnsibleFilterError(str(error)) from error


def library_digest(entry_point: str) -> str:
    """Name the state of the logic that a unit on a node starts by name, in 12 hex digits."""
    return closure.digest([entry_point], _LIBRARY / "glm_fleet")


def graph_mode(wanted: str, release: Mapping[str, Any]) -> str:
    """Give the mode of CUDA graphs that ``serving_cuda_graphs`` stands for on a release."""
    try:
        return graphs.resolve(wanted, graphs.open_faults(release.get("manifest") or {}))
    except FleetError as error:
        raise AnsibleFilterError(str(error)) from error


def speculative_config(wanted: Mapping[str, Any], release: Mapping[str, Any]) -> str:
    """Give what ``serving_speculative`` is to vLLM; refused with a release that is wrong then."""
    try:
        return speculation.speculative_config(wanted, release.get("manifest") or {})
    except FleetError as error:
        raise AnsibleFilterError(str(error)) from error


def graph_rungs(mode: str, fallback: bool) -> list[str]:
    """Give the modes of CUDA graphs to stage: the one wanted, then what a node may step down to."""
    return graphs.rungs(mode, fallback=fallback)


def graph_remark(wanted: str, release: Mapping[str, Any]) -> str:
    """Say what a person should know of the mode that was chosen for a release."""
    faults = graphs.open_faults(release.get("manifest") or {})
    return graphs.remark(wanted, graph_mode(wanted, release), faults)


def failed_turns(hostvars: HostVars, batch: Sequence[str], alive: Sequence[str]) -> list[str]:
    """Name the nodes whose turn did not get through."""
    return [
        host
        for host in batch
        if host not in alive
        or not hostvars[host].get("__serving_turn", {}).get("outcome", {"good": True})["good"]
    ]


def rehearsing(
    hostvars: HostVars,
    nodes: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    canary: str,
    mode: str,
    check: bool,
) -> list[str]:
    """Name the node that rehearses outside a turn: [] or one name.

    ``mode`` is ``serve_rehearsal``, or ``asked`` where somebody asks for a rehearsal. Unasked it
    is for a fleet where no node ever served, whose weights are still to be fetched. ``check``
    says whether the run only tells what it would do, and made no release.
    """
    builder, fetcher = groups["builders"][0], groups["fetchers"][0]
    if not (check or artifact_of(hostvars, "release", builder)):
        return []
    served = any(
        (hostvars[name].get("__serving_served") or {}).get("stat", {}).get("exists")
        for name in nodes
    )
    missing = check or hostvars[fetcher].get("model_missing")
    if mode != "asked" and (mode == "never" or served or not missing):
        return []
    # A node that has the play for itself gets the release from the controller alone.
    pushed = hostvars[builder].get("ansible_connection") == "local"
    able = [name for name in nodes if pushed or name == builder]
    return ([name for name in able if name == canary] or able)[:1]


def small_files(manifest: Mapping[str, Any]) -> list[str]:
    """Name the files of a model that a server reads beside its weights."""
    files = parse_manifest(plain(manifest)).files
    return [each.path for each in files if is_small_file(each.path, each.size)]


def rollback_target(roll: Mapping[str, Any], node: str, wanted: str) -> str:
    """Give what a node goes back to: as asked, or as in the roll-back that did not end."""
    return rollout.rollback_target(roll, node, wanted)


def client_digests(declared: Sequence[Mapping[str, Any]], shared: str) -> list[dict[str, Any]]:
    """Give the inventory's clients with digests of their keys: no key leaves the controller."""
    try:
        return clients.without_secrets(plain(declared), str(shared))
    except FleetError as error:
        raise AnsibleFilterError(str(error)) from error


def clients_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Give the lines of the table of clients."""
    heading = ("client", "key", "state", "expires", "a minute", "at once", "priority", "paths")
    cells = [
        [
            str(row["client"]),
            str(row["key"] or "-"),
            str(row["state"]),
            str(row["expires"] or "never"),
            str(row["requests_a_minute"] or "any"),
            str(row["requests_at_once"] or "any"),
            str(row["priority"]),
            ", ".join(row["paths"]) or "all",
        ]
        for row in rows
    ]
    return [line.text for line in render_table(heading, cells, width())]
