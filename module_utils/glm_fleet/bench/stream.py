# SPDX-License-Identifier: Apache-2.0
"""Streamed answers of one server, each stamped as it arrives.

One process, one event loop and no HTTP library: what arrives is stamped, then read. All
connections of a wave are open before its first request is sent.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ANYWHERE = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104
_CONNECT_S = 10.0
_NODE_HEADER = b"x-glm-fleet-node"


@dataclass(frozen=True)
class Server:
    """Where requests go. ``address`` may be one that a server is bound to."""

    address: str
    port: int
    model: str
    api_key: str = ""
    tls: bool = False
    verify: bool = True

    @property
    def host(self) -> str:
        """The address to connect to."""
        return ANYWHERE.get(self.address, self.address)

    def tls_context(self) -> ssl.SSLContext | None:
        """Return how to speak TLS; None for plain HTTP."""
        if not self.tls:
            return None
        context = ssl.create_default_context()
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass
class Stream:
    """One answer: when it was asked, when its pieces came, and how many tokens it had."""

    begun: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    node: str = ""
    problem: str = ""

    @property
    def held(self) -> bool:
        """Whether the whole answer came in one piece, which says nothing of its decoding."""
        return len(set(self.arrivals)) < 2

    @property
    def rate(self) -> float:
        """Tokens per second after the first one, of an answer that was not held."""
        return (self.tokens - 1) / (self.arrivals[-1] - self.arrivals[0])


class _Request(asyncio.Protocol):
    """One request on one connection. ``ended`` resolves when the answer is over."""

    def __init__(self, body: bytes, server: Server, ended: asyncio.Future[None]) -> None:
        self.stream = Stream()
        self.seen = 0.0
        self.ended = ended
        self._transport: asyncio.Transport | None = None
        self._raw = bytearray()
        self._text = bytearray()
        self._in_head = True
        self._status = 0
        self._chunked = False
        self._done = False
        host = f"[{server.host}]" if ":" in server.host else server.host
        key = f"Authorization: Bearer {server.api_key}\r\n" if server.api_key else ""
        self._request = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{server.port}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        ).encode() + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport

    def send(self) -> None:
        """Ask. Kept apart from connecting, so that all streams begin together."""
        if self.ended.done():
            return
        assert self._transport is not None  # noqa: S101
        self.stream.begun = self.seen = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = self.seen = time.perf_counter()
        self._raw += data
        if self._in_head and not self._read_head():
            return
        if self._chunked:
            try:
                self._unchunk()
            except ValueError:
                self.give_up("the answer is not HTTP as it should be")
                return
        else:
            self._text += self._raw
            self._raw.clear()
        if self._status == 200:
            self._read_events(now)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done and not self.stream.problem:
            if self._status not in (0, 200):
                text = self._text.decode(errors="replace").strip()
                self.stream.problem = f"HTTP {self._status}: {text[:300]}"
            else:
                self.stream.problem = f"the connection closed before the end ({error or 'EOF'})"
        if not self.ended.done():
            self.ended.set_result(None)

    def give_up(self, problem: str) -> None:
        """End the request from this side."""
        self.stream.problem = self.stream.problem or problem
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = bytes(self._raw[:end]).split(b"\r\n")
        del self._raw[: end + 4]
        self._in_head = False
        words = first.split()
        self._status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.strip().lower(), value.strip()
            if name == b"transfer-encoding":
                self._chunked = value.lower() == b"chunked"
            elif name == _NODE_HEADER:
                self.stream.node = value.decode(errors="replace")
        return True

    def _unchunk(self) -> None:
        at = 0
        while True:
            line = self._raw.find(b"\r\n", at)
            if line < 0:
                break
            size = int(bytes(self._raw[at:line]).partition(b";")[0], 16)
            if len(self._raw) < line + 2 + size + 2:
                break
            self._text += self._raw[line + 2 : line + 2 + size]
            at = line + 2 + size + 2
            if size == 0:
                break
        del self._raw[:at]

    def _read_events(self, now: float) -> None:
        *lines, rest = bytes(self._text).split(b"\n")
        self._text = bytearray(rest)
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self._done = True
                assert self._transport is not None  # noqa: S101
                self._transport.close()
                return
            self._read_event(payload, now)

    def _read_event(self, payload: bytes, now: float) -> None:
        try:
            event = json.loads(payload)
        except (ValueError, RecursionError):
            self.give_up(f"an event is not JSON: {payload[:100]!r}")
            return
        # Looked at by hand: a full check of each event would be part of what is measured.
        if not isinstance(event, dict):
            self.give_up(f"an event is no object: {payload[:100]!r}")
            return
        if "error" in event:
            self.give_up(str(event["error"])[:300])
            return
        if event.get("choices"):
            self.stream.arrivals.append(now)
        usage = event.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if isinstance(tokens, int):
            self.stream.tokens = tokens


async def wave(
    server: Server, bodies: Sequence[Mapping[str, Any]], silence_s: float
) -> list[Stream]:
    """Send all requests at once; `send_wave` for callers in an event loop of their own."""
    loop = asyncio.get_running_loop()
    context = server.tls_context()
    requests = [
        _Request(json.dumps(body).encode(), server, loop.create_future()) for body in bodies
    ]
    waits = [request.ended for request in requests]

    async def connect(request: _Request) -> None:
        try:
            connecting = loop.create_connection(
                lambda: request, server.host, server.port, ssl=context
            )
            await asyncio.wait_for(connecting, _CONNECT_S)
        except (OSError, asyncio.TimeoutError) as error:
            request.stream.problem = f"no connection: {type(error).__name__} {error}".strip()
            if not request.ended.done():
                request.ended.set_result(None)

    await asyncio.gather(*(connect(request) for request in requests))
    for request in requests:
        request.send()
    pending = {each for each in waits if not each.done()}
    while pending:
        _, pending = await asyncio.wait(pending, timeout=min(1.0, silence_s))
        for request in requests:
            silent = time.perf_counter() - request.seen
            if not request.ended.done() and silent > silence_s:
                request.give_up(f"not a word for {silence_s:g} s")
    return [request.stream for request in requests]


def send_wave(
    server: Server, bodies: Sequence[Mapping[str, Any]], silence_s: float
) -> list[Stream]:
    """Send all requests at once and return what came back, in the order of the requests."""
    return asyncio.run(wave(server, bodies, silence_s))
