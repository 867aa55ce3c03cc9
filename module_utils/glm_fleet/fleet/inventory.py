# SPDX-License-Identifier: Apache-2.0
"""Finds the mistakes of an inventory before any host is touched, all of them at once."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from .endpoints import ADDRESS_VARIABLES, PORT_VARIABLES, SSH_PORT, host_address, host_port
from .rollout import batch_size

NODES = "gpu_nodes"
GATEWAYS = "gateways"
BUILDERS = "builders"
FETCHERS = "fetchers"
CONTROLLER = "controller"
_PORTS = ("serving_port", "serving_sentry_port", "gateway_port", "artifact_port")
# Besides those by which Ansible reaches a host.
_ADDRESSES = (
    "gateway_node_address",
    "artifact_address",
    "serving_bind_address",
    "gateway_bind_address",
)
# {variable: (least, most, what it is)}, for numbers of which the type alone says too little.
_RANGES: Mapping[str, tuple[float, float, str]] = {
    "serving_gpu_memory_utilization": (0.05, 1.0, "a share of the GPU's memory, up to 1"),
    "serving_max_model_len": (1, 10**8, "a context has at least 1 token"),
    "serving_max_num_seqs": (1, 10**6, "a batch has at least 1 request"),
    "serve_drain_timeout": (0, 10**7, "seconds, 0 or more"),
    "serve_stall_timeout": (1, 10**7, "seconds, 1 or more"),
    "serve_join_timeout": (1, 10**7, "seconds, 1 or more"),
    "artifact_keep": (1, 10**4, "at least 1 of each kind has to stay"),
    "health_stall_timeout": (1, 10**7, "seconds, 1 or more"),
}
# What has a check of its own, which says more.
_JUDGED = (*_PORTS, "serving_tensor_parallel_size", "preflight_gpu_count", "serve_batch")


@dataclass(frozen=True)
class Inventory:
    """What is checked.

    ``groups`` maps group names to hosts; ``names`` maps each host to the names of its
    variables; ``value(host, name)`` gives a variable's value or None; ``known`` holds
    every variable of the roles with its default, None where it has none. ``literals`` are the
    variables of a host whose values need no template, and ``complaint(name, value)`` says what
    the roles' argument specifications have against one, '' if nothing.
    """

    groups: Mapping[str, Sequence[str]]
    names: Mapping[str, Iterable[str]]
    value: Callable[[str, str], Any]
    known: Mapping[str, Any]
    literals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    complaint: Callable[[str, Any], str] = lambda _name, _value: ""

    def setting(self, host: str, name: str) -> Any:
        """Return what the role will see: the host's value, or else the role's default."""
        own = self.value(host, name)
        return self.known.get(name) if own is None else own


def check_inventory(inventory: Inventory) -> None:
    """Raise one `FleetError` that names every mistake; ``details`` lists them."""
    problems = [
        problem
        for check in (
            _groups,
            _addresses,
            _ports,
            _ranges,
            _rolling,
            _quality,
            _tensor_parallel,
            _names,
            _values,
        )
        for problem in check(inventory)
    ]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise FleetError(
            f"The inventory has {len(problems)} mistake{'s' if len(problems) > 1 else ''}; "
            f"no host was touched:{listed}\n",
            remedy="compare with inventory/example",
            details={"problems": problems},
        )


def _hosts(inventory: Inventory) -> list[str]:
    groups = inventory.groups
    return list(dict.fromkeys([*groups.get(NODES, ()), *groups.get(GATEWAYS, ())]))


def _groups(inventory: Inventory) -> Iterator[str]:
    nodes, gateways = (inventory.groups.get(name, ()) for name in (NODES, GATEWAYS))
    if not nodes:
        end = f", and {', '.join(gateways)} would be a gateway without nodes" if gateways else ""
        yield f"group {NODES} has no hosts: name the GPU nodes in it{end}"
    builders = inventory.groups.get(BUILDERS, ())
    if builders:
        yield (
            f"group {BUILDERS} names {', '.join(builders)}: releases are built on the controller "
            "only for now; leave the group out"
        )
    if not gateways:
        yield f"group {GATEWAYS} has no hosts: nothing would send requests to the nodes"


def _variables(inventory: Inventory, host: str) -> dict[str, Any]:
    """Return what decides where a host is reached."""
    return {name: inventory.value(host, name) for name in (*ADDRESS_VARIABLES, *PORT_VARIABLES)}


def _addresses(inventory: Inventory) -> Iterator[str]:
    owners: dict[str, list[str]] = {}
    for host in _hosts(inventory):
        variables = _variables(inventory, host)
        port = host_port(variables) or SSH_PORT
        owners.setdefault(f"{host_address(variables, host)} (SSH port {port})", []).append(host)
    for address, hosts in owners.items():
        if len(hosts) > 1:
            yield f"{' and '.join(hosts)} have the same address {address}"
    wrong: dict[str, list[str]] = {}
    for host in _hosts(inventory):
        for name in (*ADDRESS_VARIABLES, *_ADDRESSES):
            value = inventory.value(host, name)
            complaint = "" if value in (None, "", "*") else _address_complaint(str(value))
            if complaint:
                wrong.setdefault(f"{name} is '{value}', {complaint}", []).append(host)
    for text, hosts in wrong.items():
        yield f"{text} (set for {_where(inventory, hosts)})"


def _address_complaint(text: str) -> str:
    """Say what is wrong with what should be an address or a host's name; '' if nothing."""
    if "://" in text or "/" in text:
        return "a URL or a path: give the address or name alone"
    if "@" in text:
        return "a login: give the address alone, and the user as ansible_user"
    if re.fullmatch(r"[\d.]+", text):
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            zeros = re.search(r"(?:^|\.)0\d", text)
            hint = (
                "programs read numbers with leading zeros differently" if zeros else "not in range"
            )
            return f"no IPv4 address: it needs four numbers from 0 to 255 ({hint})"
        return ""
    bare = text.strip("[]")
    if ":" in bare:
        try:
            ipaddress.IPv6Address(bare.partition("%")[0])
        except ValueError:
            return "no IPv6 address; a port belongs into a variable of its own"
        return ""
    labels = bare.split(".")
    if len(bare) > 253 or not all(re.fullmatch(r"[\w-]{1,63}", each) for each in labels):
        return "no address and no host's name"
    return ""


