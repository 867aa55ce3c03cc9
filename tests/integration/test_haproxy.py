# SPDX-License-Identifier: Apache-2.0
"""The gateway: parsing, and HAProxy itself under the role's own configuration."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from glm_fleet.core.errors import FleetError
from glm_fleet.fleet.endpoints import node_endpoints
from glm_fleet.gateway.drain import Change, ensure_state
from glm_fleet.gateway.haproxy import (
    BACKEND,
    MASTER_SOCKET,
    SOCKET,
    GatewayUnreachableError,
    Haproxy,
    UnknownServerError,
    describe,
    is_edited,
    unix_transport,
)
from glm_fleet.gateway.state_file import STATE_FILE, save_states
from glm_fleet.gateway.statistics import parse_old_workers, parse_servers_state

from tests.gateway import BEARER, ROLE, Gateway, Node, eventually, free_port

# -- pure ------------------------------------------------------------------------------


def test_a_refused_command_carries_the_words_of_haproxy() -> None:
    haproxy = Haproxy(lambda command: "Permission denied\n\n")
    with pytest.raises(FleetError, match="Permission denied"):
        haproxy.set_state("b", "n1", "drain")
    with pytest.raises(FleetError, match="show servers state"):
        haproxy.servers()


def test_a_missing_socket_is_told_apart(tmp_path: Path) -> None:
    haproxy = Haproxy(unix_transport(str(tmp_path / "none.sock")))
    with pytest.raises(GatewayUnreachableError, match=r"playbooks/gateway\.yml"):
        haproxy.servers()
    report = describe(haproxy)
    assert not report["valid"]
    assert len(report["errors"]) == 1


class Listener:
    """A runtime socket that gives these replies, one a connection, and then ends."""

    def __init__(self, path: Path, *replies: bytes) -> None:
        self.path = path
        self.replies = replies
        self.asked: list[bytes] = []
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def serve(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self.path))
            listener.listen()
            for reply in self.replies:
                connection, _ = listener.accept()
                with connection:
                    self.asked.append(connection.recv(65536))
                    connection.sendall(reply)


def test_a_gateway_that_restarts_is_waited_for(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "s", b"\n")
    ask = unix_transport(str(tmp_path / "s"), patience=10)
    later = threading.Timer(0.3, listener.thread.start)
    later.start()
    assert ask("show info") == "\n"
    later.join()
    with pytest.raises(GatewayUnreachableError, match="show info"):
        unix_transport(str(tmp_path / "s"), patience=0)("show info")


def test_a_question_that_a_restart_cuts_off_is_asked_again(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "s", b"", b"\n")
    listener.thread.start()
    ask = unix_transport(str(tmp_path / "s"), patience=10)
    assert ask("set server b/n1 state drain") == "\n"
    assert listener.asked == [b"set server b/n1 state drain\n"] * 2


def test_old_workers_are_found() -> None:
    text = (
        "#<PID>  <type>  <reloads>  <uptime>  <version>\n"
        "10      master  1 [failed: 0]  0d  2.6\n# workers\n12  worker  0  0d  2.6\n"
        "# old workers\n11  worker  1  0d  2.6\n# programs\n\n"
    )
    assert parse_old_workers(text) == [11]


def test_endpoints_prefer_the_address_of_the_serving_network() -> None:
    hostvars = {
        "a": {"ansible_host": "192.0.2.1"},
        "b": {
            "ansible_host": "192.0.2.2",
            "gateway_node_address": "2001:db8:0::2",
            "serving_port": 9,
        },
        "c": {},
    }
    assert node_endpoints(hostvars, ["a", "b", "c"], 8000) == {
        "a": "192.0.2.1:8000",
        "b": "[2001:db8::2]:9",
        "c": "c:8000",
    }


def test_the_role_and_the_modules_agree_on_paths() -> None:
    variables = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    assert variables["__gateway_socket"] == SOCKET
    assert variables["__gateway_state_file"] == STATE_FILE
    assert variables["__gateway_backend"] == BACKEND
    assert MASTER_SOCKET == "/run/haproxy-master.sock"  # what Debian's and Ubuntu's unit opens


# -- the real HAProxy ------------------------------------------------------------------


@pytest.fixture
def nodes() -> Iterator[dict[str, Node]]:
    made = {"gpu01": Node(), "gpu02": Node()}
    yield made
    for node in made.values():
        node.close()


@pytest.fixture
def gateway(tmp_path: Path, nodes: dict[str, Node]) -> Iterator[Gateway]:
    made = Gateway(tmp_path, nodes)
    made.start("first")
    yield made
    made.stop()


def test_the_expiry_of_a_certificate_is_read_from_what_runs(
    gateway: Gateway, tmp_path: Path
) -> None:
    assert gateway.haproxy.certificates() == []
    pem = tmp_path / "front.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "10", "-subj",
         "/CN=x", "-keyout", tmp_path / "key", "-out", tmp_path / "crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    pem.write_text((tmp_path / "crt").read_text() + (tmp_path / "key").read_text())
    config = gateway.write("second").read_text()
    bind = f"bind 127.0.0.1:{gateway.port}"
    assert bind in config
    (gateway.folder / "haproxy.cfg").write_text(config.replace(bind, f"{bind} ssl crt {pem}", 1))
    assert gateway.process is not None
    gateway.process.send_signal(12)
    eventually(lambda: gateway.runs("second"))
    (found,) = gateway.haproxy.certificates()
    assert found.path == str(pem)
    assert 9 * 86400 < found.expires_s - time.time() < 10 * 86400 + 60


def test_a_configuration_that_was_changed_by_hand_is_noticed() -> None:
    written = "global\n    description glm-fleet {}\n    user haproxy\n"
    digest = hashlib.sha256(written.format("").encode()).hexdigest()[:12]
    assert not is_edited(written.format(digest))
    assert is_edited(written.format(digest) + "# mine\n")
    assert is_edited("global\n    user haproxy\n")


def test_a_server_moves_to_another_endpoint_and_stays_there(
    gateway: Gateway, nodes: dict[str, Node], tmp_path: Path
) -> None:
    for name in nodes:
        gateway.set(name, "ready")
    moved = Node()
    try:
        there = f"127.0.0.1:{moved.port}"
        gateway.set("gpu01", "drain")
        assert gateway.set("gpu01", "ready", endpoint=there)
        assert not gateway.set("gpu01", "ready", endpoint=there)
        nodes["gpu01"].close()
        assert {gateway.get()[1] for _ in range(4)} == {"gpu01", "gpu02"}
        # A reload with the old endpoint in the configuration, as of a run that was cut off.
        save_states(gateway.haproxy, gateway.state_file)
        gateway.write("second")
        assert gateway.process is not None
        gateway.process.send_signal(12)
        eventually(lambda: gateway.runs("second"))
        assert {gateway.get() for _ in range(4)} == {(200, "gpu01"), (200, "gpu02")}
        gateway.endpoints["gpu01"] = there
        gateway.reload("third")
        assert gateway.states() == {"gpu01": "UP", "gpu02": "UP"}
        assert {gateway.get() for _ in range(4)} == {(200, "gpu01"), (200, "gpu02")}
    finally:
        moved.close()


def test_a_server_that_does_not_answer_where_it_should_is_put_back(gateway: Gateway) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu01", "drain")
    with pytest.raises(FleetError, match="did not become ready"):
        gateway.set("gpu01", "ready", endpoint=f"127.0.0.1:{free_port()}", timeout=3)
    (server,) = [each for each in gateway.haproxy.servers() if each.name == "gpu01"]
    assert server.endpoint == gateway.endpoints["gpu01"]
    assert server.admin_state == "drain"


def test_weight_0_is_not_ready_and_is_mended(gateway: Gateway) -> None:
    for name in gateway.endpoints:
        gateway.set(name, "ready")
    gateway.ask(f"set server {BACKEND}/gpu01 weight 0")
    assert gateway.states()["gpu01"] == "DRAIN"
    with pytest.raises(FleetError, match="cannot be taken out"):
        ensure_state(
            gateway.haproxy, BACKEND, "gpu02", "drain", state_file=gateway.state_file, wait=False,
            timeout=1, min_ready=1, clock=iter([0.0, 99.0]).__next__, sleep=lambda _: None,
        )  # fmt: skip
    assert gateway.set("gpu01", "ready")
    assert gateway.states() == {"gpu01": "UP", "gpu02": "UP"}
    gateway.reload("second")
    assert gateway.states() == {"gpu01": "UP", "gpu02": "UP"}


def test_a_host_that_only_got_another_name_goes_on(gateway: Gateway) -> None:
    for name in gateway.endpoints:
        gateway.set(name, "ready")
    gateway.endpoints = {
        "node01": gateway.endpoints["gpu01"],
        "gpu02": gateway.endpoints["gpu02"],
    }
    save_states(gateway.haproxy, gateway.state_file, gateway.endpoints, renamed={"node01": "gpu01"})
    gateway.write("second")
    assert gateway.process is not None
    gateway.process.send_signal(12)
    eventually(lambda: gateway.runs("second"))
    assert gateway.states() == {"node01": "UP", "gpu02": "UP"}


def test_a_drain_that_cannot_be_kept_is_taken_back(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in gateway.endpoints:
        gateway.set(name, "ready")

    def full(*_: Any, **__: Any) -> bool:
        raise FleetError("The server-state file cannot be written")

    monkeypatch.setattr("glm_fleet.gateway.drain.save_states", full)
    with pytest.raises(FleetError, match="cannot be written"):
        gateway.set("gpu01", "drain", wait=False)
    assert gateway.states()["gpu01"] == "UP"


def test_a_node_takes_traffic_only_after_it_was_joined(gateway: Gateway) -> None:
    # As long as a health check takes that is asked for.
    gateway.set("gpu02", "ready")
    gateway.set("gpu02", "maint")
    assert gateway.states() == {"gpu01": "MAINT", "gpu02": "MAINT"}
    assert gateway.get()[0] == 503
    assert gateway.set("gpu01", "ready")
    assert gateway.get() == (200, "gpu01")
    assert not gateway.set("gpu01", "ready")
    assert gateway.set("gpu02", "ready")
    assert {gateway.get()[1] for _ in range(4)} == {"gpu01", "gpu02"}
    report = describe(gateway.haproxy)
    assert report["valid"]
    assert report["revision"] == "first"
    assert report["servers"][0]["check"].startswith("L7OK")
    assert json.dumps(report)


def test_admin_states_outlive_reload_and_restart(gateway: Gateway, nodes: dict[str, Node]) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu02", "drain")
    expected = {"gpu01": "UP", "gpu02": "DRAIN", "gpu03": "MAINT"}
    nodes["gpu03"] = Node()
    gateway.endpoints["gpu03"] = f"127.0.0.1:{nodes['gpu03'].port}"
    gateway.reload("second")
    assert gateway.states() == expected
    gateway.stop()
    gateway.start("third")
    assert gateway.states() == expected
    assert {gateway.get()[1] for _ in range(4)} == {"gpu01"}
    # A lost file must not let anyone in.
    gateway.stop()
    gateway.state_file.unlink()
    gateway.start("fourth")
    assert set(gateway.states().values()) == {"MAINT"}


def test_a_moved_node_does_not_inherit_its_state(gateway: Gateway, nodes: dict[str, Node]) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu02", "ready")
    nodes["moved"] = Node()
    gateway.endpoints["gpu01"] = f"127.0.0.1:{nodes['moved'].port}"
    gateway.reload("second")
    running = {s.name: (s.endpoint, s.admin_state) for s in gateway.haproxy.servers()}
    assert running == {
        "gpu01": (gateway.endpoints["gpu01"], "maint"),
        "gpu02": (gateway.endpoints["gpu02"], "ready"),
    }


def test_drain_waits_for_streams_of_workers_before_a_reload(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    gateway.set("gpu01", "ready")
    answers: list[tuple[int, str]] = []
    stream = threading.Thread(target=lambda: answers.append(gateway.get("/stream")))
    stream.start()
    eventually(lambda: gateway.haproxy.sessions(BACKEND, "gpu01") == 1)
    gateway.reload("second")
    with pytest.raises(FleetError, match="1 running"):
        gateway.set("gpu01", "drain", timeout=0.6)
    assert gateway.states()["gpu01"] == "DRAIN"
    nodes["gpu01"].release.set()
    gateway.set("gpu01", "drain", timeout=10)
    stream.join(5)
    assert answers == [(200, "gpu01")]


def test_the_first_token_is_not_held_back(gateway: Gateway, nodes: dict[str, Node]) -> None:
    gateway.set("gpu01", "ready")
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=5)
    connection.request("GET", "/stream", headers=BEARER)
    response = connection.getresponse()
    assert response.readline() == b"data: first\n"  # the node is still waiting for us
    nodes["gpu01"].release.set()
    assert b"[DONE]" in response.read()
    connection.close()


def test_a_failing_node_is_taken_out_and_others_go_on(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu02", "ready")
    nodes["gpu01"].close()
    # Before the health check knows: the connection fails and the other node is asked.
    assert {gateway.get() for _ in range(4)} == {(200, "gpu02")}
    eventually(lambda: gateway.states()["gpu01"] == "DOWN", timeout=15)


def test_joining_a_sick_node_fails_and_is_undone(gateway: Gateway, nodes: dict[str, Node]) -> None:
    nodes["gpu01"].healthy = False
    with pytest.raises(FleetError, match="did not become ready"):
        gateway.set("gpu01", "ready", timeout=3)
    assert gateway.states()["gpu01"] == "MAINT"
    with pytest.raises(UnknownServerError, match="gpu09"):
        gateway.set("gpu09", "ready")


def test_check_mode_changes_nothing(gateway: Gateway) -> None:
    change = ensure_state(
        gateway.haproxy,
        BACKEND,
        "gpu01",
        "ready",
        state_file=gateway.state_file,
        wait=True,
        timeout=1,
        check_mode=True,
    )
    assert (change.before, change.after, change.changed) == ("maint", "ready", True)
    assert gateway.states()["gpu01"] == "MAINT"
    assert not gateway.state_file.exists()


def test_the_saved_states_read_back(gateway: Gateway) -> None:
    gateway.set("gpu01", "ready")
    saved = parse_servers_state(gateway.state_file.read_text())
    assert [(s.name, s.admin_state) for s in saved] == [("gpu01", "ready")]
    # Of a gateway that does not run, the file is all there is.
    gateway.stop()
    (gateway.folder / "admin.sock").unlink()
    assert not save_states(gateway.haproxy, gateway.state_file, gateway.endpoints)
    assert save_states(gateway.haproxy, gateway.state_file, {"gpu01": "127.0.0.1:1"})
    assert parse_servers_state(gateway.state_file.read_text()) == []


# -- taking a node out without an outage -----------------------------------------------


class Time:
    """A clock that moves only when somebody sleeps, and what happens meanwhile."""

    def __init__(self, meanwhile: Callable[[float], object] = lambda now: None) -> None:
        self.now = 0.0
        self.meanwhile = meanwhile

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)


def drain(gateway: Gateway, name: str, at: Time, **given: Any) -> Change:
    options = {"wait": True, "timeout": 5, "state_file": gateway.state_file, **given}
    return ensure_state(
        gateway.haproxy, BACKEND, name, "drain", clock=lambda: at.now, sleep=at.sleep, **options
    )


def test_the_last_node_is_not_taken_out(gateway: Gateway) -> None:
    gateway.set("gpu01", "ready")
    at = Time()
    with pytest.raises(FleetError, match=r"serve_min_ready\). Found: 0: none"):
        drain(gateway, "gpu01", at, min_ready=1)
    assert gateway.states()["gpu01"] == "UP"
    assert gateway.get() == (200, "gpu01")
    assert at.now == 30
    # An outage that somebody wants.
    assert drain(gateway, "gpu01", at, min_ready=0).changed


def test_a_node_is_taken_out_as_soon_as_another_is_back(gateway: Gateway) -> None:
    gateway.set("gpu01", "ready")
    at = Time(lambda now: now == 2 and gateway.set("gpu02", "ready"))
    assert drain(gateway, "gpu01", at, min_ready=1).changed
    assert at.now == 2
    assert gateway.states() == {"gpu01": "DRAIN", "gpu02": "UP"}


def test_a_node_that_takes_no_requests_is_always_taken_out(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    gateway.set("gpu01", "ready")
    nodes["gpu01"].close()
    eventually(lambda: gateway.states()["gpu01"] == "DOWN", timeout=15)
    assert drain(gateway, "gpu01", Time(), min_ready=1).changed
    assert drain(gateway, "gpu02", Time(), min_ready=1, wait=False).before == "maint"


def test_a_node_that_is_drained_already_needs_no_other(gateway: Gateway) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu02", "drain")
    change = drain(gateway, "gpu02", Time(), min_ready=2)
    assert (change.before, change.changed) == ("drain", False)


def test_two_that_drain_at_once_do_not_count_on_each_other(gateway: Gateway) -> None:
    gateway.set("gpu01", "ready")
    gateway.set("gpu02", "ready")
    refused: list[str] = []

    def out(name: str) -> None:
        try:
            drain(gateway, name, Time(), min_ready=1)
        except FleetError:
            refused.append(name)

    threads = [threading.Thread(target=out, args=(name,)) for name in ("gpu01", "gpu02")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(refused) == 1
    assert gateway.states()[refused[0]] == "UP"


def test_requests_that_last_too_long_are_counted_or_refused(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    gateway.set("gpu01", "ready")
    stream = threading.Thread(target=gateway.get, args=("/stream",))
    stream.start()
    eventually(lambda: gateway.haproxy.sessions(BACKEND, "gpu01") == 1)
    change = drain(gateway, "gpu01", Time(), fail_when_busy=False)
    assert (change.after, change.changed, change.sessions) == ("drain", True, 1)
    with pytest.raises(FleetError, match="1 running") as error:
        drain(gateway, "gpu01", Time())
    assert error.value.details == {"sessions": 1}
    assert gateway.states()["gpu01"] == "DRAIN"
    nodes["gpu01"].release.set()
    stream.join(5)


def test_a_restart_while_a_node_empties_does_not_let_it_back_in(gateway: Gateway) -> None:
    gateway.set("gpu01", "ready")

    def cut() -> None:
        with contextlib.suppress(http.client.HTTPException, OSError):
            gateway.get("/stream")

    stream = threading.Thread(target=cut)
    stream.start()
    eventually(lambda: gateway.haproxy.sessions(BACKEND, "gpu01") == 1)
    ready = gateway.state_file.read_text()

    def restart(now: float) -> None:
        if now == 1:
            gateway.stop()
            # As if the restart had come before the change was on the disk.
            gateway.state_file.write_text(ready)
            gateway.start("second")

    change = drain(gateway, "gpu01", Time(restart))
    assert (change.after, change.sessions) == ("drain", 0)
    assert gateway.states()["gpu01"] == "DRAIN"
    saved = parse_servers_state(gateway.state_file.read_text())
    assert [(s.name, s.admin_state) for s in saved] == [("gpu01", "drain")]
    stream.join(5)
