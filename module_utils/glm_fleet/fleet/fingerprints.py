# SPDX-License-Identifier: Apache-2.0
"""Which host keys somebody confirmed: in a file, or in a signed zone of the DNS."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import FleetError
from ..core.runner import Runner
from .known_hosts import HostKey, SshTarget

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_BLOB = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")
_DNS_TIMEOUT_S = 20.0


def read_fingerprints(path: Path) -> dict[str, frozenset[str]]:
    """Return the fingerprints of a file, {host: {SHA256:...}}; raises `FleetError`.

    A line is a host's name or address with a fingerprint behind it, as ``ssh-keygen -l`` shows
    it (``gpu01 256 SHA256:... root@gpu01 (ED25519)``), or with a key, as known_hosts has it
    (``gpu01,10.0.0.1 ssh-ed25519 AAAA...``).
    """
    found: dict[str, set[str]] = {}
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(
            "The file of fingerprints cannot be read",
            expected=f"lines such as `gpu01 SHA256:...` in {path}",
            found=f"{type(error).__name__}: {error}",
            remedy="correct enrolment_fingerprints",
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        fingerprint = _fingerprint_of(words[1:])
        if not fingerprint:
            # Half a line confirms nothing, and left out it would look like a host nobody named.
            raise FleetError(
                f"Line {number} of {path} confirms no host key",
                expected="a host, then SHA256:... or a key as in known_hosts",
                found=line[:80],
                remedy="correct that line",
            )
        for name in words[0].split(","):
            found.setdefault(name, set()).add(fingerprint)
    return {name: frozenset(each) for name, each in found.items()}


def _fingerprint_of(words: list[str]) -> str:
    for word in words[:2]:
        if _FINGERPRINT.fullmatch(word):
            return word
    if len(words) >= 2 and re.fullmatch(r"[a-z0-9@.-]+", words[0]) and _BLOB.fullmatch(words[1]):
        try:
            return HostKey(words[0], words[1]).fingerprint
        except ValueError:
            return ""
    return ""


def stated_for(target: SshTarget, listed: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Return the fingerprints that the inventory and a file state for a host."""
    names = (target.name, target.address, target.lookup)
    stated = frozenset(target.fingerprint.split())
    return stated.union(*(listed.get(name, frozenset()) for name in names))


def in_dns(target: SshTarget, key: HostKey, runner: Runner) -> bool:
    """Tell whether the DNS confirms this very key (SSHFP), and is signed for it (DNSSEC).

    ssh itself asks, on a connection of its own that ends before anybody logs in: it believes an
    answer only if its resolver says that it checked the signature.
    """
    try:
        ipaddress.ip_address(target.address)
    except ValueError:
        pass
    else:
        return False
    kinds = "rsa-sha2-512,rsa-sha2-256" if key.kind == "ssh-rsa" else key.kind
    options = {
        "BatchMode": "yes",
        "VerifyHostKeyDNS": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": "/dev/null",
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlgorithms": kinds,
        "PreferredAuthentications": "none",
        "ConnectTimeout": "10",
    }
    if target.proxy:
        options["ProxyCommand"] = target.proxy.replace("%", "%%")
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    where = ["-p", str(target.port), "-l", target.user, "--", target.address, "true"]
    try:
        answer = runner(
            ["ssh", "-v", "-F", "none", *words, *where], check=False, timeout=_DNS_TIMEOUT_S
        )
    except FleetError:
        return False
    said = answer.stderr
    return (
        f"Server host key: {key.kind} {key.fingerprint}" in said
        and re.search(r"found \d+ secure fingerprints in DNS", said) is not None
        and re.search(r"(?<!mis)matching host key fingerprint found in DNS", said) is not None
    )