def _ports(inventory: Inventory) -> Iterator[str]:
    wrong: dict[tuple[str, str], list[str]] = {}
    for host in _hosts(inventory):
        for name in _PORTS:
            port = inventory.setting(host, name)
            if port is not None and not 1 <= (_integer(port) or 0) <= 65535:
                wrong.setdefault((name, str(port)), []).append(host)
    for (name, port), hosts in wrong.items():
        yield f"{name} of {', '.join(hosts)} is '{port}': a port is a number from 1 to 65535"
    clashes: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for host in _hosts(inventory):
        for port_number, found in _listeners(inventory, host).items():
            if len(found) > 1:
                clashes.setdefault((port_number, tuple(found)), []).append(host)
    for (port_number, names), hosts in clashes.items():
        if names == ("serving_port", "gateway_port"):
            text = f"{hosts[0]} is node and gateway, and both would listen on port {port_number}"
            yield text if len(hosts) == 1 else text.replace(hosts[0], f"each of {', '.join(hosts)}")
            continue
        yield (
            f"{' and '.join(names)} of {', '.join(hosts)} are both {port_number}: each needs a "
            "port of its own"
        )


def _listeners(inventory: Inventory, host: str) -> dict[int, list[str]]:
    """Return {port: variables that would have something listen there} of a host."""
    groups = inventory.groups
    found: dict[int, list[str]] = {}

    def add(name: str, value: Any) -> None:
        number = _integer(value)
        if number:
            found.setdefault(number, []).append(name)

    if host in groups.get(NODES, ()):
        for name in ("serving_port", "serving_sentry_port", "artifact_port"):
            add(name, inventory.setting(host, name))
    if host in groups.get(GATEWAYS, ()):
        add("gateway_port", inventory.setting(host, "gateway_port"))
        bind = str(inventory.setting(host, "gateway_metrics_bind") or "")
        add("gateway_metrics_bind", bind.rpartition(":")[2])
    # A jump host's port may be another one there: only what sshd listens on by default counts.
    add("the SSH port", host_port(_variables(inventory, host)) or SSH_PORT)
    return found


def _number(value: Any) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def _ranges(inventory: Inventory) -> Iterator[str]:
    """Values of the right type that nothing could run with."""
    wrong: dict[str, list[str]] = {}
    for host in inventory.groups.get(NODES, ()):
        for name, (least, most, words) in _RANGES.items():
            value = inventory.setting(host, name)
            number = _number(value)
            # Words are judged by the role's specification, templates by nobody before they run.
            if value in (None, "") or number is None:
                continue
            if not least <= number <= most:
                wrong.setdefault(f"{name} is {value}: {words}", []).append(host)
    for text, hosts in wrong.items():
        yield f"{text} (set for {_where(inventory, hosts)})"


