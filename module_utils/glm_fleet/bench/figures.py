# SPDX-License-Identifier: Apache-2.0
"""The figures of streams that were measured: rates, times and their percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .stream import Stream


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) lies, interpolated."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_ms(values: Sequence[float]) -> dict[str, float]:
    """Return {median, p95, p99} in milliseconds of values in seconds."""
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
        "ttft_ms": spread_ms([stream.arrivals[0] - stream.begun for stream in streams]),
        "itl_ms": spread_ms(gaps),
        "answered_by": dict(sorted(answered.items())),
    }
