# SPDX-License-Identifier: Apache-2.0
"""The benchmark's client against a server that streams, and its report."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from glm_fleet.bench import client
from glm_fleet.bench.client import Clients, Counters, Load
from glm_fleet.bench.figures import percentile, summarize
from glm_fleet.bench.report import GATEWAY, NODE, benchmark_json, judge_target, render_benchmark
from glm_fleet.bench.stream import Server, Stream, send_wave, wave
from glm_fleet.core.errors import FleetError

from tests.stub import Stub, serving

LOAD = Load(prompt_tokens=20, output_tokens=16, warmup_tokens=8, rounds=2)
REFERENCE = {1: 56.0, 32: 625.0}


def server(stub: Stub, **changed: Any) -> Server:
    return Server("127.0.0.1", stub.port, "glm-5.2", **changed)


def stream(begun: float, first: float, gap: float, tokens: int, events: int = 0) -> Stream:
    arrivals = [begun + first + gap * number for number in range(events or tokens)]
    return Stream(begun=begun, arrivals=arrivals, tokens=tokens, node="gpu01")


def test_prompts_are_the_same_for_a_seed_and_never_cached() -> None:
    one = client.request_body("m", LOAD, 3, tokens=16, salt="a")
    again = client.request_body("m", LOAD, 3, tokens=16, salt="b")
    assert one["prompt"] == again["prompt"]
    assert one["cache_salt"] != again["cache_salt"]
    assert len(one["prompt"]) == 20
    assert one["prompt"] != client.request_body("m", LOAD, 4, tokens=16, salt="a")["prompt"]
    other = client.request_body("m", Load(prompt_tokens=20, seed=1), 3, tokens=16, salt="a")
    assert one["prompt"] != other["prompt"]


def test_every_request_asks_for_an_exact_length_and_the_warm_up_does_not_count() -> None:
    with serving(gap_s=0.001) as stub:
        level = client.measure(server(stub), LOAD, 3, salt="run")
    assert level["requests"] == 6
    assert level["answered_by"] == {"gpu01": 6}
    assert len(stub.bodies) == 9
    assert sorted(each["max_tokens"] for each in stub.bodies) == [8] * 3 + [16] * 6
    assert all(each["min_tokens"] == each["max_tokens"] for each in stub.bodies)
    assert all(each["ignore_eos"] and each["temperature"] == 0 for each in stub.bodies)
    salts = {each["cache_salt"] for each in stub.bodies}
    assert len(salts) == 9
    assert all(len(each) <= 128 and not set(each) & set("@/\\\0") for each in salts), "of vLLM 0.32"
    assert (
        len({json.dumps(each["prompt"]) for each in stub.bodies if each["max_tokens"] == 16}) == 6
    )


def test_all_requests_of_a_wave_run_at_once() -> None:
    with serving(together=8) as stub:
        load = Load(output_tokens=1000, rounds=1, silence_s=60)
        assert client.measure(server(stub), load, 8, salt="run")["requests"] == 8


def test_a_server_that_runs_them_one_by_one_is_noticed() -> None:
    with serving(gap_s=0.002, slots=1) as stub:
        level = client.measure(server(stub), LOAD, 3, salt="run")
    assert not level["all_at_once"]


def test_tokens_are_counted_by_the_server_not_by_events() -> None:
    with serving(gap_s=0.001, per_event=4) as stub:
        (answer,) = send_wave(
            server(stub), [client.request_body("m", LOAD, 0, tokens=16, salt="run")], 60
        )
    assert (answer.tokens, len(answer.arrivals)) == (16, 4)


def test_clients_send_one_short_request_after_another() -> None:
    clients = Clients(number=4, seconds=0.6, settle_s=0.1)
    with serving(gap_s=0.001) as stub:
        found = client.measure_clients(server(stub), clients, LOAD, salt="run")
    assert (found["clients"], found["requests"] > 8) == (4, True)
    lengths = [(len(each["prompt"]), each["max_tokens"]) for each in stub.bodies]
    assert all(64 <= prompt <= 128 and 12 <= answer <= 36 for prompt, answer in lengths)
    assert len(set(lengths)) > 4
    assert len({each["cache_salt"] for each in stub.bodies}) == len(stub.bodies)
    # Four streams with a token a millisecond at most; a request's own time is in between.
    assert 0 < found["output_rate"] < 4000
    assert found["request_ms"]["median"] > found["ttft_ms"]["median"]


def test_a_slow_request_counts_by_what_arrived_of_it() -> None:
    clients = Clients(number=2, seconds=0.5, output_tokens=(36, 36), settle_s=0.1)

    def rate() -> float:
        with serving(gap_s=0.01) as stub:
            try:
                found = client.measure_clients(server(stub), clients, LOAD, salt="run")
            except FleetError:
                return 0.0
        return float(found["output_rate"])

    # A request takes most of the time that counts: whole requests alone would be half of it. On a
    # machine that does other things too, one measurement in ten is enough.
    assert any(rate() > 100 for _ in range(10))


def test_clients_that_never_get_an_answer_in_time_are_no_figure() -> None:
    clients = Clients(number=1, seconds=0.05, output_tokens=(36, 36), settle_s=0.01)
    with serving(gap_s=0.02) as stub, pytest.raises(FleetError, match="too slow"):
        client.measure_clients(server(stub), clients, LOAD, salt="run")


def test_the_key_is_sent_only_if_there_is_one() -> None:
    with serving(gap_s=0.001) as stub:
        client.measure(server(stub), LOAD, 1, salt="run")
        assert not any(b"authorization" in head.lower() for head in stub.heads)
        client.measure(server(stub, api_key="s3cret"), LOAD, 1, salt="run")
        assert b"Authorization: Bearer s3cret\r\n" in stub.heads[-1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", 'HTTP 401: {"error":"Unauthorized"}'),
        ("short", "15 tokens"),
        ("cut", "the connection closed before the end"),
        ("whole", "the whole answer came in one piece"),
        ("silent", "not a word for 0.3 s"),
    ],
)
def test_an_answer_that_is_none_is_refused_with_its_cause(fault: str, words: str) -> None:
    patience = 0.3 if fault == "silent" else 60
    load = Load(prompt_tokens=20, output_tokens=16, warmup_tokens=16, rounds=1, silence_s=patience)
    with serving(fault=fault) as stub, pytest.raises(FleetError) as caught:
        client.measure(server(stub), load, 2, salt="run")
    assert words in str(caught.value)


def test_a_port_where_nobody_listens_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(FleetError, match=f"127.0.0.1:{port}.*no connection"):
        client.measure(Server("0.0.0.0", port, "m"), LOAD, 2, salt="run")


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_an_answer_is_read_however_it_is_cut(piece: int) -> None:
    events = [{"choices": [{"text": "ä"}]}] * 3 + [
        {"choices": [], "usage": {"completion_tokens": 3}}
    ]
    lines = [f"data: {json.dumps(each)}\n\n".encode() for each in events] + [b"data: [DONE]\n\n"]
    answer = b"HTTP/1.1 200 OK\r\nX-Glm-Fleet-Node: gpu07\r\ntransfer-encoding: chunked\r\n\r\n"
    answer += b"".join(b"%X;x=y\r\n%s\r\n" % (len(line), line) for line in lines) + b"0\r\n\r\n"

    async def read() -> Stream:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}")
            for at in range(0, len(answer), piece):
                writer.write(answer[at : at + piece])
                await writer.drain()
                await asyncio.sleep(0)
            writer.close()

        listener = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with listener:
            (found,) = await wave(Server("127.0.0.1", port, "m"), [{"a": {}}], 60)
        return found

    found = asyncio.run(read())
    assert (found.problem, found.tokens, len(found.arrivals), found.node) == ("", 3, 3, "gpu07")


def test_figures_of_streams_that_are_known() -> None:
    # Two streams of 11 tokens, 0.1 s apart; the second begins 0.5 s later than the first.
    waves = [[stream(0.0, 0.2, 0.1, 11), stream(0.0, 0.7, 0.1, 11)]]
    level = summarize(waves)
    assert level["decode_per_stream"] == pytest.approx(10)
    # Both decode from 0.7 to 1.2 s: 5 tokens each.
    assert level["decode_together"] == pytest.approx(20)
    assert level["output_rate"] == pytest.approx(22 / 1.7, abs=1e-3)
    assert level["all_at_once"]
    assert level["ttft_ms"] == {"median": 450, "p95": 675, "p99": 695}
    assert level["itl_ms"]["p99"] == pytest.approx(100)


def test_tokens_that_share_an_event_count_all() -> None:
    level = summarize([[stream(0.0, 0.1, 0.4, 9, events=3)]])
    assert level["decode_per_stream"] == pytest.approx(10)
    assert level["decode_together"] == pytest.approx(10)


def test_streams_one_after_the_other_are_counted_over_the_whole_time() -> None:
    level = summarize([[stream(0.0, 0.0, 0.1, 11), stream(0.0, 1.0, 0.1, 11)]])
    assert not level["all_at_once"]
    assert level["decode_together"] == pytest.approx(10)


def held(begun: float, at: float, tokens: int, events: int) -> Stream:
    """An answer whose events all arrived at once."""
    return Stream(begun=begun, arrivals=[at] * events, tokens=tokens, node="gpu01")


@pytest.mark.parametrize("events", [1, 11])
def test_an_answer_in_one_piece_among_others_counts_its_tokens_only(events: int) -> None:
    streams = [stream(0.0, 0.2, 0.1, 11), stream(0.0, 0.2, 0.1, 11), held(0.0, 0.9, 11, events)]
    assert client.check_wave(Server("127.0.0.1", 1, "m"), streams, 11) == streams
    level = summarize([streams])
    assert level["decode_per_stream"] == pytest.approx(10)
    assert level["decode_together"] == pytest.approx(30)
    assert level["output_rate"] == pytest.approx(33 / 1.2, abs=1e-3)
    assert level["itl_ms"]["median"] == pytest.approx(100)


def test_most_answers_in_one_piece_are_refused() -> None:
    streams = [stream(0.0, 0.2, 0.1, 11), held(0.0, 0.9, 11, 1), held(0.0, 0.9, 11, 1)]
    with pytest.raises(FleetError, match="2 failed; the first: the whole answer came in one piece"):
        client.check_wave(Server("127.0.0.1", 1, "m"), streams, 11)


def test_percentiles_are_interpolated() -> None:
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([float(each) for each in range(101)], 0.95) == 95.0


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (Counters(0, 100), Counters(0, 100 + 2 * 16 * 2 + 2 * 8), ""),
        (Counters(3, 100), Counters(3, 180), "3 requests of others ran already"),
        (Counters(0, 100), Counters(0, 260), "80 tokens went to others (100% of ours)"),
    ],
)
def test_traffic_of_others_is_said(before: Counters, after: Counters, words: str) -> None:
    assert client.other_traffic(before, after, LOAD, 4) == words


def test_counters_are_read_from_the_metrics() -> None:
    with serving(gap_s=0.001) as stub:
        before = client.read_counters([("0.0.0.0", stub.port)])
        level = client.measure(server(stub), LOAD, 2, salt="run")
        after = client.read_counters([("0.0.0.0", stub.port)])
    assert after.tokens - before.tokens == 2 * 2 * 16 + 2 * 8
    assert client.other_traffic(before, after, LOAD, level["requests"]) == ""


def test_numbers_of_which_no_figure_can_be_made_are_refused() -> None:
    good = {
        "nodes": 1,
        "rounds": 1,
        "prompt_tokens": 1,
        "output_tokens": 8,
        "warmup_tokens": 8,
        "streams": [1],
    }
    client.check_load(good)
    with pytest.raises(FleetError, match="output_tokens: 1, streams: 0"):
        client.check_load({**good, "output_tokens": 1, "streams": [1, 0]})


def make_level(streams: int, together: float, **changed: Any) -> dict[str, Any]:
    spread = {"median": 1.0, "p95": 2.0, "p99": 3.0}
    return {
        "streams": streams,
        "per_node": streams,
        "nodes": 1,
        "requests": streams,
        "decode_per_stream": together / streams,
        "decode_together": together,
        "output_rate": together,
        "all_at_once": True,
        "ttft_ms": spread,
        "itl_ms": spread,
        "answered_by": {},
        "other_traffic": "",
        **changed,
    }


def test_clients_stand_below_the_table() -> None:
    spread = {"median": 1509.4, "p95": 1800.0, "p99": 1990.0}
    clients = {"clients": 32, "requests": 237, "output_rate": 508.9, "request_ms": spread}
    answer = {"levels": [make_level(1, 56.0)], "clients": clients}
    target = judge_target("gpu01", NODE, answer, REFERENCE, 0.8)
    assert benchmark_json([target], {}, "now")["targets"][0]["clients"] == clients
    text = " ".join(line.text.strip() for line in render_benchmark([target], 200))
    assert "gpu01: 32 clients with short requests one after another: 508.9 tok/s" in text
    assert "1509 / 1800 / 1990 ms" in text
    assert judge_target("gpu01", NODE, {"levels": []}, REFERENCE, 0.8)["clients"] == {}


def test_a_node_below_the_ratio_is_warned_of_and_stands_beside_the_reference() -> None:
    answer = {
        "levels": [make_level(1, 56.0), make_level(8, 300.0), make_level(32, 312.5)],
        "running": {"release": "r1", "model": "m1"},
    }
    target = judge_target("gpu01", NODE, answer, REFERENCE, 0.8)
    assert [each["ratio"] for each in target["levels"]] == [1.0, None, 0.5]
    assert target["warnings"] == ["32 at once: 0.50 of the reference, 0.80 wanted"]
    assert (target["release"], target["error"]) == ("r1", "")
    lines = render_benchmark([target], 200)
    row = next(line for line in lines if "625" in line.text)
    assert row.tone == "warning"
    assert row.text.split()[:6] == ["gpu01", "32", "9.8", "312.5", "625", "0.50"]
    assert judge_target("gpu01", NODE, answer, REFERENCE, 0.4)["warnings"] == []


def test_through_a_gateway_the_reference_counts_for_each_node() -> None:
    level = make_level(96, 1500.0, per_node=32, nodes=3)
    target = judge_target("gw01", GATEWAY, {"levels": [level]}, REFERENCE, 0.8)
    assert (target["levels"][0]["reference"], target["levels"][0]["ratio"]) == (1875, 0.8)
    assert "through gw01" in render_benchmark([target], 200)[2].text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"unreachable": True, "msg": "no route"}, "no route"),
        ({"levels": [make_level(1, 56.0)], "problem": "it broke"}, "it broke"),
        ({}, "no answer"),
    ],
)
def test_a_target_that_was_not_measured_is_named(answer: dict[str, Any], words: str) -> None:
    target = judge_target("gpu02", NODE, answer, REFERENCE, 0.8)
    assert target["error"] == words
    assert f"gpu02 was not measured: {words}" in [
        line.text for line in render_benchmark([target], 200) if line.tone == "bad"
    ]
    report = benchmark_json([target], {"seed": 0}, "2026-11-22T10:00:00+00:00")
    assert report["schema"] == "glm-fleet/benchmark/1"
    assert report["summary"] == {"measured": 0, "warned": 0, "failed": 1}


def test_traffic_of_others_is_in_the_warnings() -> None:
    level = make_level(1, 56.0, other_traffic="2 requests of others ran already")
    target = judge_target("gpu01", NODE, {"levels": [level]}, REFERENCE, 0.8)
    assert target["warnings"] == [
        "other traffic counts in (1 at once: 2 requests of others ran already)"
    ]
