# SPDX-License-Identifier: Apache-2.0
"""Does a model fit? GLM-5.2's real shapes against figures that others measured, and a real hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.model.client import HubClient, UnreachableError
from glm_fleet.model.fit import (
    Config,
    ModelSize,
    Plan,
    Tensor,
    fit,
    indexed_layers,
    measure,
    read_config,
    unloadable,
    weigh,
)
from glm_fleet.model.source import Source

from lab import hub
from lab.model import LAYERS, safetensors, shapes, text_files

GIB = 2**30
HIDDEN, EXPERT, VOCABULARY, LAYERS_OF_GLM = 6144, 2048, 154880, 78
GLM: Config = {
    "num_hidden_layers": LAYERS_OF_GLM,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "hidden_size": HIDDEN,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "n_routed_experts": 256,
    "max_position_embeddings": 1048576,
    "quantization_config": {"config_groups": {"group_0": {"weights": {"symmetric": False}}}},
}
# Of an A100 80GB's memory, as nvidia-smi tells it.
A100 = int(79.2 * GIB)


def int4(rows: int, columns: int) -> int:
    """Bytes of a matrix in INT4: values, and a scale and a zero for each group of 32."""
    return rows * columns // 2 + rows * columns // 32 * 2 + rows * columns // 64


def glm_header(layers: int = LAYERS_OF_GLM) -> dict[str, Tensor]:
    """The tensors of GLM-5.2 in INT4, summed up by what they are."""
    header: dict[str, Tensor] = {}
    end = 0

    def add(name: str, size: int) -> None:
        nonlocal end
        header[name] = {"data_offsets": (end, end + size)}
        end += size

    add("model.embed_tokens.weight", VOCABULARY * HIDDEN * 2)
    add("lm_head.weight", VOCABULARY * HIDDEN * 2)
    for layer in range(layers):
        attention = f"model.layers.{layer}.self_attn"
        add(f"{attention}.q_a_proj.weight_packed", int4(HIDDEN, 2048))
        add(f"{attention}.kv_a_proj_with_mqa.weight_packed", int4(HIDDEN, 576))
        add(f"{attention}.q_b_proj.weight_packed", int4(2048, 64 * 256))
        add(f"{attention}.kv_b_proj.weight_packed", int4(512, 64 * 448))
        add(f"{attention}.o_proj.weight_packed", int4(64 * 256, HIDDEN))
        add(f"{attention}.indexer.wq_b.weight", 2048 * 32 * 128 * 2)
        add(f"{attention}.indexer.wk.weight", HIDDEN * 128 * 2)
        add(f"model.layers.{layer}.input_layernorm.weight", HIDDEN * 2)
        if layer < 3:
            add(f"model.layers.{layer}.mlp.up_proj.weight_packed", 3 * int4(HIDDEN, 12288))
            continue
        add(f"model.layers.{layer}.mlp.gate.weight", 256 * HIDDEN * 2)
        add(f"model.layers.{layer}.mlp.experts.0.up_proj.weight", 257 * 3 * int4(HIDDEN, EXPERT))
    return header


def glm(layers: int = LAYERS_OF_GLM) -> ModelSize:
    return weigh("owner/glm", "c" * 40, GLM, [glm_header(layers)])


def plan(**changed: Any) -> Plan:
    values: dict[str, Any] = {
        "tensor_parallel": 8,
        "gpu_bytes": A100,
        "utilisation": 0.9,
        "context": 32768,
        "release": "v0.24.0",
    }
    return Plan(**{**values, **changed})


def test_glm_on_eight_gpus_is_what_others_measured() -> None:
    # 51.25 GiB of weights, 15.45 GiB of cache, 179,008 tokens.
    found = fit(glm(), plan())
    assert found.weights / GIB == pytest.approx(51.25, rel=0.02)
    assert found.cache / GIB == pytest.approx(15.45, rel=0.04)
    assert found.tokens == pytest.approx(179_008, rel=0.04)
    # Measured: 92,673 bytes a token, and 100,152 where every layer has an indexer.
    assert found.token == 92_628
    assert fit(glm(), plan(release="v0.23.0")).token == 100_152


def test_the_largest_context_fits_and_no_larger_one() -> None:
    longest = fit(glm(), plan()).longest
    assert fit(glm(), plan(context=longest)).tokens >= longest
    more = fit(glm(), plan(context=longest + 1000))
    assert more.tokens < longest + 1000


def test_weights_that_are_too_much_leave_no_token() -> None:
    found = fit(glm(), plan(tensor_parallel=4))
    assert (found.cache, found.tokens, found.longest) == (0, 0, 0)


def test_layers_of_a_draft_model_are_not_loaded() -> None:
    assert fit(glm(LAYERS_OF_GLM + 1), plan()) == fit(glm(), plan())


@pytest.mark.parametrize(
    ("release", "layers"),
    [("v0.23.0", 78), ("v0.24.0", 21), ("v0.33.0", 21), ("main", 21)],
)
def test_later_releases_share_indexers_between_layers(release: str, layers: int) -> None:
    assert len(indexed_layers(GLM, release)) == layers


def test_a_pattern_names_the_layers_that_share() -> None:
    config: Config = {**GLM, "num_hidden_layers": 4, "index_topk_pattern": "FSSF"}
    assert indexed_layers(config, "v0.24.0") == [0, 3]


def test_asymmetric_experts_need_a_release_that_loads_them() -> None:
    assert "from 0.23 on" in unloadable(glm(), "v0.22.1")
    assert unloadable(glm(), "v0.23.0") == ""
    dense: ModelSize = {**glm(), "config": {**GLM, "n_routed_experts": 0}}
    assert unloadable(dense, "v0.22.1") == ""


# -- A real hub, with its own client -----------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub with the lab's model: (endpoint, faults)."""
    folder = tmp_path / "hub/lab/tiny"
    tree = folder / "revisions" / ("a" * 40)
    tree.mkdir(parents=True)
    for name, content in text_files().items():
        (tree / name).write_bytes(content)
    halves = sorted(shapes().items())[::2], sorted(shapes().items())[1::2]
    for number, half in enumerate(halves):
        tensors = {}
        for name, shape in half:
            count = 1
            for each in shape:
                count *= each
            tensors[name] = (shape, bytes(2 * count))
        (tree / f"model-{number}.safetensors").write_bytes(safetensors(tensors))
    (folder / "refs.json").write_text(json.dumps({"main": "a" * 40}))
    faults = tmp_path / "faults.json"
    with hub.serving(tmp_path / "hub", faults) as endpoint:
        yield endpoint, faults


