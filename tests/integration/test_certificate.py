# SPDX-License-Identifier: Apache-2.0
"""A certificate that is missing, does not fit or ends is known before HAProxy is asked."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from glm_fleet.node.certificate import not_after, read_certificate


def make(folder: Path, name: str, days: int = 10) -> tuple[str, str]:
    """Return (certificate, key) as OpenSSL makes them."""
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(days), "-subj",
         "/CN=fleet.example.net", "-keyout", key, "-out", crt],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return crt.read_text(), key.read_text()


@pytest.mark.parametrize("days", [10, 40_000])
def test_the_end_of_a_certificate_is_read(tmp_path: Path, days: int) -> None:
    crt, key = make(tmp_path, "a", days)
    path = tmp_path / "front.pem"
    path.write_text(crt + key)
    found = read_certificate(path)
    assert found["error"] == ""
    assert abs(found["expires_s"] - time.time() - days * 86400) < 120


def test_what_haproxy_could_not_use_is_told(tmp_path: Path) -> None:
    (crt, _), (_, other) = make(tmp_path, "a"), make(tmp_path, "b")
    path = tmp_path / "front.pem"
    assert read_certificate(path)["error"] == "there is no such file"
    path.write_text(crt + other)
    assert read_certificate(path)["error"] == "certificate and key do not belong together"
    path.write_text("nothing of the kind")
    assert "no certificate with its key" in read_certificate(path)["error"]
    path.write_bytes(b"\xff\xfe")
    assert "cannot be read" in read_certificate(path)["error"]


@pytest.mark.parametrize("data", [b"", b"\x30", b"\x30\x82\xff\xff\x00", b"\x30\x03\x02\x01\x01"])
def test_what_is_no_certificate_is_an_error_and_no_crash(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        not_after(data)
