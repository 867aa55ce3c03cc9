# SPDX-License-Identifier: Apache-2.0
"""The real ssh, a real SSH server, and a name server that answers with SSHFP records."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import paramiko
import pytest
from glm_fleet.core.runner import RunResult
from glm_fleet.fleet.fingerprints import in_dns
from glm_fleet.fleet.known_hosts import HostKey, SshTarget

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="a resolv.conf of its own needs root"
)
NAME = "gpu01.example"
NAME_SERVER = "127.0.0.153"
SSHFP = 44
_AUTHENTIC = 0x0020


class NameServer:
    """Answers A with 127.0.0.1 and SSHFP with one record, signed (as it says) or not."""

    def __init__(self, blob: bytes, *, signed: bool) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((NAME_SERVER, 53))
        self._digest = hashlib.sha256(blob).digest()
        self._flags = 0x8180 | (_AUTHENTIC if signed else 0)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            question, client = self._socket.recvfrom(4096)
            if not question:
                return
            end = question.index(b"\0", 12) + 5
            (kind,) = struct.unpack("!H", question[end - 4 : end - 2])
            data = {1: socket.inet_aton("127.0.0.1"), SSHFP: b"\x04\x02" + self._digest}.get(kind)
            head = question[:2] + struct.pack("!5H", self._flags, 1, 1 if data else 0, 0, 0)
            record = struct.pack("!HHHIH", 0xC00C, kind, 1, 60, len(data)) + data if data else b""
            self._socket.sendto(head + question[12:end] + record, client)

    def close(self) -> None:
        self._socket.sendto(b"", (NAME_SERVER, 53))
        self._thread.join()
        self._socket.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, HostKey]]:
    """Something that speaks SSH and lets nobody in."""
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    own = paramiko.Ed25519Key.from_private_key_file(str(path))
    listening = socket.create_server(("127.0.0.1", 0))
    transports = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(own)
            transport.start_server(event=threading.Event(), server=paramiko.ServerInterface())
            transports.append(transport)

    threading.Thread(target=serve, daemon=True).start()
    yield listening.getsockname()[1], HostKey(own.get_name(), own.get_base64())
    listening.close()
    for each in transports:
        each.close()


@pytest.mark.parametrize(
    ("signed", "same", "confirmed"),
    [(True, True, True), (False, True, False), (True, False, False)],
)
def test_a_signed_record_of_the_key_confirms_it(
    server: tuple[int, HostKey], tmp_path: Path, *, signed: bool, same: bool, confirmed: bool
) -> None:
    port, key = server
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {NAME_SERVER}\noptions edns0 trust-ad timeout:2\n")
    names = NameServer(base64.b64decode(key.blob) if same else b"another", signed=signed)
    said: list[str] = []

    def run(argv: Sequence[str], **_: Any) -> RunResult:
        script = f'mount --bind {resolv} /etc/resolv.conf && exec "$@"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *argv],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        said.append(done.stderr)
        return RunResult(done.returncode, done.stdout, done.stderr)

    try:
        target = SshTarget("gpu01", NAME, port, "ops", f"[{NAME}]:{port}", ())
        assert in_dns(target, key, run) == confirmed, said
    finally:
        names.close()
    assert f"Server host key: {key.kind} {key.fingerprint}" in said[0]
