# SPDX-License-Identifier: Apache-2.0
"""The load of a benchmark: N streams at once against one server, measured as a client sees it.

One process, one event loop and no HTTP library: what arrives is stamped, then read. All
connections of a wave are open before its first request is sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import FleetError
from ..core.http import local_http
from ..serving.metrics import read_metrics

# Ids that every vocabulary has, away from the special tokens at either end.
_IDS = (100, 400)
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104
_CONNECT_S = 10.0
_NODE_HEADER = b"x-glm-fleet-node"
# Tokens of others, as a share of ours, that still are the counters' own lag.
_FOREIGN_SHARE = 0.02


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
        return _ANYWHERE.get(self.address, self.address)

    def tls_context(self) -> ssl.SSLContext | None:
        """Return how to speak TLS; None for plain HTTP."""
        if not self.tls:
            return None
        context = ssl.create_default_context()
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True)
class Load:
    """What is asked: lengths in tokens, ``silence_s`` how long a stream may say nothing."""

    prompt_tokens: int = 512
    output_tokens: int = 256
    warmup_tokens: int = 32
    rounds: int = 3
    seed: int = 0
    silence_s: float = 300.0


@dataclass(frozen=True)
class Clients:
    """A load without waves: ``number`` clients, each with one short request after another.

    Nearly every step of the server then holds some request's prompt. Lengths are drawn between
    the bounds, in tokens; what comes in the first ``settle_s`` seconds does not count.
    """

    number: int = 32
    seconds: float = 20.0
    prompt_tokens: tuple[int, int] = (64, 128)
    output_tokens: tuple[int, int] = (12, 36)
    settle_s: float = 2.0


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


def request_body(model: str, load: Load, number: int, *, tokens: int, salt: str) -> dict[str, Any]:
    """Return request ``number`` of a run: the same prompt for the same seed and number.

    The salt keeps it out of the prefix cache, which would know it from the run before.
    """
    chosen = random.Random(f"{load.seed}/{number}")  # noqa: S311
    return {
        "model": model,
        "prompt": [chosen.randrange(*_IDS) for _ in range(load.prompt_tokens)],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        # vLLM 0.32 refuses one with a slash.
        "cache_salt": f"{salt}-{number}",
    }


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


async def _wave(
    server: Server, bodies: Sequence[Mapping[str, Any]], silence_s: float
) -> list[Stream]:
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
    return asyncio.run(_wave(server, bodies, silence_s))


async def _serve_client(
    server: Server, clients: Clients, load: Load, number: int, until: float, salt: str
) -> list[Stream]:
    drawn = random.Random(f"{load.seed}/client/{number}")  # noqa: S311
    streams: list[Stream] = []
    while time.perf_counter() < until and not any(each.problem for each in streams):
        tokens = drawn.randint(*clients.output_tokens)
        asked = replace(load, prompt_tokens=drawn.randint(*clients.prompt_tokens))
        turn = number + clients.number * len(streams)
        body = request_body(server.model, asked, turn, tokens=tokens, salt=f"{salt}-c")
        (stream,) = await _wave(server, [body], load.silence_s)
        if not stream.problem and stream.tokens != tokens:
            stream.problem = f"{stream.tokens} tokens"
        streams.append(stream)
    return streams


async def _serve_clients(
    server: Server, clients: Clients, load: Load, until: float, salt: str
) -> list[Stream]:
    found = await asyncio.gather(
        *(
            _serve_client(server, clients, load, number, until, salt)
            for number in range(clients.number)
        )
    )
    return [stream for streams in found for stream in streams]


def measure_clients(server: Server, clients: Clients, load: Load, *, salt: str) -> dict[str, Any]:
    """Measure clients that send one short request after another.

    Returns {clients, requests, output_rate, request_ms: {median, p95, p99}, ttft_ms: {...}}.
    ``output_rate`` are the tokens that arrived, a second; times are those of the requests that
    ended in the time that counts. Raises `FleetError` where an answer is none.
    """
    begun = time.perf_counter()
    until = begun + clients.seconds
    streams = asyncio.run(_serve_clients(server, clients, load, until, salt))
    _require_answers(server, streams, "some tokens")
    first = begun + clients.settle_s
    tokens = sum(
        stream.tokens / len(stream.arrivals)
        for stream in streams
        for arrival in stream.arrivals
        if first < arrival <= until
    )
    ended = [stream for stream in streams if first < stream.arrivals[-1] <= until]
    if not ended:
        raise FleetError(
            "The server is too slow for this measurement",
            expected=f"requests that end within {clients.seconds:g} s",
            found="none",
            remedy="raise benchmark_clients_seconds",
        )
    return {
        "clients": clients.number,
        "requests": len(ended),
        "output_rate": round(tokens / (until - first), 3),
        "request_ms": _spread_ms([stream.arrivals[-1] - stream.begun for stream in ended]),
        "ttft_ms": _spread_ms([stream.arrivals[0] - stream.begun for stream in ended]),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) lies, interpolated."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _spread_ms(values: Sequence[float]) -> dict[str, float]:
    return {
        name: round(percentile(values, share) * 1000, 3)
        for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99))
    }


def _together(wave: Sequence[Stream]) -> tuple[float, float, bool]:
    """Return (tokens, seconds, all_at_once) of the time in which every stream decoded.

    A server that does not run all of them at once has no such time: then it is the time
    from the first token of all to the last.
    """
    flowing = [stream for stream in wave if not stream.held]
    begin = max(stream.arrivals[0] for stream in flowing)
    end = min(stream.arrivals[-1] for stream in flowing)
    longest = max(stream.arrivals[-1] - stream.arrivals[0] for stream in flowing)
    at_once = end - begin > longest / 4
    if not at_once:
        begin = min(stream.arrivals[0] for stream in flowing)
        end = max(stream.arrivals[-1] for stream in flowing)
    tokens = 0.0
    for stream in wave:
        # A server in a hurry puts several tokens into one event, at times all of them.
        after_first = stream.arrivals[1:] or stream.arrivals
        weight = (stream.tokens - 1) / len(after_first)
        tokens += weight * sum(begin < arrival <= end for arrival in after_first)
    return tokens, end - begin, at_once


def summarize(waves: Sequence[Sequence[Stream]]) -> dict[str, Any]:
    """Return the figures of one level: rates in tokens per second, times in milliseconds.

    Shape: {streams, requests, decode_per_stream, decode_together, output_rate, all_at_once,
    ttft_ms: {median, p95, p99}, itl_ms: {...}, answered_by: {node: requests}}.
    ``output_rate`` counts every token over the whole time, prefill included. An answer that
    was held counts in all but the rate of a stream and the gaps between its tokens.
    """
    streams = [stream for wave in waves for stream in wave]
    flowing = [stream for stream in streams if not stream.held]
    windows = [_together(wave) for wave in waves]
    whole = sum(
        max(stream.arrivals[-1] for stream in wave) - min(stream.begun for stream in wave)
        for wave in waves
    )
    gaps = [
        after - before
        for stream in flowing
        for before, after in zip(stream.arrivals, stream.arrivals[1:])
    ]
    answered: dict[str, int] = {}
    for stream in streams:
        if stream.node:
            answered[stream.node] = answered.get(stream.node, 0) + 1
    return {
        "streams": len(waves[0]),
        "requests": len(streams),
        "decode_per_stream": round(percentile([stream.rate for stream in flowing], 0.5), 3),
        "decode_together": round(
            sum(tokens for tokens, _, _ in windows) / sum(seconds for _, seconds, _ in windows), 3
        ),
        "output_rate": round(sum(stream.tokens for stream in streams) / whole, 3),
        "all_at_once": all(at_once for _, _, at_once in windows),
        "ttft_ms": _spread_ms([stream.arrivals[0] - stream.begun for stream in streams]),
        "itl_ms": _spread_ms(gaps),
        "answered_by": dict(sorted(answered.items())),
    }


def check_load(params: Mapping[str, Any]) -> None:
    """Refuse numbers that no figure can be made of."""
    least = {"nodes": 1, "rounds": 1, "prompt_tokens": 1, "output_tokens": 8, "warmup_tokens": 8}
    wrong = [f"{name}: {params[name]}" for name, low in least.items() if params[name] < low]
    wrong += [f"streams: {each}" for each in params["streams"] if each < 1]
    if wrong:
        raise FleetError(
            "The benchmark cannot run with these numbers",
            expected=", ".join(f"{name} of {low} or more" for name, low in least.items())
            + ", streams of 1 or more",
            found=", ".join(wrong),
            remedy="correct benchmark_* in the inventory",
        )


def _checked(
    server: Server, wave: list[Stream], tokens: int, *, counts: bool = True
) -> list[Stream]:
    """Refuse a wave with an answer that is missing or short, or of no streams if it counts.

    A single answer comes in one piece where the server or this process had to wait for its
    processor; most of them do so only where something on the way holds them.
    """
    for stream in wave:
        if not stream.problem and stream.tokens != tokens:
            stream.problem = f"{stream.tokens} tokens"
    held = [stream for stream in wave if not stream.problem and stream.held]
    if counts and len(held) > len(wave) / 2:
        for stream in held:
            stream.problem = "the whole answer came in one piece: something on the way holds it"
    _require_answers(server, wave, f"{tokens} tokens, {len(wave)} times at once")
    return wave


def _require_answers(server: Server, streams: Sequence[Stream], wanted: str) -> None:
    bad = [stream.problem for stream in streams if stream.problem]
    if bad:
        raise FleetError(
            "The server did not answer the benchmark",
            expected=f"{wanted} as a stream from {server.host}:{server.port}",
            found=f"{len(bad)} failed; the first: {bad[0]}",
            remedy="run playbooks/health.yml; check benchmark_* against the server's limits",
        )


def measure(server: Server, load: Load, streams: int, *, salt: str) -> dict[str, Any]:
    """Measure ``streams`` requests at once, ``load.rounds`` times, after a warm-up wave.

    The warm-up asks for the whole prompts, so that what is compiled or captured for this
    many streams is there before anything counts. Returns what `summarize` does.
    """
    salt = f"{salt}-{streams}"
    warmup = [
        request_body(server.model, load, number, tokens=load.warmup_tokens, salt=f"{salt}-w")
        for number in range(streams)
    ]
    _checked(server, send_wave(server, warmup, load.silence_s), load.warmup_tokens, counts=False)
    waves = []
    for turn in range(load.rounds):
        bodies = [
            request_body(server.model, load, number, tokens=load.output_tokens, salt=salt)
            for number in range(turn * streams, (turn + 1) * streams)
        ]
        waves.append(
            _checked(server, send_wave(server, bodies, load.silence_s), load.output_tokens)
        )
    return summarize(waves)


@dataclass(frozen=True)
class Counters:
    """What servers have counted by now: requests running, tokens generated in all."""

    running: float
    tokens: float


def read_counters(endpoints: Sequence[tuple[str, int]]) -> Counters:
    """Add up the counters of servers that tell them."""
    found = [
        read_metrics(local_http(port, address=_ANYWHERE.get(address, address), timeout_s=10))
        for address, port in endpoints
    ]
    return Counters(
        running=sum(each.get("vllm:num_requests_running", 0.0) for each in found),
        tokens=sum(each.get("vllm:generation_tokens_total", 0.0) for each in found),
    )


def other_traffic(before: Counters, after: Counters, load: Load, requests: int) -> str:
    """Say who else the servers worked for while ``requests`` of ours ran; '' if nobody."""
    ours = requests * load.output_tokens + requests // load.rounds * load.warmup_tokens
    foreign = after.tokens - before.tokens - ours
    if before.running:
        return f"{before.running:g} requests of others ran already"
    if foreign > max(_FOREIGN_SHARE * ours, 1):
        return f"{foreign:.0f} tokens went to others ({foreign / ours:.0%} of ours)"
    return ""
