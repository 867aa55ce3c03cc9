# SPDX-License-Identifier: Apache-2.0
"""The demo's reading of a stream."""

from __future__ import annotations

from lab.demo import Answer, events


def test_events_end_at_done() -> None:
    lines = [b": comment\n", b'data: {"a": 1}\r\n', b"\n", b"data: [DONE]\n", b'data: {"a": 2}\n']
    assert list(events(lines)) == [{"a": 1}]


def test_rate_leaves_the_first_token_out() -> None:
    assert Answer("gpu01", 11, first_token_s=1.0, total_s=3.0).tokens_per_s == 5.0
    assert Answer("gpu01", 1, first_token_s=1.0, total_s=1.0).tokens_per_s == 0.0
