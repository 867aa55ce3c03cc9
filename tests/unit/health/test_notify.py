# SPDX-License-Identifier: Apache-2.0
"""Each change of a verdict is told once, also when the webhook is down for a while."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.health import notify


def report(**verdicts: str) -> dict[str, Any]:
    nodes = [
        {
            "name": name,
            "verdict": verdict,
            "reasons": [] if verdict == "healthy" else ["the engine hangs"],
            "next_step": "" if verdict == "healthy" else "restart it",
        }
        for name, verdict in verdicts.items()
    ]
    return {"time": "2026-11-22T10:00:00+00:00", "nodes": nodes, "gateways": []}


class Ear:
    """Stands for webhook and journal; ``deaf`` is a webhook that is down."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.events: list[Mapping[str, Any]] = []
        self.lines: list[str] = []
        self.deaf = False

    def post(self, event: Mapping[str, Any]) -> None:
        if self.deaf:
            raise FleetError("nobody listens")
        self.events.append(event)

    def hear(self, **verdicts: str) -> list[str]:
        return notify.notify(report(**verdicts), self.state, self.post, self.lines.append)


def test_every_change_is_told_once(tmp_path: Path) -> None:
    ear = Ear(tmp_path / "told.json")
    ear.hear(gpu01="healthy", gpu02="healthy")
    assert (ear.events, ear.lines) == ([], [])
    for _ in range(3):
        ear.hear(gpu01="healthy", gpu02="broken")
    assert [(each["host"], each["before"], each["after"]) for each in ear.events] == [
        ("gpu02", "healthy", "broken")
    ]
    assert ear.lines == ["<3>gpu02: healthy -> broken: the engine hangs. What to do: restart it"]
    ear.hear(gpu01="healthy", gpu02="healthy")
    assert ear.lines[1:] == ["<5>gpu02: broken -> healthy"]
    assert len(ear.events) == 2


def test_a_webhook_that_was_down_gets_everything_in_order(tmp_path: Path) -> None:
    ear = Ear(tmp_path / "told.json")
    ear.deaf = True
    assert "nobody listens" in ear.hear(gpu01="broken")[0]
    assert ear.hear(gpu01="healthy")
    assert len(ear.lines) == 2, "the journal does not wait for the webhook"
    ear.deaf = False
    assert ear.hear(gpu01="healthy") == []
    assert [each["after"] for each in ear.events] == ["broken", "healthy"]
    ear.hear(gpu01="healthy")
    assert len(ear.events) == 2


def test_a_host_that_left_the_fleet_is_forgotten(tmp_path: Path) -> None:
    ear = Ear(tmp_path / "told.json")
    ear.hear(gpu01="broken", gpu02="healthy")
    ear.hear(gpu02="healthy")
    assert len(ear.events) == 1
    ear.hear(gpu01="healthy", gpu02="healthy")
    assert len(ear.events) == 1


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", received
    httpd.shutdown()
    httpd.server_close()


def test_the_program_posts_and_keeps_the_secret(
    server: tuple[str, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, received = server
    path = tmp_path / "fleet.json"
    path.write_text(json.dumps(report(gpu01="degraded")))
    arguments = ["--report", str(path), "--state", str(tmp_path / "state/told.json")]
    monkeypatch.setenv("GLM_FLEET_WEBHOOK", f"{url}/hook?token=secret")
    assert notify.main(arguments) == 0
    assert notify.main(arguments) == 0
    assert [each["text"] for each in received] == [
        "gpu01: healthy -> degraded: the engine hangs. What to do: restart it"
    ]
    path.write_text(json.dumps(report(gpu01="healthy")))
    monkeypatch.setenv("GLM_FLEET_WEBHOOK", "http://127.0.0.1:1/secret")
    assert notify.main(arguments) == 1
    monkeypatch.setenv("GLM_FLEET_WEBHOOK", "not a url: secret")
    assert notify.main(arguments) == 1
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err
    assert "refused" in said.err
    path.write_text("{")
    assert notify.main(arguments) == 1
