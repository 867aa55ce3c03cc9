# SPDX-License-Identifier: Apache-2.0
"""What preflight says of a model that fits the GPUs, hardly fits, and does not."""

from __future__ import annotations

from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.health.hardware import ERROR, WARNING
from glm_fleet.health.memory import Memory, judge_memory
from test_preflight import make_gpu

MIB = 2**20
# 30 layers with keys and values of one head of 64 on each of two GPUs: 7,680 bytes a token.
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 1_000_000,
}
SIZE = {
    "repository": "owner/model",
    "commit": "a" * 40,
    "config": CONFIG,
    "sharded": 20_000 * MIB,
    "replicated": 100 * MIB,
    "indexers": {},
}


def record(*memory: int) -> dict[str, Any]:
    """A node with GPUs of so many MiB."""
    gpus = [{**make_gpu(index), "memory_total_mib": size} for index, size in enumerate(memory)]
    report = {"driver_version": "580.1", "gpus": gpus, "error": ""}
    return {"groups": ["gpu_nodes"], "node": {"gpu": report}}


def judged(*memory: int, **changed: Any) -> Memory:
    told = {
        "tensor_parallel": 2,
        "utilisation": 0.9,
        "context": "32768",
        "release": "v0.24.0",
        "size": SIZE,
        "unknown": "",
    }
    return judge_memory({"gpu01": record(*memory)}, {**told, **changed})


def test_a_model_that_fits_is_one_line_with_its_figures() -> None:
    found = judged(40960, 40960)
    assert found.problems == []
    # 0.9 x 40,960 - 10,000 - 100 - 4.3 x 1,024 MiB, in tokens of 7,680 bytes.
    assert found.figures["tokens"] == pytest.approx(3_053_000, rel=0.01)
    assert "9.9 GiB of weights" in found.line
    assert f"{found.figures['tokens']:,} tokens" in found.line


def test_the_smallest_gpu_decides() -> None:
    assert judged(40960, 24576).figures == judged(24576, 24576).figures


def test_a_context_that_cannot_be_had_is_an_error_that_names_the_largest() -> None:
    (problem,) = judged(24576, 24576, context="1300000").problems
    assert (problem.severity, problem.host) == (ERROR, "gpu01")
    longest = judged(24576, 24576).figures["longest"]
    assert f"lower serving_max_model_len to {longest:,} or less" in problem.remedy
    assert judged(24576, 24576, context=str(longest // 2)).problems == []


def test_what_the_estimate_cannot_tell_is_a_warning() -> None:
    longest = judged(24576, 24576).figures["longest"]
    (problem,) = judged(24576, 24576, context=str(longest + 100)).problems
    assert problem.severity == WARNING


def test_an_empty_context_is_the_models_own() -> None:
    (problem,) = judged(24576, 24576, context="").problems
    assert "1,000,000 tokens" in problem.expected


def test_weights_that_do_not_fit_at_all_need_more_gpus() -> None:
    (problem,) = judged(12288, 12288).problems
    assert "more GPUs" in problem.remedy


def test_an_unknown_size_is_a_warning_where_the_model_is_missing() -> None:
    told = {
        "tensor_parallel": 2,
        "utilisation": 0.9,
        "context": "32768",
        "release": "v0.24.0",
        "size": {},
        "unknown": "No hub can be asked: http://hub: refused",
    }
    assert judge_memory({"gpu01": record(81920)}, told).problems == []
    (problem,) = judge_memory({"gpu01": record(81920)}, told, ["gpu01"]).problems
    assert (problem.severity, problem.host) == (WARNING, "gpu01")
    assert "http://hub: refused" in problem.found


def test_a_quantisation_that_the_release_cannot_load_is_refused() -> None:
    groups = {"config_groups": {"group_0": {"weights": {"symmetric": False}}}}
    config = {**CONFIG, "n_routed_experts": 256, "quantization_config": groups}
    (problem,) = judged(40960, 40960, size={**SIZE, "config": config}, release="v0.22.1").problems
    assert "from 0.23 on" in problem.found


def test_settings_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(FleetError, match="utilisation"):
        judged(40960, utilisation=2.0)
