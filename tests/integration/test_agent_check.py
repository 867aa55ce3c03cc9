# SPDX-License-Identifier: Apache-2.0
"""A real HAProxy hears from the readiness agent of a node."""

from __future__ import annotations

import socket
import socketserver
import subprocess
import threading
import time
from pathlib import Path

from glm_fleet.gateway.haproxy import Haproxy, unix_transport
from glm_fleet.node import readiness, watchdog

HAPROXY = """
global
    stats socket {folder}/sock level admin
defaults
    timeout connect 2s
    timeout client 2s
    timeout server 2s
backend glm_nodes
    default-server disabled check inter 100ms agent-check agent-port {agent} agent-inter 100ms
    server gpu01 127.0.0.1:{port}
"""


def test_a_real_haproxy_hears_it_from_the_sentry(tmp_path: Path) -> None:
    flag = watchdog.Flag(tmp_path / "stalled")
    record, evidence = tmp_path / "record", tmp_path / "evidence"
    for path in (record, evidence):
        path.write_text('{"invocation": "abc"}')

    class Agent(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            word = readiness.answer(record, evidence, tmp_path / "stalled")
            self.request.sendall(f"{word}\n".encode())

    agent = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Agent)
    threading.Thread(target=agent.serve_forever, daemon=True).start()
    listener = socket.create_server(("127.0.0.1", 0))
    config = tmp_path / "haproxy.cfg"
    port = listener.getsockname()[1]
    config.write_text(HAPROXY.format(folder=tmp_path, agent=agent.server_address[1], port=port))
    haproxy = Haproxy(unix_transport(str(tmp_path / "sock")))

    def status_becomes(wanted: str) -> bool:
        end = time.monotonic() + 20
        while haproxy.statistics()["glm_nodes", "gpu01"].status != wanted:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    with subprocess.Popen(["haproxy", "-db", "-f", str(config)], stderr=subprocess.DEVNULL) as run:
        try:
            while not (tmp_path / "sock").exists():
                time.sleep(0.05)
            assert status_becomes("MAINT"), "up does not undo what the operator set"
            haproxy.set_state("glm_nodes", "gpu01", "ready")
            assert status_becomes("UP")
            flag.take_out("abc", "hung")
            assert status_becomes("DOWN")
            flag.let_in()
            assert status_becomes("UP")
            evidence.unlink()
            assert status_becomes("DOWN"), "a start that was not attested"
        finally:
            run.terminate()
            agent.shutdown()
            agent.server_close()
            listener.close()
