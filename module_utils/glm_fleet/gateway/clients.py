# SPDX-License-Identifier: Apache-2.0
"""Who may use the fleet: clients, their keys as SHA-256, and what each may do.

`Clients` is what a gateway remembers, in one JSON file that outlives reloads and deployments. The
maps that HAProxy looks keys up in follow from it, on disk for its next start and over its runtime
socket for the one that runs. A key itself is never kept: it is digested where it was made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from itertools import count
from typing import Any, Literal, TypedDict

from ..core import decode
from ..core.errors import FleetError

SCHEMA = 1
# The gateway's own client: health and the benchmark ask as it, with a key that only root reads.
OWN = "glm-fleet"
# The client of serving_api_key, the one key that all clients of a fleet once shared.
SHARED = "shared"
LOWEST, HIGHEST = -100, 100
# A digest of a shorter key, or of one with less variety, is undone by trying.
LEAST_LENGTH, LEAST_VARIETY = 20, 8

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WAY = re.compile(r"[A-Z]+ /[^\s?#%]*")


@dataclass(frozen=True)
class Key:
    """A key: its digest, and when it ends (ISO 8601 with a zone; '' for never).

    ``declared`` keys stand in the inventory, the others were made by playbooks/clients.yml.
    """

    id: str
    sha256: str
    added: str = ""
    expires: str = ""
    declared: bool = False


@dataclass(frozen=True)
class Client:
    """A client; limits of 0 are none, and no paths are every path that the gateway lets in.

    ``priority`` runs from -100 to 100: of requests that wait, the highest goes first.
    """

    # The list of clients has it as the key.
    name: str = ""
    keys: tuple[Key, ...] = ()
    requests_a_minute: int = 0
    requests_at_once: int = 0
    priority: int = 0
    paths: tuple[str, ...] = ()
    declared: bool = False


@dataclass(frozen=True)
class Clients:
    """Every client, and the digests that were revoked and must never come back.

    ``serial`` counts changes: of two gateways' copies, the one with the higher number is newer.
    """

    clients: Mapping[str, Client] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()
    serial: int = 0

    def text(self) -> str:
        """Return the JSON that `parse` reads."""
        listed = {name: asdict(client) for name, client in sorted(self.clients.items())}
        for each in listed.values():
            del each["name"]
        whole = {
            "schema": SCHEMA,
            "serial": self.serial,
            "clients": listed,
            "revoked": sorted(self.revoked),
        }
        return json.dumps(whole, indent=1) + "\n"

    def with_client(self, client: Client) -> Clients:
        """Return these with a client added or replaced; raises `FleetError` if it is not right."""
        _check(client)
        owner = {
            key.sha256: other.name
            for other in self.clients.values()
            for key in other.keys
            if other.name != client.name
        }
        for key in client.keys:
            if key.sha256 in owner:
                raise FleetError(
                    f"Client {client.name} has a key of client {owner[key.sha256]}",
                    expected="a key to belong to one client",
                    found=f"the same key for {client.name} and {owner[key.sha256]}",
                    remedy="give each client a key of its own",
                )
        return replace(self, clients={**self.clients, client.name: client})


class _Written(TypedDict):
    schema: Literal[1]
    serial: decode.Count
    clients: Mapping[str, Client]
    revoked: Sequence[str]


def digest(key: str) -> str:
    """Return the SHA-256 of a key in hex; raises `FleetError` for an empty one."""
    if not key.strip():
        raise FleetError(
            "An empty key opens nothing",
            expected="a key",
            found="an empty text",
            remedy="look at the variable or vault that should hold it",
        )
    return hashlib.sha256(key.encode()).hexdigest()


def is_weak(key: str) -> bool:
    """Tell whether whoever reads the digest of a key could find the key by trying.

    It sees what is short or repeats itself. A long sentence that people say looks strong here.
    """
    return len(key) < LEAST_LENGTH or len(set(key)) < LEAST_VARIETY


def refuse_weak(
    known: Clients, declared: Iterable[Mapping[str, Any]], *, shared_is_known: bool
) -> None:
    """Raise `FleetError` for a weak key that is new; one that the fleet has goes on.

    ``declared`` is from `without_secrets`; ``shared_is_known`` says that nodes of this fleet ask
    for the shared key already.
    """
    there = {key.sha256 for client in known.clients.values() for key in client.keys}
    for each in declared:
        new = set(each.get("weak") or ()) - there
        if new and not (each["name"] == SHARED and shared_is_known):
            where = "serving_api_key" if each["name"] == SHARED else "gateway_clients"
            raise FleetError(
                f"The key of client {each['name']} is weak",
                expected=f"at least {LEAST_LENGTH} characters, {LEAST_VARIETY} of them different: "
                "fleets keep digests of keys, and a weak key can be found from its digest",
                found="fewer",
                remedy=f"make one by `openssl rand -base64 32` for {where}, or let "
                "playbooks/clients.yml make it",
            )


def without_secrets(
    declared: Iterable[Mapping[str, Any]], shared: str = ""
) -> list[dict[str, Any]]:
    """Return the inventory's clients with digests in place of keys, and `SHARED` for its key.

    ``declared`` is the variable gateway_clients. ``weak`` of a client names the digests of weak
    keys (`is_weak`). Raises `FleetError` for an empty key.
    """
    found = []
    for each in declared:
        client = {name: value for name, value in each.items() if name != "keys"}
        digests = [str(one).lower() for one in each.get("sha256") or ()]
        keys = [str(key) for key in each.get("keys") or ()]
        client["sha256"] = digests + [digest(key) for key in keys]
        found.append({**client, **_weak(keys)})
    if shared:
        found.append({"name": SHARED, "sha256": [digest(shared)], **_weak([shared])})
    return found


def _weak(keys: Sequence[str]) -> dict[str, list[str]]:
    weak = [digest(key) for key in keys if is_weak(key)]
    return {"weak": weak} if weak else {}


def parse(text: str) -> Clients:
    """Read what `Clients.text` wrote; raises `FleetError` for anything else."""
    try:
        whole = decode.parse(_Written, text, what="The list of clients", strict=True)
    except FleetError as error:
        raise FleetError(
            "The list of clients is damaged",
            expected=f"JSON with clients and revoked keys, schema {SCHEMA}: {error.expected}",
            found=error.found,
            remedy="run playbooks/gateway.yml, which takes it from another copy if there is one",
        ) from error
    known = Clients(revoked=frozenset(whole["revoked"]), serial=whole["serial"])
    for name, client in whole["clients"].items():
        known = known.with_client(replace(client, name=name))
    return known


def newest(copies: Iterable[Clients]) -> Clients:
    """Return the newest of several copies; what any of them revoked stays revoked."""
    copies = list(copies)
    if not copies:
        return Clients()
    best = max(copies, key=lambda each: each.serial)
    revoked = frozenset().union(*(each.revoked for each in copies))
    clients = {
        name: replace(client, keys=tuple(k for k in client.keys if k.sha256 not in revoked))
        for name, client in best.clients.items()
    }
    return replace(best, clients=clients, revoked=revoked)


def converge(known: Clients, declared: Iterable[Mapping[str, Any]], now: str) -> Clients:
    """Return the clients after a run of the inventory that declares these (see `without_secrets`).

    A declared client has the limits and keys that the inventory says, and the keys that a playbook
    gave it besides. One that is no longer declared keeps only those. A revoked key does not come
    back. Without a shared key the shared client stays as it is: a variable that is empty in one
    run must neither open the fleet nor lock everybody out.
    """
    wanted = {str(each.get("name")): each for each in declared}
    result = known
    for name, client in known.clients.items():
        if client.declared and name not in wanted and name != SHARED:
            kept = tuple(key for key in client.keys if not key.declared)
            others = {k: v for k, v in result.clients.items() if k != name}
            result = replace(result, clients=others)
            if kept:
                result = result.with_client(replace(client, keys=kept, declared=False))
    for name, each in wanted.items():
        before = known.clients.get(name, Client(name))
        result = result.with_client(_declared(before, each, known.revoked, now))
    return _next(known, result)


def _declared(before: Client, each: Mapping[str, Any], revoked: frozenset[str], now: str) -> Client:
    added = {key.sha256: key.added for key in before.keys}
    kept = [key for key in before.keys if not key.declared]
    taken, ids = {key.sha256 for key in kept}, {key.id for key in kept}
    free = (name for name in (f"inventory-{n}" for n in count(1)) if name not in ids)
    keys = [
        Key(next(free), sha256, added.get(sha256, now), str(each.get("expires") or ""), True)
        for sha256 in dict.fromkeys(each.get("sha256") or ())
        if sha256 not in revoked | taken
    ]
    return Client(
        name=before.name,
        keys=(*keys, *kept),
        requests_a_minute=int(each.get("requests_a_minute") or 0),
        requests_at_once=int(each.get("requests_at_once") or 0),
        priority=int(each.get("priority") or 0),
        paths=tuple(each.get("paths") or ()),
        declared=True,
    )


def add(known: Clients, name: str, key: Key, limits: Mapping[str, Any], now: str) -> Clients:
    """Return the clients with a new key for a client, who may be new.

    ``limits`` sets requests_a_minute, requests_at_once, priority and paths; what it leaves out
    stays as it is.
    """
    if key.sha256 in known.revoked:
        raise FleetError(
            f"The key for {name} was revoked before", remedy="make a new one; it never comes back"
        )
    client = known.clients.get(name, Client(name))
    if any(key.id == other.id or key.sha256 == other.sha256 for other in client.keys):
        raise FleetError(
            f"Client {name} has the key {key.id} already", remedy="name the new one else"
        )
    changes = {name: value for name, value in limits.items() if value is not None}
    if "paths" in changes:
        changes["paths"] = tuple(changes["paths"])
    keys = (*client.keys, replace(key, added=now))
    return _next(known, known.with_client(replace(client, keys=keys, **changes)))


def revoke(known: Clients, name: str, key_id: str = "") -> Clients:
    """Return the clients without a client, or without one of its keys."""
    client = _client(known, name)
    gone = [key for key in client.keys if key_id in ("", key.id)]
    if key_id and not gone:
        raise FleetError(
            f"Client {name} has no key {key_id}",
            expected=f"one of {', '.join(key.id for key in client.keys) or 'none'}",
            found=key_id,
        )
    left = tuple(key for key in client.keys if key not in gone)
    others = {k: v for k, v in known.clients.items() if k != name}
    result = replace(known, clients=others, revoked=known.revoked | {key.sha256 for key in gone})
    return _next(known, result.with_client(replace(client, keys=left)) if key_id else result)


def rotate(known: Clients, name: str, key: Key, until: str, now: str) -> Clients:
    """Return the clients with a new key, and an end at ``until`` for the client's other keys.

    With '' for ``until`` the other keys are revoked at once.
    """
    client = _client(known, name)
    result = known
    if until:
        # From here on a declared key is no longer as the inventory says.
        ends = tuple(
            replace(k, expires=until, declared=False)
            if not k.expires or _epoch(k.expires) > _epoch(until)
            else k
            for k in client.keys
        )
        result = known.with_client(replace(client, keys=ends))
    else:
        for each in client.keys:
            result = revoke(result, name, each.id)
    return replace(add(result, name, key, {}, now), serial=known.serial + 1)


def keys_map(known: Clients, own: str = "") -> dict[str, str]:
    """Return what HAProxy's map of keys must say: digest in capitals to client and limits.

    The fields are client:key id:expires (seconds since 1970):requests a minute:requests at
    once:class (lower goes first):ways in. ``own`` is the digest of the gateway's own key.
    """
    lines = {}
    for client in known.clients.values():
        limits = f"{client.requests_a_minute}:{client.requests_at_once}:{-client.priority}"
        for key in client.keys:
            ends = _epoch(key.expires) if key.expires else 0
            ways = "some" if client.paths else "*"
            lines[key.sha256.upper()] = f"{client.name}:{key.id}:{ends}:{limits}:{ways}"
    if own:
        lines[own.upper()] = f"{OWN}:own:0:0:0:{-HIGHEST}:*"
    return lines


def ways_map(known: Clients) -> dict[str, str]:
    """Return the ways in of the clients that may not use all: ``client:METHOD:/path`` to 1."""
    return {
        f"{client.name}:{way.replace(' ', ':')}": "1"
        for client in known.clients.values()
        for way in client.paths
    }


def map_text(lines: Mapping[str, str]) -> str:
    """Return a map as HAProxy reads it at its start."""
    return "".join(f"{key} {value}\n" for key, value in sorted(lines.items()))


def listed(known: Clients, now: str) -> list[dict[str, Any]]:
    """Return a row for each key, and for each client without one; no digests."""
    rows = []
    for _, client in sorted(known.clients.items()):
        limits = {
            "client": client.name,
            "declared": client.declared,
            "requests_a_minute": client.requests_a_minute,
            "requests_at_once": client.requests_at_once,
            "priority": client.priority,
            "paths": list(client.paths),
        }
        for key in client.keys or (Key("", ""),):
            over = bool(key.expires) and _epoch(key.expires) <= _epoch(now)
            state = "no key" if not key.id else "expired" if over else "valid"
            rows.append(
                {
                    **limits,
                    "key": key.id,
                    "added": key.added,
                    "expires": key.expires,
                    "state": state,
                }
            )
    return rows


def _client(known: Clients, name: str) -> Client:
    if name not in known.clients:
        raise FleetError(
            f"There is no client {name}",
            expected=f"one of {', '.join(sorted(known.clients)) or 'none'}",
            found=name,
            remedy="list them with playbooks/clients.yml",
        )
    return known.clients[name]


def _next(before: Clients, after: Clients) -> Clients:
    return after if after == before else replace(after, serial=before.serial + 1)


def _epoch(moment: str) -> int:
    """Return seconds since 1970; a text without a zone is UTC. Raises `FleetError`."""
    try:
        # Python 3.9 knows no Z.
        when = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    except ValueError as error:
        raise FleetError(
            "A moment cannot be read",
            expected="a date such as 2027-01-31 or 2027-01-31T12:00:00+00:00",
            found=moment,
        ) from error
    return int((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp())


def _check(client: Client) -> None:
    """Raise `FleetError` for what HAProxy's map would read in another way, or never match."""
    wrong = [
        problem
        for problem, bad in (
            (f"name {client.name!r}", not _NAME.fullmatch(client.name) or client.name == OWN),
            (f"priority {client.priority}", not LOWEST <= client.priority <= HIGHEST),
            ("a limit below 0", min(client.requests_a_minute, client.requests_at_once) < 0),
            *((f"path {way!r}", not _WAY.fullmatch(way)) for way in client.paths),
            *((f"key id {key.id!r}", not _KEY_ID.fullmatch(key.id)) for key in client.keys),
            *(("a digest", not _DIGEST.fullmatch(key.sha256)) for key in client.keys),
        )
        if bad
    ]
    if wrong:
        raise FleetError(
            f"Client {client.name} cannot be taken",
            expected=f"a name of a-z, 0-9, dot, hyphen and underscore other than {OWN}, a priority "
            f"from {LOWEST} to {HIGHEST}, limits from 0, paths such as 'POST /v1/completions' and "
            "SHA-256 digests of 64 hexadecimal digits",
            found=", ".join(wrong),
        )
    for key in client.keys:
        if key.expires:
            _epoch(key.expires)
