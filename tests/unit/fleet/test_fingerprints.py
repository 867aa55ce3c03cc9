# SPDX-License-Identifier: Apache-2.0
"""Which host keys somebody confirmed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.fleet.fingerprints import in_dns, read_fingerprints
from glm_fleet.fleet.known_hosts import HostKey, SshTarget


@pytest.fixture
def key(tmp_path: Path) -> HostKey:
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return HostKey(*path.with_suffix(".pub").read_text().split()[:2])


def test_a_file_says_it_as_ssh_keygen_and_known_hosts_do(key: HostKey, tmp_path: Path) -> None:
    path = tmp_path / "fingerprints"
    shown = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "key.pub"], capture_output=True, text=True, check=True
    ).stdout
    other = "SHA256:" + "a" * 43
    path.write_text(
        f"# from the consoles\n\ngpu01 {other}\ngpu01 {shown}\n"
        f"gpu02,10.0.0.2 {key.kind} {key.blob} root@gpu02\n"
    )
    assert read_fingerprints(path) == {
        "gpu01": {other, key.fingerprint},
        "gpu02": {key.fingerprint},
        "10.0.0.2": {key.fingerprint},
    }


@pytest.mark.parametrize(
    "line",
    ["gpu01", "gpu01 SHA256:short", "gpu01 MD5:aa:bb", "SHA256:" + "a" * 43, "gpu01 ssh-ed25519 x"],
)
def test_a_line_that_confirms_nothing_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "fingerprints"
    path.write_text(f"gpu02 SHA256:{'a' * 43}\n{line}\n")
    with pytest.raises(FleetError, match=r"Line 2 of .* confirms no host key"):
        read_fingerprints(path)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"cannot be read.*correct enrolment_fingerprints"):
        read_fingerprints(tmp_path / "none")


def said_by_ssh(key: HostKey, how: str = "secure", found: str = "matching") -> str:
    return (
        f"debug1: Server host key: {key.kind} {key.fingerprint}\r\n"
        f"debug1: found 2 {how} fingerprints in DNS\r\n"
        f"debug1: {found} host key fingerprint found in DNS\r\n"
    )


def test_the_dns_counts_when_it_is_signed_and_speaks_of_this_key(key: HostKey) -> None:
    target = SshTarget("gpu01", "gpu01.example", 2222, "ops", "gpu01.example", (), proxy="nc a 1%")
    other = HostKey(key.kind, key.blob[:-4] + "AAAA")
    asked: list[list[str]] = []

    def ssh(said: str) -> Any:
        def run(argv: Sequence[str], **_: Any) -> RunResult:
            asked.append(list(argv))
            return RunResult(255, "", said)

        return run

    assert in_dns(target, key, ssh(said_by_ssh(key)))
    for said in (
        said_by_ssh(key, how="insecure"),
        said_by_ssh(key, found="mismatching"),
        # Somebody else may have answered the question to ssh.
        said_by_ssh(other),
        "",
    ):
        assert not in_dns(target, key, ssh(said))
    words = asked[0]
    assert words[-5:] == ["-l", "ops", "--", "gpu01.example", "true"]
    for option in ("StrictHostKeyChecking=yes", "VerifyHostKeyDNS=yes", "ProxyCommand=nc a 1%%"):
        assert option in words


def test_an_address_has_no_name_to_ask_for(key: HostKey) -> None:
    def never(*_: Any, **__: Any) -> RunResult:
        raise AssertionError

    assert not in_dns(SshTarget("a", "2001:db8::1", 22, "ops", "a", ()), key, never)
