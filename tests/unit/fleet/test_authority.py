# SPDX-License-Identifier: Apache-2.0
"""The fleet's authority, and when a gateway gets a certificate of it."""

from __future__ import annotations

import ssl
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from glm_fleet.core.errors import FleetError
from glm_fleet.fleet import authority as ca
from glm_fleet.fleet.front_door import Decision, Wanted, decide
from glm_fleet.gateway.answer import FrontDoor
from glm_fleet.gateway.haproxy import serves
from glm_fleet.node.certificate import read_certificate

NOW = datetime(2026, 11, 27, tzinfo=timezone.utc)
DAY = timedelta(days=1)
NAMES = ["gw01", "192.0.2.11"]
OWN = "/etc/haproxy/glm-fleet/front.pem"


def wanted(tls: str = "auto", given: str = "", told: tuple[str, ...] = ()) -> Wanted:
    return Wanted(tls, given, OWN, NAMES, told)  # type: ignore[arg-type]


def door(chain: str = "", serves: str = "", path: str = OWN, error: str = "") -> FrontDoor:
    error = error or ("" if chain else "there is no such file")
    certificate = {"path": path, "error": error, "expires_s": 0.0, "chain": chain}
    return {"certificate": certificate, "serves": serves}  # type: ignore[typeddict-item]


def chain_of(pem: str) -> str:
    return pem[: pem.index("-----BEGIN PRIVATE KEY-----")]


@pytest.fixture
def authority(tmp_path: Path) -> ca.Authority:
    return ca.ensure(tmp_path / "authority", NOW)


def test_openssl_trusts_what_the_authority_issues(tmp_path: Path, authority: ca.Authority) -> None:
    now = datetime.now(timezone.utc)
    made = tmp_path / "front.pem"
    made.write_text(ca.issue(authority, [*NAMES, "api.example.com", "2001:db8::1"], now))
    trusted = ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "authority/ca.crt"]
    for name in (["-verify_hostname", "api.example.com"], ["-verify_ip", "2001:db8::1"],
                 ["-purpose", "sslserver"]):  # fmt: skip
        subprocess.run([*trusted, *name, made], check=True, capture_output=True)
    other = subprocess.run(
        [*trusted, "-verify_hostname", "gw02", made], capture_output=True, text=True, check=False
    )
    assert "hostname mismatch" in other.stderr
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(made)
    assert read_certificate(made)["error"] == ""
    assert "PRIVATE" not in read_certificate(made)["chain"]


def test_the_authority_is_made_once_and_its_key_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    first = ca.ensure(folder, NOW)
    assert ca.ensure(folder, NOW + 300 * DAY).certificate == first.certificate
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o077 == 0
    assert ca.ensure(tmp_path / "other", NOW).certificate.subject != first.certificate.subject


def test_a_renewed_authority_is_trusted_by_who_trusts_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    first = ca.ensure(folder, NOW)
    later = NOW + ca.AUTHORITY_VALID - ca.AUTHORITY_RENEW_BEFORE + DAY
    second = ca.ensure(folder, later)
    assert second.certificate.not_valid_after_utc > first.certificate.not_valid_after_utc
    assert ca.is_of(first, chain_of(ca.issue(second, NAMES, later)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "ca.key").chmod(0o644), "others may read"),
        (lambda folder: (folder / "ca.key").unlink(), "No such file"),
        (lambda folder: (folder / "ca.crt").write_text("nothing"), "no certificate"),
        (
            lambda folder: (folder / "ca.crt").write_bytes(
                (folder.parent / "other/ca.crt").read_bytes()
            ),
            "another certificate",
        ),
    ],
)
def test_a_damaged_authority_is_refused_and_never_replaced(
    tmp_path: Path, damage: object, words: str
) -> None:
    folder = tmp_path / "authority"
    ca.ensure(folder, NOW)
    ca.ensure(tmp_path / "other", NOW)
    damage(folder)  # type: ignore[operator]
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FleetError, match=words):
        ca.ensure(folder, NOW)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_what_clients_would_refuse_is_told(tmp_path: Path, authority: ca.Authority) -> None:
    chain = chain_of(ca.issue(authority, [*NAMES, "*.example.com"], NOW))
    assert ca.wrong_with(chain, [*NAMES, "api.example.com"], NOW) == ""
    assert "does not stand for a.b.example.com, gw02" in ca.wrong_with(
        chain, ["gw02", "a.b.example.com"], NOW
    )
    assert "certificate 1 expired on 2027-12-29" in ca.wrong_with(chain, (), NOW + 397 * DAY)
    assert "valid from" in ca.wrong_with(chain, (), NOW - DAY)
    stranger = ca.ensure(tmp_path / "other", NOW).certificate
    leaf, _ = x509.load_pem_x509_certificates(chain.encode())
    pem = ca.serialization.Encoding.PEM
    mixed = (leaf.public_bytes(pem) + stranger.public_bytes(pem)).decode()
    assert "was not signed by the one after it" in ca.wrong_with(mixed, (), NOW)
    swapped = (authority.certificate.public_bytes(pem) + leaf.public_bytes(pem)).decode()
    assert "was not signed by the one after it" in ca.wrong_with(swapped, (), NOW)