def test_a_hub_tells_the_size_without_the_weights(served: tuple[str, Path]) -> None:
    size = measure(HubClient(""), Source("lab/tiny", "main", ("http://hub.invalid", served[0])))
    count = 0
    for shape in shapes().values():
        product = 1
        for each in shape:
            product *= each
        count += product
    assert size["sharded"] + size["replicated"] == 2 * count
    assert size["config"]["num_hidden_layers"] == LAYERS
    found = fit(size, plan(tensor_parallel=1))
    # Two layers, key and value of two heads of 64 in two bytes.
    assert found.token == 2 * 2 * 2 * 64 * 2


def test_a_commit_that_is_known_is_not_measured_again(
    served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("lab/tiny", "main", (served[0],))
    size = measure(HubClient(""), source)
    read: list[str] = []
    monkeypatch.setattr(HubClient, "download", lambda *asked: read.append(asked[4]))
    assert measure(HubClient(""), source, {size["commit"]: size}.get) == size
    assert read == []
    with pytest.raises(FleetError):
        measure(HubClient(""), source, {"b" * 40: size}.get)
    assert read[0] == "config.json"


@pytest.mark.parametrize(
    ("faults", "problem"),
    [
        ({"down": True}, "No hub can be asked how large the model is"),
        ({"gated": []}, "does not let us read"),
    ],
)
def test_a_hub_that_does_not_tell_is_named(
    served: tuple[str, Path], faults: dict[str, Any], problem: str
) -> None:
    served[1].write_text(json.dumps(faults))
    with pytest.raises(FleetError, match=problem):
        measure(HubClient(""), Source("lab/tiny", "main", (served[0],)))


def test_no_endpoint_is_no_size() -> None:
    with pytest.raises(UnreachableError):
        measure(HubClient(""), Source("lab/tiny", "main", ()))


def test_a_selection_without_shards_is_refused(served: tuple[str, Path]) -> None:
    source = Source("lab/tiny", "main", (served[0],), exclude=("*.safetensors",))
    with pytest.raises(FleetError, match="does not hold a model"):
        measure(HubClient(""), source)


def test_a_config_that_is_none_is_refused() -> None:
    with pytest.raises(FleetError, match="num_hidden_layers"):
        read_config(b"{}", "config.json")
