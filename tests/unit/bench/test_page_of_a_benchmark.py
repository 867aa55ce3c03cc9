# SPDX-License-Identifier: Apache-2.0
"""The roofline of a node, goodput, and the page of a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.bench import client
from glm_fleet.bench.client import Load
from glm_fleet.bench.page import is_before, render_page, view
from glm_fleet.bench.report import GATEWAY, NODE, Bounds, benchmark_json, goodput, judge_target
from glm_fleet.bench.roofline import Shape, limit, read_shape
from glm_fleet.bench.stream import Server

from tests.stub import serving

TEMPLATE = Path(__file__).resolve().parents[3] / "roles/benchmark/templates/benchmark.html.j2"
SETTINGS = {"prompt_tokens": 512, "output_tokens": 256}
SHAPE = Shape(
    sharded=8_000,
    replicated=100,
    experts=256_000,
    routed=256,
    chosen=8,
    token=10,
    key=2,
    attended=50,
)


def spread(value: float) -> dict[str, float]:
    return {"median": value, "p95": 2 * value, "p99": 3 * value}


def level(
    streams: int, rate: float, *, first: float = 100.0, between: float = 20.0
) -> dict[str, Any]:
    return {
        "streams": streams, "per_node": streams, "nodes": 1, "requests": 3 * streams,
        "decode_per_stream": rate / streams, "decode_together": rate, "output_rate": 0.9 * rate,
        "all_at_once": True, "ttft_ms": spread(first), "itl_ms": spread(between),
        "answered_by": {}, "other_traffic": "",
    }  # fmt: skip


def answer(release: str, speed: float) -> dict[str, Any]:
    """Return what a node's measurement says."""
    return {
        "running": {"release": release, "model": "m"},
        "levels": [level(n, speed * n**0.7, first=80.0 * n) for n in (1, 8, 32)],
        "prompts": [
            {"prompt_tokens": n, "cold": spread(n / 4), "warm": spread(n / 40)}
            for n in (4096, 16384)
        ],
        "shape": dict(vars(SHAPE)),
    }


def report(release: str, speed: float, **more: Any) -> dict[str, Any]:
    """Return the report of a node and a gateway."""
    bounds = Bounds(gpus=8, bytes_per_second=1e6, context=100)
    found = {**answer(release, speed), **more}
    targets = [
        judge_target("gpu01", NODE, found, {1: 56.0, 32: 625.0}, 0.8, bounds),
        judge_target("gw01", GATEWAY, {"msg": "it answers nothing <b>"}, {}, 0.8, bounds),
    ]
    return benchmark_json(targets, SETTINGS, "2026-01-01T00:00:00+00:00")


def test_the_roofline_is_bytes_over_bandwidth() -> None:
    # One stream: its share of 8 of 256 experts, and 50 of 100 tokens beside all keys.
    read = (8_000 + 8_000) / 8 + 100 + 50 * 8 + 100 * 2
    one = limit(SHAPE, streams=1, context=100, gpus=8, bytes_per_second=1e6)
    assert one == pytest.approx(1e6 / read)
    # Many streams touch nearly all experts, which they share.
    many = limit(SHAPE, streams=512, context=100, gpus=8, bytes_per_second=1e6)
    everything = (8_000 + 256_000) / 8 + 100
    assert many == pytest.approx(512e6 / (everything + 512 * 600), rel=1e-3)


def test_the_shape_is_read_from_a_model_on_the_disk(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 8, "kv_lora_rank": 16,
        "qk_rope_head_dim": 4, "index_topk": 2048, "index_head_dim": 28, "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    sizes = {
        "model.embed_tokens.weight": 1000,
        "model.layers.0.mlp.experts.0.up_proj.weight": 64,
        "model.layers.1.mlp.experts.7.up_proj.weight": 64,
        "model.layers.1.mlp.shared_experts.up_proj.weight": 32,
        "model.layers.0.self_attn.o_proj.weight": 16,
        "model.layers.0.input_layernorm.weight": 8,
        "model.layers.0.self_attn.indexer.wk.weight": 4,
        "lm_head.weight": 100,
        # A draft model, which plain decoding does not read.
        "model.layers.2.mlp.experts.0.up_proj.weight": 500,
    }
    header, at = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "I8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert read_shape(tmp_path) == Shape(
        sharded=32 + 16 + 100, replicated=8 + 4, experts=128, routed=8, chosen=2,
        token=2 * 20 * 2 + 2 * 32, key=2 * 32, attended=2048,
    )  # fmt: skip


def test_goodput_is_the_most_within_the_bounds() -> None:
    levels = [level(1, 50), level(8, 300), level(32, 600, first=1500), level(64, 700, between=90)]
    found = goodput(levels, Bounds(ttft_ms=2000, itl_ms=100))
    assert found == {"tokens_per_second": 270.0, "streams": 8}
    assert goodput(levels, Bounds(ttft_ms=1, itl_ms=1)) == {}


def test_a_prompt_is_asked_cold_and_then_warm() -> None:
    with serving(gap_s=0.001) as stub:
        server = Server("127.0.0.1", stub.port, "glm-5.2")
        load = Load(output_tokens=16, warmup_tokens=8, rounds=2)
        found = client.measure_prompt(server, load, 40, salt="run")
    assert (found["prompt_tokens"], set(found)) == (40, {"prompt_tokens", "cold", "warm"})
    asked = [(each["cache_salt"], each["prompt"]) for each in stub.bodies]
    assert asked[0] == asked[1]
    assert asked[2] == asked[3]
    assert asked[0] != asked[2]
    assert all(len(prompt) == 40 for _, prompt in asked)


def test_the_page_shows_both_releases_the_limit_and_goodput() -> None:
    now, before = report("new", 60), report("old", 50)
    assert is_before(before, now)
    assert not is_before(now, now)
    assert not is_before({}, now)
    together, *_, prompts = view(now, before)["charts"]
    assert [each["style"] for each in together["curves"]] == [
        "this",
        "before",
        "limit",
        "reference",
    ]
    assert [each["name"] for each in prompts["curves"]][:2] == [
        "prompt is new",
        "in the prefix cache",
    ]
    page = render_page(now, before, TEMPLATE)
    assert "goodput" in page
    assert "it answers nothing &lt;b&gt;" in page
    alone = view(now, {})["charts"][0]
    assert [each["style"] for each in alone["curves"]] == ["this", "limit", "reference"]


def test_a_report_without_figures_is_a_page_too() -> None:
    nothing = report("new", 60, levels=[], prompts=[], shape={}, problem="it hangs")
    page = render_page(nothing, {}, TEMPLATE)
    assert "No node was measured" in page
    assert "it hangs" in page