@pytest.mark.parametrize("name", ["http://gw01", "gw01:8080", "gw_01", "-a", "", "a" * 64, "ü"])
def test_what_no_certificate_can_stand_for_is_refused(authority: ca.Authority, name: str) -> None:
    assert not ca.is_name(name)
    with pytest.raises(FleetError, match="gateway_tls_names"):
        ca.issue(authority, [name], NOW)


def test_a_fresh_gateway_gets_a_certificate_and_keeps_it_until_it_is_due(
    authority: ca.Authority,
) -> None:
    doors = {"gw01": door()}
    assert decide(wanted(), "gw01", doors, None, NOW) == Decision(OWN, "there is no such file")
    doors = {"gw01": door(chain_of(ca.issue(authority, NAMES, NOW)), "tls")}
    assert decide(wanted(), "gw01", doors, authority, NOW) == Decision(OWN)
    # Another controller, which does not have the authority: nothing is due, nothing is needed.
    assert decide(wanted(), "gw01", doors, None, NOW + 270 * DAY) == Decision(OWN)
    due = decide(wanted(), "gw01", doors, authority, NOW + 278 * DAY)
    assert due.issue == "it expires in 119 days"
    more = decide(wanted(told=("api.example.com",)), "gw01", doors, authority, NOW)
    assert more.issue == "it does not stand for api.example.com"


def test_what_serves_in_clear_text_goes_on_until_somebody_says_otherwise() -> None:
    doors = {"gw01": door(serves="clear"), "gw02": door()}
    for gateway in doors:
        decision = decide(wanted(), gateway, doors, None, NOW)
        assert (decision.file, decision.issue) == ("", "")
        assert "gateway_tls to always" in decision.warning
    assert decide(wanted("always"), "gw01", doors, None, NOW).file == OWN
    assert decide(wanted("never"), "gw01", doors, None, NOW) == Decision("")
    assert decide(wanted("never"), "gw01", {"gw01": door(serves="tls")}, None, NOW).file == ""


def test_another_authority_than_the_one_that_clients_trust_signs_nothing_unasked(
    tmp_path: Path, authority: ca.Authority
) -> None:
    doors = {"gw01": door(chain_of(ca.issue(authority, NAMES, NOW)), "tls"), "gw02": door()}
    stranger = ca.ensure(tmp_path / "other", NOW)
    for known in (None, stranger):
        with pytest.raises(FleetError, match="gateway_authority_change"):
            decide(wanted(), "gw02", doors, known, NOW)
        assert decide(wanted(), "gw01", doors, known, NOW) == Decision(OWN)
        assert decide(wanted(), "gw01", doors, known, NOW, change=True).issue


def test_a_certificate_from_elsewhere_says_nothing_of_the_authority(
    tmp_path: Path, authority: ca.Authority
) -> None:
    crt = tmp_path / "elsewhere.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=gw01", "-keyout", tmp_path / "key", "-out", crt],
        check=True, capture_output=True,
    )  # fmt: skip
    doors = {"gw01": door(crt.read_text(), "tls", path="/etc/x.pem"), "gw02": door()}
    assert decide(wanted(), "gw02", doors, authority, NOW).issue


def test_a_given_certificate_is_checked_before_anything_changes(authority: ca.Authority) -> None:
    chain = chain_of(ca.issue(authority, ["api.example.com"], NOW))
    given = wanted(given="/etc/x.pem", told=("api.example.com",))
    fine = {"gw01": door(chain, "clear", "/etc/x.pem")}
    # The names of the inventory are not what clients call it.
    assert decide(given, "gw01", fine, None, NOW) == Decision("/etc/x.pem")
    for wrong, at in ((door(path="/etc/x.pem"), NOW), (fine["gw01"], NOW + 400 * DAY)):
        with pytest.raises(FleetError, match="nothing was changed"):
            decide(given, "gw01", {"gw01": wrong}, None, at)
    with pytest.raises(FleetError, match="stand for"):
        decide(wanted(given="/etc/x.pem", told=("other.example.com",)), "gw01", fine, None, NOW)


def test_how_a_configuration_serves() -> None:
    ours = "global\n    description glm-fleet 0123456789ab\nfrontend glm\n    bind *:8080{}\n\n"
    tail = "frontend metrics\n    bind 127.0.0.1:8405 ssl crt x\n"
    assert serves(ours.format("") + tail) == "clear"
    assert serves(ours.format(" ssl crt /etc/x.pem alpn h2") + tail) == "tls"
    assert serves("global\nfrontend glm\n    bind *:80\n") == ""
    assert serves("global\n    description glm-fleet 0123456789ab\n") == ""
