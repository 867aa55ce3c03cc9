# SPDX-License-Identifier: Apache-2.0
"""Clients and their keys as data, and the module that keeps them on a gateway."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.gateway.client_store import ClientStore
from glm_fleet.gateway.clients import (
    SHARED,
    Client,
    Clients,
    Key,
    add,
    converge,
    digest,
    keys_map,
    listed,
    newest,
    parse,
    refuse_weak,
    revoke,
    rotate,
    ways_map,
    without_secrets,
)
from glm_fleet.gateway.statistics import ClientUsage, parse_clients
from glm_fleet.health.gateway import judge_gateway
from glm_fleet.health.tables import render_health

NOW = "2026-11-27T12:00:00+00:00"
A, B, C = (digest(text) for text in "abc")


def some() -> Clients:
    """Client alice with key 1 (a)."""
    return add(Clients(), "alice", Key("1", A), {"priority": 5}, NOW)


def digests(known: Clients) -> dict[str, set[str]]:
    return {name: {key.sha256 for key in each.keys} for name, each in known.clients.items()}


def test_a_list_reads_back() -> None:
    known = revoke(add(some(), "bob", Key("1", B), {"paths": ["GET /v1/models"]}, NOW), "alice")
    assert parse(known.text()) == known
    assert known.serial == 3


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "clients": {"a": 1}}', "null"]
)
def test_a_damaged_list_is_refused(text: str) -> None:
    with pytest.raises(FleetError, match="damaged"):
        parse(text)


def test_keys_leave_the_controller_as_digests() -> None:
    made = without_secrets([{"name": "a", "keys": ["a"], "sha256": [B.upper()]}], "c")
    assert made == [
        {"name": "a", "sha256": [B, A], "weak": [A]},
        {"name": SHARED, "sha256": [C], "weak": [C]},
    ]
    assert without_secrets([]) == []
    with pytest.raises(FleetError, match="empty key"):
        without_secrets([{"name": "a", "keys": [""]}])


@pytest.mark.parametrize("key", ["hunter2", "a" * 64, "0101010101010101010101010101", "x" * 19])
def test_a_new_key_that_its_digest_gives_away_is_refused(key: str) -> None:
    for declared in (without_secrets([{"name": "batch", "keys": [key]}]), without_secrets([], key)):
        with pytest.raises(FleetError, match=r"is weak.*openssl rand -base64 32") as error:
            refuse_weak(some(), declared, shared_is_known=False)
        assert key not in str(error.value)
        # A fleet that has it goes on.
        refuse_weak(converge(Clients(), declared, NOW), declared, shared_is_known=False)
    shared = without_secrets([], key)
    refuse_weak(Clients(), shared, shared_is_known=True)


@pytest.mark.parametrize("made", [secrets.token_urlsafe(32), secrets.token_hex(16), str(uuid4())])
def test_what_programs_make_is_strong(made: str) -> None:
    declared = without_secrets([{"name": "a", "keys": [made]}], made)
    assert not any("weak" in each for each in declared)
    refuse_weak(Clients(), declared, shared_is_known=False)


def test_the_inventory_says_who_is_declared() -> None:
    declared = [{"name": "batch", "sha256": [B], "requests_a_minute": "60", "priority": -1}]
    known = converge(some(), declared, NOW)
    assert digests(known) == {"alice": {A}, "batch": {B}}
    assert known.clients["batch"].requests_a_minute == 60
    assert converge(known, declared, "later") == known
    # Another key in the inventory ends the one before; one from a playbook goes on.
    known = add(known, "batch", Key("2", A[::-1]), {}, NOW)
    known = converge(known, [{"name": "batch", "sha256": [C]}], NOW)
    assert digests(known)["batch"] == {C, A[::-1]}
    assert digests(converge(known, [], NOW)) == {"alice": {A}, "batch": {A[::-1]}}


def test_an_empty_variable_leaves_the_shared_key() -> None:
    known = converge(Clients(), without_secrets([], "a"), NOW)
    assert converge(known, without_secrets([], ""), NOW) == known
    assert digests(converge(known, without_secrets([], "b"), NOW)) == {SHARED: {B}}


def test_a_revoked_key_does_not_come_back() -> None:
    declared = [{"name": "batch", "sha256": [B]}]
    known = revoke(converge(Clients(), declared, NOW), "batch")
    assert digests(converge(known, declared, NOW)) == {"batch": set()}
    with pytest.raises(FleetError, match="revoked before"):
        add(known, "batch", Key("2", B), {}, NOW)
    # Not from a gateway that was away when it was revoked, either.
    assert digests(newest([known, converge(Clients(), declared, NOW)])) == {}
    away = add(add(add(Clients(), "batch", Key("1", B), {}, NOW), "x", Key("1", A), {}, NOW),
               "y", Key("1", C), {}, NOW)  # fmt: skip
    assert digests(newest([known, away])) == {"batch": set(), "x": {A}, "y": {C}}


def test_rotation_leaves_the_old_key_some_time() -> None:
    known = rotate(some(), "alice", Key("2", B), "2026-11-28T12:00:00+00:00", NOW)
    assert {key.id: key.expires for key in known.clients["alice"].keys} == {
        "1": "2026-11-28T12:00:00+00:00",
        "2": "",
    }
    assert known.clients["alice"].priority == 5
    at_once = rotate(known, "alice", Key("3", C), "", NOW)
    assert digests(at_once) == {"alice": {C}}
    assert at_once.revoked == {A, B}


def test_a_rotated_key_of_the_inventory_ends_all_the_same() -> None:
    declared = [{"name": "batch", "sha256": [B]}]
    until = "2026-11-28T12:00:00+00:00"
    known = rotate(converge(Clients(), declared, NOW), "batch", Key("2", C), until, NOW)
    known = converge(known, declared, NOW)
    assert {key.sha256: key.expires for key in known.clients["batch"].keys} == {B: until, C: ""}
    known = converge(known, [{"name": "batch", "sha256": [B, A]}], NOW)
    assert len({key.id for key in known.clients["batch"].keys}) == 3


def test_what_haproxy_reads() -> None:
    limits = {"requests_a_minute": 60, "requests_at_once": 4, "paths": ["GET /v1/models"]}
    known = add(some(), "bob", Key("k", B, expires="2026-11-27T12:00:10Z"), limits, NOW)
    ends = 1795780810
    assert keys_map(known, C) == {
        A.upper(): "alice:1:0:0:0:-5:*",
        B.upper(): f"bob:k:{ends}:60:4:0:some",
        C.upper(): "glm-fleet:own:0:0:0:-100:*",
    }
    assert ways_map(known) == {"bob:GET:/v1/models": "1"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Alice", {}),
        ("a:b", {}),
        ("", {}),
        ("glm-fleet", {}),
        ("a", {"priority": 101}),
        ("a", {"requests_a_minute": -1}),
        ("a", {"paths": ["/v1/models"]}),
        ("a", {"paths": ["GET /v1/%6dodels"]}),
    ],
)
def test_what_a_map_cannot_hold_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(FleetError, match="cannot be taken"):
        add(Clients(), name, Key("1", A), changes, NOW)


def test_keys_are_checked() -> None:
    with pytest.raises(FleetError, match="digest"):
        add(Clients(), "a", Key("1", "abc"), {}, NOW)
    with pytest.raises(FleetError, match="moment"):
        add(Clients(), "a", Key("1", A, expires="tomorrow"), {}, NOW)
    with pytest.raises(FleetError, match="a key of client alice"):
        add(some(), "bob", Key("1", A), {}, NOW)
    with pytest.raises(FleetError, match="has the key"):
        add(some(), "alice", Key("2", A), {}, NOW)
    with pytest.raises(FleetError, match="no client bob"):
        revoke(some(), "bob")
    with pytest.raises(FleetError, match="no key 9"):
        revoke(some(), "alice", "9")


def test_the_list_for_people_has_no_digest() -> None:
    known = add(some(), "bob", Key("1", B, expires="2026-01-01"), {}, NOW)
    known = known.with_client(Client("carol"))
    rows = listed(known, NOW)
    assert [(row["client"], row["state"]) for row in rows] == [
        ("alice", "valid"),
        ("bob", "expired"),
        ("carol", "no key"),
    ]
    assert not any(sha in str(rows) for sha in (A, B))


def test_what_clients_did_is_read_and_told() -> None:
    table = (
        "# table: glm_clients, type: string, size:102400, used:2\n"
        "0x55: key=zoe use=1 exp=2591999 gpc0=7 gpc0_rate(60000)=3 conn_cur=2 http_req_cnt=9 "
        "http_fail_cnt=1 bytes_in_cnt=100 bytes_out_cnt=5000 gpt0=40 gpt1=9\n"
        "0x56: key=amy use=0 exp=1 gpc0=0 gpc0_rate(60000)=0 conn_cur=0 http_req_cnt=0 "
        "http_fail_cnt=0 bytes_in_cnt=0 bytes_out_cnt=0\n\n"
    )
    amy, zoe = parse_clients(table)
    assert zoe == ClientUsage("zoe", 7, 2, 1, 2, 100, 5000, 40, 9)
    assert (amy.tokens_in, amy.tokens_out) == (0, 0), "a gateway from before it counted them"
    # A gateway without keys, and one from before it counted.
    assert parse_clients("No such table\n") == []
    assert parse_clients("0x1: key=x use=0 exp=1 gpc0_rate(60000)=0 conn_cur=0\n") == []
    with pytest.raises(FleetError, match="counters of each client"):
        parse_clients("0x1: key=x gpc0=many\n")
    judged = judge_gateway("gw01", gateway={"valid": True, "clients": [asdict(amy), asdict(zoe)]})
    text = "\n".join(line.text for line in render_health([], [judged], 120))
    assert (
        "clients since its last reload: amy 0, zoe 7 (2 refused, 1 failed, 9 tokens told)" in text
    )


# -- on a gateway ----------------------------------------------------------------------


def store(folder: Path) -> ClientStore:
    return ClientStore(folder / "clients.json", folder / "maps")


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    assert store(tmp_path).write(some(), "secret", check_mode=True)
    assert not (tmp_path / "maps").exists()
    assert store(tmp_path).write(some(), "secret")
    assert not store(tmp_path).write(some(), "secret")
    assert store(tmp_path).read() == some()
    assert (tmp_path / "maps").stat().st_mode & 0o777 == 0o700


def test_an_empty_credential_leaves_the_one_before(tmp_path: Path) -> None:
    mine = store(tmp_path)
    assert mine.next_credential("", allowed=False) == ""
    mine.write(some(), "one")
    assert mine.next_credential("", allowed=False) == "one"
    with pytest.raises(FleetError, match="gateway_credential_change") as error:
        mine.next_credential("two", allowed=False)
    assert "two" not in str(error.value)
    assert mine.next_credential("two", allowed=True) == "two"
    with pytest.raises(FleetError, match="cannot be sent"):
        mine.next_credential("a b", allowed=True)


def test_a_damaged_list_is_mended_from_another_or_refused(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.write(some(), "")
    (tmp_path / "clients.json").write_text("{")
    assert mine.copy() == ""
    with pytest.raises(FleetError, match="damaged"):
        mine.merged(["", "{"])
    assert mine.merged(["{", some().text()]) == some()
    assert mine.merged([], some().text()) == some()


def test_a_backup_counts_only_where_there_is_no_list(tmp_path: Path) -> None:
    mine = store(tmp_path)
    older = some()
    assert mine.merged([""], older.text()) == older
    mine.write(revoke(older, "alice"), "")
    assert mine.merged([], add(older, "bob", Key("1", B), {}, NOW).text()).clients == {}
