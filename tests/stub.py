# SPDX-License-Identifier: Apache-2.0
"""A server that streams tokens as vLLM's does, at a pace of one's choice.

Run as a program it prints its port and serves until its input is closed; with a port, it
serves there until it is ended.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


def _chunk(payload: bytes) -> bytes:
    event = b"data: " + payload + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


_EVENT = _chunk(
    json.dumps(
        {
            "id": "cmpl-0123456789abcdef0123456789abcdef",
            "object": "text_completion",
            "created": 1795348800,
            "model": "glm-5.2",
            "choices": [
                {
                    "index": 0,
                    "text": " word",
                    "logprobs": None,
                    "finish_reason": None,
                    "stop_reason": None,
                }
            ],
            "usage": None,
        }
    ).encode()
)
_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Glm-Fleet-Node: gpu01\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@dataclass
class Stub:
    """How it answers, and what it was asked.

    ``gap_s`` is the time between tokens;
    ``slots`` how many streams run at once; ``together`` how many requests it waits for before
    it answers the first of them; ``fault`` one of "", "401", "short", "cut",
    "whole", "silent".
    """

    gap_s: float = 0.0
    slots: int = 1000
    together: int = 1
    fault: str = ""
    per_event: int = 1
    port: int = 0
    tokens: int = 0
    running: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = threading.Semaphore(self.slots)
        self._gathered = threading.Barrier(self.together)
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self._answer(connection)
            except (BrokenPipeError, ConnectionResetError):
                return

    def _answer(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as reader:
            first = reader.readline()
            head = b"".join(iter(reader.readline, b"\r\n"))
            length = next(
                (
                    int(line.partition(b":")[2])
                    for line in head.splitlines()
                    if line.lower().startswith(b"content-length")
                ),
                0,
            )
            body = reader.read(length)
        if first.startswith(b"GET /metrics"):
            text = (
                f"vllm:num_requests_running {self.running}\n"
                f"vllm:generation_tokens_total {self.tokens}\n"
            ).encode()
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + text)
            return
        if first.startswith(b"GET"):
            text = json.dumps({"data": [{"id": "glm-5.2", "max_model_len": 4096}]}).encode()
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + text)
            return
        asked = json.loads(body)
        with self._lock:
            self.bodies.append(asked)
            self.heads.append(head)
        if self.fault == "401":
            text = b'{"error":"Unauthorized"}'
            connection.sendall(
                b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
            )
            return
        if self.fault == "silent":
            connection.recv(1)
            return
        self._gathered.wait()
        with self._free:
            self._stream(connection, int(asked["max_tokens"]))

    def _stream(self, connection: socket.socket, tokens: int) -> None:
        if self.fault == "short":
            tokens -= 1
        events = -(-tokens // self.per_event)
        connection.sendall(_HEAD)
        if self.fault == "whole":
            connection.sendall(_EVENT * events)
        else:
            for number in range(events):
                if number and self.gap_s:
                    time.sleep(self.gap_s)
                connection.sendall(_EVENT)
                if self.fault == "cut" and number == events // 2:
                    return
        with self._lock:
            self.tokens += tokens
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}).encode()
        connection.sendall(_chunk(usage) + _chunk(b"[DONE]") + b"0\r\n\r\n")


@contextmanager
def serving(**settings: Any) -> Iterator[Stub]:
    """Serve on a free port of this host for as long as the block lasts."""
    stub = Stub(**settings)
    try:
        yield stub
    finally:
        stub.close()


if __name__ == "__main__":
    with serving(port=int((sys.argv[1:] or ["0"])[0])) as server:
        print(server.port, flush=True)
        if sys.argv[1:]:
            threading.Event().wait()
        sys.stdin.read()
