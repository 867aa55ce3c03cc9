# SPDX-License-Identifier: Apache-2.0
"""Keeps the clients on a gateway: the list, the maps on disk, and those of HAProxy that runs."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ..core.errors import FleetError
from ..core.files import exclusive, write_atomically
from .clients import Clients, digest, keys_map, map_text, newest, parse, ways_map
from .haproxy import GatewayUnreachableError, Transport
from .statistics import parse_old_workers

STORE = Path("/var/lib/glm-fleet/clients.json")
MAPS = Path("/etc/haproxy/glm-fleet")
# What nodes ask a gateway for stands in a map with this one key.
NODES = "nodes"
_KEYS, _WAYS, _CREDENTIAL, _OWN_KEY = "keys.map", "ways.map", "nodes.map", "own.key"
_PAYLOAD_LINES = 500


class ClientStore:
    """The files of one gateway, all of them root's alone."""

    def __init__(self, store: Path = STORE, maps: Path = MAPS) -> None:
        self._store = store
        self._maps = maps
        self.own_key = maps / _OWN_KEY

    def read(self) -> Clients | None:
        """Return the clients, None if there is no list; raises `FleetError` if it is damaged."""
        try:
            return parse(self._store.read_text())
        except FileNotFoundError:
            return None

    def copy(self) -> str:
        """Return the list for other gateways, '' if there is none or it is damaged."""
        try:
            own = self.read()
        except FleetError:
            return ""
        return own.text() if own else ""

    def merged(self, copies: Iterable[str], backup: str = "") -> Clients:
        """Return the newest of this gateway's list and the texts of others, '' for none.

        ``backup`` counts only where there is no list at all: a gateway that was set up anew.
        Raises `FleetError` if this gateway's list is damaged and there is no other.
        """
        damage: FleetError | None = None
        lists = []
        try:
            own = self.read()
            lists += [own] if own else []
        except FleetError as error:
            damage = error
        for text in copies:
            # A copy that is damaged elsewhere is mended there, not believed here.
            with suppress(FleetError):
                lists += [parse(text)] if text else []
        if not lists and backup:
            lists = [parse(backup)]
        if not lists and damage:
            raise damage
        return newest(lists)

    def credential(self) -> str:
        """Return what nodes ask the gateways for, '' for nothing."""
        with suppress(FileNotFoundError):
            for line in (self._maps / _CREDENTIAL).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == NODES:
                    return value
        return ""

    def next_credential(self, given: str, *, allowed: bool) -> str:
        """Return what gateways send to nodes from now on; '' for ``given`` leaves it as it is.

        Raises `FleetError` for another one than before unless that is ``allowed``: the nodes that
        run would refuse it.
        """
        known = self.credential()
        if any(char.isspace() or not char.isprintable() for char in given):
            raise FleetError(
                "serving_api_key cannot be sent to nodes",
                expected="printable characters without spaces",
                found="something else",
            )
        if not given or not known or given == known or allowed:
            return given or known
        raise FleetError(
            "serving_api_key is not the one that this fleet was set up with",
            expected="the key that nodes ask the gateways for: clients have keys of their own, so "
            "there is no need to change it",
            found="another one",
            remedy="give clients other keys with playbooks/clients.yml. To change the nodes' key "
            "all the same, which restarts every engine and fails requests meanwhile, run site.yml "
            "with -e gateway_credential_change=true",
        )

    def asks_nobody(self, ask: Transport) -> bool:
        """Tell whether a HAProxy of a version that had no clients runs here.

        It let everyone through to nodes, which asked for the shared key themselves or for none.
        """
        try:
            ours = "description: glm-fleet" in ask("show info")
            return ours and _unknown(ask(f"show map {self._maps / _KEYS}"))
        except GatewayUnreachableError:
            return False

    def refuse_lockout(self, wanted: Clients, ask: Transport) -> None:
        """Raise `FleetError` if a gateway that lets everyone in would let nobody in.

        ``ask`` reaches the HAProxy that runs, if any does.
        """
        if any(client.keys for client in wanted.clients.values()) or not self.asks_nobody(ask):
            return
        raise FleetError(
            "This gateway lets everyone in, and from now on would let nobody in",
            expected="a client with a key, or gateway_authentication: none in the inventory",
            found="no client, and serving_api_key (GLM_FLEET_API_KEY) is empty in this run",
            remedy="add clients with playbooks/clients.yml -e clients_action=add -e "
            "clients_name=NAME and give them their keys, or write gateway_authentication: none",
        )

    def wanted(self, clients: Clients, credential: str, own_key: str) -> dict[Path, str]:
        """Return the text of every file that follows."""
        keys = keys_map(clients, digest(own_key) if own_key else "")
        nodes = {NODES: credential} if credential else {}
        return {
            self._store: clients.text(),
            self._maps / _KEYS: map_text(keys),
            self._maps / _WAYS: map_text(ways_map(clients)),
            self._maps / _CREDENTIAL: map_text(nodes),
            self.own_key: own_key,
        }

    def write(self, clients: Clients, credential: str, *, check_mode: bool = False) -> bool:
        """Write what differs on disk; tell whether anything did."""
        own_key = _text(self.own_key) or secrets.token_urlsafe(32)
        differing = {
            path: text
            for path, text in self.wanted(clients, credential, own_key).items()
            if _text(path) != text
        }
        if differing and not check_mode:
            self._maps.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._maps.chmod(0o700)
            # A store that is there and maps that are not would be found by the next run.
            for path, text in differing.items():
                write_atomically(path, text, mode=0o600)
        return bool(differing)

    def apply(self, ask: Transport, ask_master: Transport | None = None) -> bool:
        """Bring the maps of HAProxy as it runs to what is on disk; tell whether that changed any.

        One that does not run, or that runs a configuration without these maps, reads the files
        when it starts or reloads.
        """
        changed = False
        for name in (_KEYS, _WAYS, _CREDENTIAL):
            path = self._maps / name
            wanted = dict(line.split(" ", 1) for line in path.read_text().splitlines())
            try:
                changed |= sync_map(ask, path, wanted)
            except GatewayUnreachableError:
                return changed
            if ask_master is not None:
                # Workers from before a reload still answer on connections that clients kept.
                for pid in parse_old_workers(ask_master("show proc")):
                    sync_map(_worker(ask_master, pid), path, wanted)
        return changed

    def turn(self) -> AbstractContextManager[None]:
        """Keep two writers apart, as a context."""
        return exclusive(self._store.with_name(".clients.lock"))


