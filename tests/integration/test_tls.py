# SPDX-License-Identifier: Apache-2.0
"""The front door with a certificate: HAProxy itself under the role's own configuration."""

from __future__ import annotations

import http.client
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway import BEARER, Gateway, Node, eventually


def certificate(path: Path, days: int) -> None:
    """Write a self-signed certificate and its key into one file."""
    key = path.with_suffix(".key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=gw01", "-days", str(days), "-keyout", key, "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + key.read_text())


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


@pytest.fixture
def gateway(tmp_path: Path, node: Node) -> Iterator[Gateway]:
    certificate(tmp_path / "gateway.pem", 5)
    made = Gateway(
        tmp_path,
        {"gpu01": node},
        gateway_tls_certificate=str(tmp_path / "gateway.pem"),
        __gateway_certificate={"stat": {"checksum": "1"}},
    )
    made.start()
    made.set("gpu01", "ready")
    yield made
    made.stop()


def connect(gateway: Gateway) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(gateway.folder / "gateway.pem"))
    context.check_hostname = False
    return http.client.HTTPSConnection("127.0.0.1", gateway.port, timeout=15, context=context)


def serial(gateway: Gateway) -> int:
    connection = connect(gateway)
    connection.connect()
    peer = connection.sock.getpeercert()
    connection.close()
    return int(str(peer["serialNumber"]), 16)


def test_a_renewed_certificate_cuts_no_stream(gateway: Gateway, node: Node) -> None:
    before = serial(gateway)
    connection = connect(gateway)
    connection.request("GET", "/stream", headers=BEARER)
    answer = connection.getresponse()
    assert answer.readline() == b"data: first\n"
    certificate(gateway.folder / "gateway.pem", 90)
    gateway.variables["__gateway_certificate"] = {"stat": {"checksum": "2"}}
    old = (gateway.folder / "haproxy.cfg").read_text()
    gateway.reload("second")
    assert (gateway.folder / "haproxy.cfg").read_text().replace("second", "first") != old
    eventually(lambda: serial(gateway) != before)
    threading.Timer(0.5, node.release.set).start()
    assert b"[DONE]" in answer.read()
