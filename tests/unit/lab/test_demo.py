# SPDX-License-Identifier: Apache-2.0
"""The demo's reading of a stream."""

from __future__ import annotations

from lab.demo import Answer, events


def test_events_end_at_done() -> None:
    lines = [b": comment\n", b'data: {"a": 1}\r\n', b"\n", b"data: [DONE]\n", b'data: {"a": 2}\n']
    assert list(events(lines)) == [{"a": 1}]


def test_the_rate_is_that_of_the_whole_request() -> None:
    assert Answer("gpu01", 12, first_token_s=1.0, total_s=3.0).tokens_per_s == 4.0
    # A client that was busy reads every token at once, and has seen no rate of 80,000.
    assert Answer("gpu01", 48, first_token_s=0.4, total_s=0.4).tokens_per_s == 120.0
    assert Answer("gpu01", 0, first_token_s=0.0, total_s=0.0).tokens_per_s == 0.0