def sync_map(ask: Transport, path: Path, wanted: Mapping[str, str]) -> bool:
    """Make a map of HAProxy say what is wanted; tell whether it said something else.

    What goes comes last, so that nothing is refused in between. Raises `FleetError` with
    HAProxy's words on a refusal.
    """
    reply = ask(f"show map {path}").strip()
    if _unknown(reply):
        return False
    # Each line: an address in memory, the key, the value.
    rows = [line.split(" ", 2) for line in reply.splitlines()]
    has = {row[1]: row[2] for row in rows}
    new = [(key, value) for key, value in wanted.items() if key not in has]
    for begin in range(0, len(new), _PAYLOAD_LINES):
        lines = "".join(f"{key} {value}\n" for key, value in new[begin : begin + _PAYLOAD_LINES])
        _tell(ask, f"add map {path} <<\n{lines}", secret=True)
    other = {key: value for key, value in wanted.items() if has.get(key, value) != value}
    for key, value in other.items():
        _tell(ask, f"set map {path} {key} {_escaped(value)}", secret=True)
    gone = [key for key in has if key not in wanted]
    for key in gone:
        _tell(ask, f"del map {path} {key}")
    return bool(new or other or gone)


def _unknown(reply: str) -> bool:
    """Tell whether HAProxy has no such map; one that is empty is known."""
    return bool(reply.strip()) and not reply.strip().startswith("0x")


def _worker(ask_master: Transport, pid: int) -> Transport:
    return lambda command: ask_master(f"@!{pid} {command}")


def _tell(ask: Transport, command: str, *, secret: bool = False) -> None:
    reply = ask(command).strip()
    if reply:
        raise FleetError(
            "HAProxy did not take a change of its clients",
            expected="an empty reply",
            found=f"{reply} to '{command.split(' /')[0] if secret else command}'",
            remedy="run playbooks/gateway.yml, which loads the lists from disk",
        )


def _escaped(value: str) -> str:
    """Return a value as the runtime socket takes it in a command."""
    return "".join(f"\\{char}" if char in " ;\\" else char for char in value)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
