# SPDX-License-Identifier: Apache-2.0
"""Finds the mistakes of an inventory before any host is touched, all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ..core.errors import FleetError

NODES = "gpu_nodes"
GATEWAYS = "gateways"
BUILDERS = "builders"
FETCHERS = "fetchers"
CONTROLLER = "controller"
_PORTS = ("serving_port", "serving_sentry_port", "gateway_port", "artifact_port")
# What has a check of its own, which says more.
_JUDGED = (*_PORTS, "serving_tensor_parallel_size", "preflight_gpu_count")


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
        for check in (_groups, _addresses, _ports, _tensor_parallel, _names, _values)
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


def _addresses(inventory: Inventory) -> Iterator[str]:
    owners: dict[str, list[str]] = {}
    for host in _hosts(inventory):
        address = inventory.value(host, "ansible_host") or host
        port = inventory.value(host, "ansible_port") or 22
        owners.setdefault(f"{address} (SSH port {port})", []).append(host)
    for address, hosts in owners.items():
        if len(hosts) > 1:
            yield f"{' and '.join(hosts)} have the same address {address}"


def _ports(inventory: Inventory) -> Iterator[str]:
    wrong: dict[tuple[str, str], list[str]] = {}
    for host in _hosts(inventory):
        for name in _PORTS:
            port = inventory.setting(host, name)
            if port is not None and not 1 <= (_integer(port) or 0) <= 65535:
                wrong.setdefault((name, str(port)), []).append(host)
    for (name, port), hosts in wrong.items():
        yield f"{name} of {', '.join(hosts)} is '{port}': a port is a number from 1 to 65535"
    nodes = inventory.groups.get(NODES, ())
    for host in inventory.groups.get(GATEWAYS, ()):
        ports = [
            _integer(inventory.setting(host, name)) for name in ("serving_port", "gateway_port")
        ]
        if host in nodes and ports[0] == ports[1]:
            yield f"{host} is node and gateway, and both would listen on port {ports[0]}"


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
