# SPDX-License-Identifier: Apache-2.0
"""The front door with a certificate of the fleet's authority, under HAProxy itself."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.fleet import authority as ca
from glm_fleet.node.gateway import ask_as_client

from tests.gateway import BEARER, KEY, Gateway, Node, eventually

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["gw01", "127.0.0.1"]


def now() -> datetime:
    return datetime.now(timezone.utc)


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


@pytest.fixture
def gateway(tmp_path: Path, node: Node) -> Iterator[Gateway]:
    pem = tmp_path / "front.pem"
    # Issued by the same authority a year ago, so that it has its last weeks before it.
    signer = ca.ensure(tmp_path / "authority", now() - timedelta(days=380))
    pem.write_text(ca.issue(signer, NAMES, now() - timedelta(days=380)))
    made = Gateway(
        tmp_path,
        {"gpu01": node},
        __gateway_front_door={"file": str(pem)},
        __gateway_certificate={"stat": {"checksum": "1"}},
    )
    made.start()
    made.set("gpu01", "ready")
    yield made
    made.stop()


def connect(gateway: Gateway, folder: str = "authority") -> http.client.HTTPSConnection:
    """Connect as a client that trusts an authority, and nobody else."""
    context = ssl.create_default_context(cafile=str(gateway.folder / folder / "ca.crt"))
    return http.client.HTTPSConnection("127.0.0.1", gateway.port, timeout=15, context=context)


def serial(gateway: Gateway) -> int:
    connection = connect(gateway)
    connection.connect()
    peer = connection.sock.getpeercert()
    connection.close()
    return int(str(peer["serialNumber"]), 16)


def test_a_renewed_certificate_cuts_no_stream(gateway: Gateway, node: Node) -> None:
    pem = gateway.folder / "front.pem"
    signer = ca.load(gateway.folder / "authority")
    assert signer is not None
    before = serial(gateway)
    assert "expires in" in ca.why_new(pem.read_text(), NAMES, now())
    connection = connect(gateway)
    connection.request("GET", "/stream", headers=BEARER)
    answer = connection.getresponse()
    assert answer.readline() == b"data: first\n"
    pem.write_text(ca.issue(signer, NAMES, now()))
    gateway.variables["__gateway_certificate"] = {"stat": {"checksum": "2"}}
    old = (gateway.folder / "haproxy.cfg").read_text()
    gateway.reload("second")
    assert (gateway.folder / "haproxy.cfg").read_text().replace("second", "first") != old
    eventually(lambda: serial(gateway) != before)
    assert ca.why_new(pem.read_text(), NAMES, now()) == ""
    threading.Timer(0.5, node.release.set).start()
    assert b"[DONE]" in answer.read()


def test_clients_refuse_another_authority_and_clear_text_is_no_way_in(gateway: Gateway) -> None:
    ca.ensure(gateway.folder / "other", now())
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(gateway, "other").connect()
    plain = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=15)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        plain.request("GET", "/v1/models", headers=BEARER)
        plain.getresponse()


def test_health_asks_as_the_gateway_serves(gateway: Gateway, tmp_path: Path) -> None:
    key = tmp_path / "own.key"
    key.write_text(KEY)
    for file, scheme in ((str(tmp_path / "front.pem"), "https"), ("", "http")):
        gateway.variables["__gateway_front_door"] = {"file": file}
        gateway.reload(f"for-{scheme}")
        assert bool(gateway.haproxy.certificate_files()) == (scheme == "https")
        answer = ask_as_client(f"{scheme}://127.0.0.1:{gateway.port}", key)
        assert answer["status"] == 200, answer


# What roles/gateway does, on two gateways that are folders of this machine.
PLAY: list[dict[str, Any]] = [
    {
        "hosts": "gateways",
        "gather_facts": False,
        "tasks": [
            {
                "certificate_file": {
                    "path": "{{ folder }}/front.pem",
                    "config": "{{ folder }}/haproxy.cfg",
                },
                "register": "__gateway_found",
            },
            {
                "front_door": {
                    "tls": "{{ tls | default('auto') }}",
                    "own": "{{ folder }}/front.pem",
                    "names": ["{{ inventory_hostname }}", "not_a_name"],
                    "authority": "{{ authority }}",
                    "doors": "{{ hostvars | doors_of(ansible_play_hosts) }}",
                },
                "register": "decision",
            },
            {
                "front_door": {
                    "action": "issue",
                    "own": "{{ folder }}/front.pem",
                    "names": ["{{ inventory_hostname }}", "not_a_name"],
                    "authority": "{{ authority }}",
                },
                "when": "decision.issue | length > 0",
            },
            {"debug": {"msg": "{{ inventory_hostname }} serves [{{ decision.file }}]"}},
        ],
    }
]


class Site:
    """Two gateways, and a controller that decides how they serve."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hosts = {}
        for name in ("gw01", "gw02"):
            (folder / name).mkdir()
            hosts[name] = {"folder": str(folder / name), "ansible_connection": "local"}
        hosts["gw01"]["ansible_python_interpreter"] = sys.executable
        hosts["gw02"]["ansible_python_interpreter"] = sys.executable
        inventory = {"all": {"children": {"gateways": {"hosts": hosts}}}}
        (folder / "hosts.json").write_text(json.dumps(inventory))
        (folder / "play.yml").write_text(json.dumps(PLAY))

    def run(self, *extra: str, authority: str = "authority") -> tuple[int, str]:
        command = [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("-i", str(self.folder / "hosts.json")),
            *("-e", f"authority={self.folder / authority}"),
            *extra,
            str(self.folder / "play.yml"),
        ]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
        environment |= {"COLUMNS": "1000", "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr


def test_every_gateway_gets_a_certificate_once_and_its_key_is_shown_nowhere(tmp_path: Path) -> None:
    site = Site(tmp_path)
    rc, output = site.run("--check")
    assert rc == 0, output
    assert not (tmp_path / "authority").exists()
    assert not (tmp_path / "gw01/front.pem").exists()
    rc, output = site.run("-vvv")
    assert rc == 0, output
    assert "PRIVATE KEY" not in output
    trusted = ["openssl", "verify", "-CAfile", tmp_path / "authority/ca.crt"]
    for name in ("gw01", "gw02"):
        pem = tmp_path / name / "front.pem"
        assert pem.stat().st_mode & 0o777 == 0o600
        subprocess.run([*trusted, "-verify_hostname", name, pem], check=True, capture_output=True)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/front.pem")}
    rc, output = site.run()
    assert rc == 0, output
    assert "changed=0" in output
    assert {path: path.read_bytes() for path in tmp_path.glob("*/front.pem")} == kept
    # From another controller: what is there is good, and what is not is not signed by a stranger.
    rc, output = site.run(authority="other")
    assert rc == 0, output
    (tmp_path / "gw02/front.pem").unlink()
    rc, output = site.run(authority="other")
    assert rc != 0
    assert "Clients would not trust" in output
    assert not (tmp_path / "gw02/front.pem").exists()


def test_a_fleet_in_clear_text_goes_on_and_says_how_to_end_that(tmp_path: Path) -> None:
    site = Site(tmp_path)
    written = "global\n    description glm-fleet 0123456789ab\nfrontend glm\n    bind *:8080\n"
    (tmp_path / "gw01/haproxy.cfg").write_text(written)
    rc, output = site.run()
    assert rc == 0, output
    assert "gw01 serves []" in output
    assert "gw02 serves []" in output
    assert "set gateway_tls to always" in output
    assert not (tmp_path / "authority").exists()
    rc, output = site.run("-e", "tls=always")
    assert rc == 0, output
    assert f"gw01 serves [{tmp_path / 'gw01/front.pem'}]" in output
