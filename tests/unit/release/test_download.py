# SPDX-License-Identifier: Apache-2.0
"""A wheel from a URL: whole, continued, or refused."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.release.download import fetch_wheel

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; breaks off the first ``breaks`` answers in the middle."""

    breaks = 0
    asked: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append(wanted)
        start = int(wanted[len("bytes=") : -1]) if wanted else 0
        if "missing" in self.path:
            self.send_error(404)
            return
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        if self.server.breaks:
            self.server.breaks -= 1
            body = body[:1000]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def url(server: Server, name: str = "a%2Bb-1-py3-none-any.whl") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/x/{name}"


def test_a_broken_transfer_is_continued(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    path = fetch_wheel(f"{url(server)}#sha256={SHA256}", tmp_path)
    assert path == tmp_path / "a+b-1-py3-none-any.whl"
    assert path.read_bytes() == CONTENT
    assert server.asked == ["", "bytes=1000-", "bytes=2000-"]
    assert fetch_wheel(url(server), tmp_path) == path
    assert len(server.asked) == 3


def test_what_broke_for_good_is_kept_for_the_next_run(server: Server, tmp_path: Path) -> None:
    server.breaks = 3
    with pytest.raises(FleetError, match="cannot be downloaded"):
        fetch_wheel(url(server), tmp_path)
    assert fetch_wheel(url(server), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=3000-"


def test_a_whole_partial_file_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".a+b-1-py3-none-any.whl.part").write_bytes(CONTENT)
    assert fetch_wheel(f"{url(server)}#sha256={SHA256}", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.whl", "cannot be downloaded"),
        (f"a.whl#sha256={'0' * 64}", "another hash"),
    ],
)
def test_refusals(server: Server, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FleetError, match=message):
        fetch_wheel(url(server, name), tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def test_only_the_web(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="not one of the web"):
        fetch_wheel("ftp://x.invalid/a.whl", tmp_path)
