# SPDX-License-Identifier: Apache-2.0
"""A real HAProxy under the role's own configuration, and nodes as it sees them."""

from __future__ import annotations

import http.client
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
import yaml
from glm_fleet.gateway.client_store import ClientStore
from glm_fleet.gateway.clients import Clients, Key, add, digest
from glm_fleet.gateway.drain import ensure_state
from glm_fleet.gateway.haproxy import (
    BACKEND,
    GatewayUnreachableError,
    Haproxy,
    describe,
    unix_transport,
)
from glm_fleet.gateway.state_file import save_states

from tests.defaults import defaults

ROLE = Path(__file__).resolve().parents[1] / "roles" / "gateway"
NOW = "2026-11-27T12:00:00+00:00"
KEY = "the key of the tests"
BEARER = {"Authorization": f"Bearer {KEY}"}


@dataclass(frozen=True)
class Request:
    """A request as a node got it; header names in lower case, ``body`` its length in bytes."""

    line: str
    headers: Mapping[str, str]
    body: int


class Node:
    """A node as the gateway sees it: /health, and a stream that lasts as long as told.

    With ``agent_port`` its readiness agent says ``word``, as those of every version do.
    """

    def __init__(self, address: str = "127.0.0.1", agent_port: int = 0) -> None:
        self.healthy = True
        self.address = address
        self.word = "up"
        # How often a gateway asked for it.
        self.asked = 0
        self.agent: socketserver.ThreadingTCPServer | None = None
        if agent_port:
            self.start_agent(agent_port)
        self.release = threading.Event()
        # JSON that it answers with, in place of a stream.
        self.answer = b""
        self.seen: list[Request] = []
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/health":
                    self.send_response(200 if node.healthy else 500)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.note()
                if node.answer:
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(node.answer)))
                    self.end_headers()
                    self.wfile.write(node.answer)
                    return
                self.send_response(500 if self.headers.get("X-Fail") else 200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.chunk(b"data: first\n\n")
                if self.path == "/stream" or self.headers.get("X-Wait"):
                    node.release.wait(20)
                self.chunk(b"data: [DONE]\n\n")
                self.chunk(b"")

            do_POST = do_GET  # noqa: N815 - the name that http.server calls

            def note(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                sent = self.rfile.read(int(headers.get("content-length", 0)))
                body = len(sent)
                if headers.get("transfer-encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += len(self.rfile.read(size + 2)) - 2
                    self.rfile.readline()
                node.seen.append(Request(self.requestline, headers, body))
                if self.command == "POST":
                    node.took(sent)

            def chunk(self, data: bytes) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((address, 0), Handler)
        self.server.daemon_threads = True
        # A health check resets its connection as soon as it has the status.
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port: int = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def took(self, body: bytes) -> None:
        """Hook for a body that was not chunked, before the answer."""

    def start_agent(self, port: int) -> None:
        node = self

        class Agent(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(f"{node.word}\n".encode())
                node.asked += 1

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self.agent = Server((self.address, port), Agent)
        threading.Thread(target=self.agent.serve_forever, args=(0.05,), daemon=True).start()

    def stop_agent(self) -> None:
        if self.agent is not None:
            self.agent.shutdown()
            self.agent.server_close()
            self.agent = None

    def close(self) -> None:
        self.stop_agent()
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def _rendered(variables: Mapping[str, Any], text: str) -> str:
    environment = jinja2.Environment(  # noqa: S701 - HAProxy's configuration is not HTML
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["comment"] = lambda text: f"# {text}"
    return environment.from_string(text).render(variables)


class Gateway:
    """HAProxy with the role's template, less what needs root.

    ``variables`` are the role's, over its defaults. Client `tests` has the key `KEY`, which `get`
    sends.
    """

    def __init__(self, folder: Path, nodes: Mapping[str, Node], **variables: Any) -> None:
        binary = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
        if binary is None:
            raise AssertionError("haproxy is missing: run ./bootstrap test, which installs it")
        self.binary = binary
        self.folder = folder
        self.endpoints = {name: f"{node.address}:{node.port}" for name, node in nodes.items()}
        self.variables = variables
        # What else a test changes in the text of the configuration.
        self.edit: Callable[[str], str] = lambda text: text
        self.port = free_port()
        self.state_file = folder / "state"
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.ask = unix_transport(str(folder / "admin.sock"), timeout=3)
        self.ask_master = unix_transport(str(folder / "master.sock"), timeout=3)
        self.haproxy = Haproxy(self.ask, self.ask_master)
        self.store = ClientStore(folder / "clients.json", folder / "maps")
        self.clients = add(Clients(), "tests", Key("1", digest(KEY)), {}, NOW)
        self.keep()

    def keep(self, credential: str = "") -> None:
        """Write the clients, and bring the HAProxy that runs to them."""
        self.store.write(self.clients, credential)
        if self.process is not None:
            self.store.apply(self.ask, self.ask_master)

    def write(self, revision: str) -> Path:
        variables = defaults("gateway")
        variables |= yaml.safe_load((ROLE / "vars/main.yml").read_text())
        variables |= {
            "ansible_managed": "Ansible managed",
            "__gateway_revision": revision,
            "__gateway_endpoints": self.endpoints,
            "__gateway_socket": self.folder / "admin.sock",
            "__gateway_state_file": self.state_file,
            "__gateway_keys": self.folder / "maps/keys.map",
            "__gateway_ways": self.folder / "maps/ways.map",
            "__gateway_credential": self.folder / "maps/nodes.map",
            "__gateway_front_door": {"file": ""},
            "gateway_bind_address": "127.0.0.1",
            "gateway_port": self.port,
            "gateway_metrics_bind": f"127.0.0.1:{free_port()}",
            "gateway_check_interval_s": 1,
            "gateway_sentry_port": 0,
            "gateway_node_maxconn": 0,
            "gateway_paths": [*variables["gateway_paths"], "GET /stream"],
            **self.variables,
        }
        variables["__gateway_too_large"] = _rendered(variables, variables["__gateway_too_large"])
        text = _rendered(variables, (ROLE / "templates/haproxy.cfg.j2").read_text())
        text = self.edit(text.replace("log /dev/log local0", "log stdout format raw local0"))
        needs_root = ("user ", "group ", "chroot ")
        path = self.folder / "haproxy.cfg"
        path.write_text(
            "".join(
                line
                for line in text.splitlines(keepends=True)
                if not line.strip().startswith(needs_root)
            )
        )
        return path

    def start(self, revision: str = "first") -> None:
        path = self.write(revision)
        checked = subprocess.run(
            [self.binary, "-c", "-f", path], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "-Ws", "-S", self.folder / "master.sock", "-f", path],
                stdout=log,
                stderr=log,
            )
        eventually(lambda: self.runs(revision))

    def reload(self, revision: str) -> None:
        save_states(self.haproxy, self.state_file, self.endpoints)
        self.write(revision)
        assert self.process is not None
        self.process.send_signal(12)  # SIGUSR2, as `systemctl reload haproxy` sends it
        eventually(lambda: self.runs(revision))

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)

    def runs(self, revision: str) -> bool:
        try:
            return self.haproxy.revision() == revision
        except GatewayUnreachableError:
            return False

    def set(
        self, name: str, state: str, *, wait: bool = True, timeout: float = 15, endpoint: str = ""
    ) -> bool:
        return ensure_state(
            self.haproxy,
            BACKEND,
            name,
            state,
            state_file=self.state_file,
            wait=wait,
            timeout=timeout,
            endpoint=endpoint,
        ).changed

    def states(self) -> dict[str, str]:
        report = describe(self.haproxy)
        assert report["errors"] == []
        return {s["name"]: s["status"] for s in report["servers"]}

    def get(
        self, path: str = "/v1/models", headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Return status and serving node of one request."""
        status, answer, _ = self.ask_door("GET", path, BEARER if headers is None else headers)
        return status, answer.get("x-glm-fleet-node", "")

    def ask_door(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Return status, headers (names in lower case) and body of one answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body=body, headers=dict(headers))
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, {k.lower(): v for k, v in response.headers.items()}, text
        finally:
            connection.close()

    def raw(self, request: bytes, timeout: float = 5) -> bytes:
        """Send bytes as they are; return everything that comes back until the end or a silence."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(request)
            answer = b""
            try:
                while part := connection.recv(65536):
                    answer += part
            except (TimeoutError, ConnectionError):
                pass
            return answer


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