def _rolling(inventory: Inventory) -> Iterator[str]:
    """What a roll would refuse after everything was built and moved."""
    nodes = list(inventory.groups.get(NODES, ()))
    if not nodes:
        return
    said: set[str] = set()
    for host in nodes:
        # What is a template is judged when it is used.
        given = inventory.literals.get(host, {})
        for name in ("serve_canary", "repair"):
            node = str(given.get(name) or "")
            if node and node not in nodes:
                said.add(f"{name} is {node}, which is no host of {NODES}")
        try:
            batch_size(given.get("serve_batch", 1), len(nodes))
        except FleetError as error:
            said.add(f"{error.message}: {error.expected}, not {error.found}")
        least = _integer(given.get("serve_min_ready"))
        if least is not None and (least < 0 or least >= len(nodes)):
            said.add(
                f"serve_min_ready is {least} with {len(nodes)} nodes: no node could ever be taken "
                f"out; give a number from 0 to {len(nodes) - 1}"
            )
    yield from sorted(said)


def _quality(inventory: Inventory) -> Iterator[str]:
    """See that there are questions for the first node of a roll where they shall be asked."""
    for node in inventory.groups.get(NODES, ()):
        asked = str(inventory.setting(node, "serve_quality_gate")).lower()
        path = str(inventory.setting(node, "benchmark_quality_set") or "")
        if asked in ("true", "yes", "on", "1") and not Path(path).is_file():
            yield (
                f"{node}: serve_quality_gate asks the questions of benchmark_quality_set, which "
                f"is {repr(path) + ': no such file here' if path else 'empty'}"
            )
            return


def _tensor_parallel(inventory: Inventory) -> Iterator[str]:
    wrong: dict[tuple[str, str], list[str]] = {}
    for host in inventory.groups.get(NODES, ()):
        size = inventory.setting(host, "serving_tensor_parallel_size")
        gpus = inventory.setting(host, "preflight_gpu_count")
        size_number, gpu_number = _integer(size) or 0, _integer(gpus) or 0
        if size_number < 1 or gpu_number < 1 or gpu_number % size_number:
            wrong.setdefault((str(size), str(gpus)), []).append(host)
    for (size, gpus), hosts in wrong.items():
        yield (
            f"serving_tensor_parallel_size of {', '.join(hosts)} is {size}, which does not divide "
            f"the {gpus} GPUs of preflight_gpu_count"
        )


def _names(inventory: Inventory) -> Iterator[str]:
    """A name that starts like one of a role's, but is none, is a typing mistake."""
    prefixes = {name.split("_", 1)[0] for name in inventory.known}
    users: dict[str, list[str]] = {}
    for host, names in inventory.names.items():
        for name in names:
            if name not in inventory.known:
                users.setdefault(name, []).append(host)
    for name in sorted(users):
        closest = _closest(name, prefixes, inventory.known)
        if name.split("_", 1)[0] not in prefixes and not closest:
            continue
        hint = f"; did you mean {closest}?" if closest else ""
        yield f"no role knows the variable {name} (set for {_where(inventory, users[name])}){hint}"


def _values(inventory: Inventory) -> Iterator[str]:
    """A value of a wrong type or choice would fail its role, maybe half an hour into a run."""
    wrong: dict[str, list[str]] = {}
    # Most hosts have the value of their group: each is judged once.
    judged: dict[tuple[str, str], str] = {}
    for host, values in inventory.literals.items():
        for name, value in values.items():
            if name not in inventory.known or name in _JUDGED:
                continue
            key = (name, repr(value))
            if key not in judged:
                judged[key] = inventory.complaint(name, value)
            if judged[key]:
                wrong.setdefault(judged[key], []).append(host)
    for complaint, hosts in wrong.items():
        yield f"{complaint} (set for {_where(inventory, hosts)})"


def _where(inventory: Inventory, hosts: Sequence[str]) -> str:
    return "all hosts" if len(hosts) == len(inventory.names) > 1 else ", ".join(hosts)


def left_out(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return {group: host} for the groups that an inventory need not name.

    The controller builds releases, and the first node fetches the weights.
    """
    hosts = {BUILDERS: CONTROLLER, FETCHERS: next(iter(groups.get(NODES, ())), "")}
    return {group: host for group, host in hosts.items() if host and not groups.get(group)}


def _closest(name: str, prefixes: Iterable[str], known: Iterable[str]) -> str:
    """Return the variable that was probably meant, or an empty string.

    Under a prefix of ours a rough likeness is enough. Under a foreign one, such as
    ``servings_``, the prefix must resemble ours and the rest be very close to a name.
    """
    prefix, _, rest = name.partition("_")
    if prefix in prefixes:
        return "".join(get_close_matches(name, known, n=1, cutoff=0.7))
    ours = get_close_matches(prefix, prefixes, n=1, cutoff=0.7)
    if not ours or not rest:
        return ""
    return "".join(get_close_matches(f"{ours[0]}_{rest}", known, n=1, cutoff=0.9))


def _integer(value: Any) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None
