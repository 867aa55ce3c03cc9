# SPDX-License-Identifier: Apache-2.0
"""The fleet's own certificate authority, on the controller, and what can be told of certificates.

The authority is a folder with `ca.crt`, which clients trust, and `ca.key`, which never leaves the
controller. A certificate comes with a key of its own, which goes to its gateway alone and is not
kept. Times are aware datetimes; chains are PEM, the server's certificate first.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Union

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..core.errors import FleetError, from_os_error
from ..core.files import exclusive, write_atomically

_NAME = "glm-fleet authority "
CERTIFICATE, KEY = "ca.crt", "ca.key"
# A certificate is good for as long as the strictest clients take, and is renewed by whichever run
# comes in its last four months.
VALID = timedelta(days=397)
RENEW_BEFORE = timedelta(days=120)
# An authority is renewed with the same key: who trusts its earlier certificate goes on until that
# one ends.
AUTHORITY_VALID = timedelta(days=3650)
AUTHORITY_RENEW_BEFORE = timedelta(days=800)
# A host whose clock is behind takes a new certificate too.
_BACKDATED = timedelta(hours=1)
_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_HOST_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.IGNORECASE)

# What cryptography raises for a certificate that it cannot make sense of.
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

_Name = Union[x509.DNSName, x509.IPAddress]


@dataclass(frozen=True)
class Authority:
    """Who signs: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def load(folder: Path) -> Authority | None:
    """Return the authority of a folder, None where there is none. Raises `FleetError`."""
    certificate, key = folder / CERTIFICATE, folder / KEY
    if not key.exists() and not certificate.exists():
        return None
    try:
        if key.stat().st_mode & 0o077:
            raise _damaged(folder, f"others may read {key}", f"chmod 600 {key}")
        loaded = serialization.load_pem_private_key(key.read_bytes(), password=None)
        known = x509.load_pem_x509_certificate(certificate.read_bytes())
    except OSError as error:
        raise _damaged(folder, str(error)) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(folder, f"no certificate with its key: {error}") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise _damaged(folder, f"{key} is not an elliptic curve key")
    if loaded.public_key() != known.public_key():
        raise _damaged(folder, "the key belongs to another certificate")
    return Authority(known, loaded)


def _damaged(folder: Path, found: str, remedy: str = "") -> FleetError:
    return FleetError(
        f"The fleet's certificate authority in {folder} cannot be used",
        expected=f"{CERTIFICATE} and {KEY}, which belong together and which only you read",
        found=found,
        remedy=remedy or "put both back from a backup: clients trust this authority",
    )


def ensure(folder: Path, now: datetime) -> Authority:
    """Return the authority of a folder, made or renewed if need be. Raises `FleetError`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive(folder / ".lock"):
            known = load(folder)
            if known and known.certificate.not_valid_after_utc - now > AUTHORITY_RENEW_BEFORE:
                return known
            key = known.key if known else ec.generate_private_key(ec.SECP256R1())
            subject = known.certificate.subject if known else _new_name()
            made = Authority(_own_certificate(subject, key, now), key)
            if not known:
                write_atomically(folder / KEY, _key_pem(key), 0o600)
            write_atomically(folder / CERTIFICATE, _pem(made.certificate))
            return made
    except OSError as error:
        raise from_os_error(error) from error


def _new_name() -> x509.Name:
    # Two authorities must not have one name: a client that trusts both could not tell them apart.
    name = f"{_NAME}{secrets.token_hex(4)}"
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _own_certificate(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.Certificate:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + AUTHORITY_VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def issue(authority: Authority, names: Sequence[str], now: datetime) -> str:
    """Return a new certificate for these names, the authority's and the new key, in PEM.

    ``names`` are host names and addresses. Raises `FleetError` for what is neither.
    """
    if not names:
        raise _no_name("none")
    known = [_general_name(name) for name in names]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(min(now + VALID, authority.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(known), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return _pem(made) + _pem(authority.certificate) + _key_pem(key)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def is_name(name: str) -> bool:
    """Tell whether a certificate can stand for a name: a host name or an address."""
    try:
        # An address with a zone means something on one host only.
        return "%" not in str(ipaddress.ip_address(name))
    except ValueError:
        return len(name) <= 253 and _HOST_NAME.fullmatch(name) is not None


def _no_name(found: str) -> FleetError:
    return FleetError(
        "A gateway cannot have a certificate for this name",
        expected="host names and addresses, without scheme and port",
        found=found,
        remedy="correct gateway_tls_names, or the gateway's address in the inventory",
    )


def _general_name(name: str) -> _Name:
    if not is_name(name):
        raise _no_name(repr(name))
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name.lower())


def wrong_with(chain: str, names: Iterable[str], now: datetime) -> str:
    """Return why clients would refuse a chain under one of these names; '' if nothing is known.

    Whether they trust who signed its last certificate is theirs to know.
    """
    try:
        certificates = x509.load_pem_x509_certificates(chain.encode())
        for number, (lower, upper) in enumerate(zip(certificates, certificates[1:]), start=1):
            fault = _not_signed_by(lower, upper)
            if fault:
                return f"certificate {number} was not signed by the one after it ({fault})"
        for number, each in enumerate(certificates, start=1):
            if each.not_valid_before_utc > now:
                return f"certificate {number} is valid from {each.not_valid_before_utc:%F} on"
            if each.not_valid_after_utc <= now:
                return f"certificate {number} expired on {each.not_valid_after_utc:%F}"
        lacking = sorted(name for name in names if not _stands_for(certificates[0], name))
    except _UNREADABLE as error:
        return f"it cannot be read: {error}"
    return f"it does not stand for {', '.join(lacking)}" if lacking else ""


def _not_signed_by(lower: x509.Certificate, upper: x509.Certificate) -> str:
    try:
        lower.verify_directly_issued_by(upper)
    except (ValueError, TypeError) as error:
        return str(error) or "another issuer"
    except InvalidSignature:
        return "another key"
    return ""


def _stands_for(certificate: x509.Certificate, name: str) -> bool:
    try:
        known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    try:
        return ipaddress.ip_address(name) in known.get_values_for_type(x509.IPAddress)
    except ValueError:
        pass
    _, dot, parent = name.lower().partition(".")
    wanted = {name.lower(), f"*.{parent}"} if dot else {name.lower()}
    return bool(wanted & {each.lower() for each in known.get_values_for_type(x509.DNSName)})


def why_new(chain: str, names: Iterable[str], now: datetime) -> str:
    """Return why a certificate of the authority has to be issued anew; '' while it need not."""
    fault = wrong_with(chain, names, now)
    if fault:
        return fault
    left = x509.load_pem_x509_certificates(chain.encode())[0].not_valid_after_utc - now
    return f"it expires in {left.days} days" if left < RENEW_BEFORE else ""


def is_of_a_fleet(chain: str) -> bool:
    """Tell whether the authority of some fleet signed a chain's first certificate."""
    try:
        issuer = x509.load_pem_x509_certificates(chain.encode())[0].issuer
    except _UNREADABLE:
        return False
    return any(
        str(each.value).startswith(_NAME)
        for each in issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    )


def is_of(authority: Authority | None, chain: str) -> bool:
    """Tell whether the authority signed a chain's first certificate."""
    try:
        first = x509.load_pem_x509_certificates(chain.encode())[0]
        return authority is not None and not _not_signed_by(first, authority.certificate)
    except _UNREADABLE:
        return False
