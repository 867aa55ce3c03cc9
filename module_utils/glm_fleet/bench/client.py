# SPDX-License-Identifier: Apache-2.0
"""The load of a benchmark: N streams at once against one server, measured as a client sees it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import FleetError
from ..core.http import local_http
from ..serving.metrics import read_metrics
from .figures import spread_ms, summarize
from .stream import ANYWHERE, Server, Stream, send_wave, wave

# Ids that every vocabulary has, away from the special tokens at either end.
_IDS = (100, 400)
# Tokens of others, as a share of ours, that still are the counters' own lag.
_FOREIGN_SHARE = 0.02


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
        (stream,) = await wave(server, [body], load.silence_s)
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
        "request_ms": spread_ms([stream.arrivals[-1] - stream.begun for stream in ended]),
        "ttft_ms": spread_ms([stream.arrivals[0] - stream.begun for stream in ended]),
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


def check_wave(
    server: Server, streams: list[Stream], tokens: int, *, counts: bool = True
) -> list[Stream]:
    """Refuse a wave with an answer that is missing or short, or of no streams if it counts.

    A single answer comes in one piece where the server or this process had to wait for its
    processor; most of them do so only where something on the way holds them.
    """
    for stream in streams:
        if not stream.problem and stream.tokens != tokens:
            stream.problem = f"{stream.tokens} tokens"
    held = [stream for stream in streams if not stream.problem and stream.held]
    if counts and len(held) > len(streams) / 2:
        for stream in held:
            stream.problem = "the whole answer came in one piece: something on the way holds it"
    _require_answers(server, streams, f"{tokens} tokens, {len(streams)} times at once")
    return streams


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
    check_wave(server, send_wave(server, warmup, load.silence_s), load.warmup_tokens, counts=False)
    waves = []
    for turn in range(load.rounds):
        bodies = [
            request_body(server.model, load, number, tokens=load.output_tokens, salt=salt)
            for number in range(turn * streams, (turn + 1) * streams)
        ]
        waves.append(
            check_wave(server, send_wave(server, bodies, load.silence_s), load.output_tokens)
        )
    return summarize(waves)


def measure_prompt(server: Server, load: Load, tokens: int, *, salt: str) -> dict[str, Any]:
    """Measure one stream with prompts of ``tokens``, which no cache has, and then has.

    Returns {prompt_tokens, cold: {median, p95, p99}, warm: {...}}, the times to the first token in
    milliseconds. Each of ``load.rounds`` prompts is asked twice; the second time the prefix cache
    may have it.
    """
    asked = replace(load, prompt_tokens=tokens)
    streams: list[Stream] = []
    for number in range(load.rounds):
        body = request_body(
            server.model, asked, number, tokens=load.warmup_tokens, salt=f"{salt}-p{tokens}"
        )
        for _ in range(2):
            streams += send_wave(server, [body], load.silence_s)
    _require_answers(server, streams, f"answers to prompts of {tokens} tokens")
    first = [stream.arrivals[0] - stream.begun for stream in streams]
    return {
        "prompt_tokens": tokens,
        "cold": spread_ms(first[::2]),
        "warm": spread_ms(first[1::2]),
    }


@dataclass(frozen=True)
class Counters:
    """What servers have counted by now: requests running, tokens generated in all."""

    running: float
    tokens: float


def read_counters(endpoints: Sequence[tuple[str, int]]) -> Counters:
    """Add up the counters of servers that tell them."""
    found = [
        read_metrics(local_http(port, address=ANYWHERE.get(address, address), timeout_s=10))
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
