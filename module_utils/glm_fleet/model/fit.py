# SPDX-License-Identifier: Apache-2.0
"""Does a model fit the GPUs? Told by its config.json and the headers of its shards alone.

A header names every tensor of a shard with its place, so that a few small reads say what a GPU
will hold, before hundreds of gigabytes are fetched:

    weights = sharded / TP + replicated + absorbed copies of kv_b
    tokens  = (utilisation x memory of the GPU - weights - other) / KV cache of one token

The KV cache of MLA is the same on every GPU: a token takes its latent and rope part on each layer,
and a key of the indexer on each layer that has one. ``other`` is what a start takes beside both
(context of CUDA, NCCL, activations, graphs, logits), as measured with GLM-5.2 on 8 GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Callable, NoReturn, TypedDict

from ..core.decode import Count, Range, Size, decode, parse
from ..core.errors import FleetError
from ..core.format import parse_version
from .client import Client, UnreachableError
from .refusal import UnavailableError
from .source import LARGEST_SMALL, HubFile, Source, check_commit

# Bytes. Beside the workspace of the indexer, which grows with the context: see `_WORKSPACE`.
OTHER = int(4.3 * 2**30)
# The indexer gathers 40 bytes of 132 for each token of the longest context.
_WORKSPACE = 40 * 132
# What each GPU holds whole, whatever the tensor parallel size.
_REPLICATED = re.compile(r"\.(q_a_proj|kv_a_proj\w*|gate|\w*norm\w*)\.|norm\.weight$|_bias$")
_INDEXER = re.compile(r"\.layers\.(\d+)\.self_attn\.indexer\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# The first release that leaves the indexer out on the layers that share another's selection.
_SHARES_INDEXERS = "0.24"
# The first release that runs asymmetric INT4 experts (through Marlin).
_ASYMMETRIC_EXPERTS = "0.23"
_BF16 = 2
_SHARD = ".safetensors"
# A shard begins with the length of its header, in eight bytes.
_LENGTH = 8
_AT_ONCE = 8
# A key of the indexer is one byte a value, and a scale of four.
_SCALE = 4

Layers = Annotated[int, Range(1, 1000)]
Width = Annotated[int, Range(1, 2**20)]


class _Weights(TypedDict, total=False):
    symmetric: bool | None


class _Group(TypedDict, total=False):
    weights: _Weights | None


class _Quantisation(TypedDict, total=False):
    config_groups: Mapping[str, _Group]


class _Required(TypedDict):
    num_hidden_layers: Layers
    num_attention_heads: Width
    hidden_size: Width


class Config(_Required, total=False):
    """The part of a model's config.json that decides how much memory it takes."""

    num_key_value_heads: Width
    head_dim: Width | None
    kv_lora_rank: Width | None
    qk_rope_head_dim: Width
    qk_nope_head_dim: Width
    v_head_dim: Width
    index_topk: Width
    index_head_dim: Width
    index_topk_freq: Annotated[int, Range(1, 1000)] | None
    index_skip_topk_offset: Count | None
    index_topk_pattern: Annotated[str, Size(1000)] | None
    n_routed_experts: Count | None
    num_experts_per_tok: Count | None
    max_position_embeddings: Annotated[int, Range(1, 2**32)]
    quantization_config: _Quantisation | None


class ModelSize(TypedDict):
    """What is known of a model without its weights, in bytes.

    ``indexers`` are the bytes of each layer's indexer, by the layer's number: a release may leave
    some of them out. The layers of a draft model are in none of the three.
    """

    repository: str
    commit: str
    config: Config
    sharded: Count
    replicated: Count
    indexers: Annotated[Mapping[str, Count], Size(1000)]


class Tensor(TypedDict):
    """One tensor in the header of a shard: where it begins and ends, in bytes of the data."""

    data_offsets: tuple[Count, Count]


# A model that nobody could ask for: {}.
Unknown = Mapping[str, NoReturn]


@dataclass(frozen=True)
class Plan:
    """How it would be served: GPUs that share it, their memory in bytes, the longest context."""

    tensor_parallel: int
    gpu_bytes: int
    utilisation: float
    context: int
    release: str


@dataclass(frozen=True)
class Fit:
    """What one GPU would hold, in bytes, and the tokens that its KV cache takes.

    ``longest`` is the largest context that could be asked for.
    """

    weights: int
    other: int
    cache: int
    token: int
    tokens: int
    longest: int


def read_config(text: str | bytes, what: str) -> Config:
    """Return config.json; raises `FleetError`."""
    return parse(Config, text, what=what)


def read_header(text: str | bytes, what: str) -> dict[str, Tensor]:
    """Return the tensors that the header of a shard names; raises `FleetError`."""
    told = parse(dict[str, Any], text, what=what)
    return {
        name: decode(Tensor, value, what=f"{what}: {name[:120]}")
        for name, value in told.items()
        if name != "__metadata__"
    }


def read_size(value: Any) -> ModelSize | None:
    """Return what was told of a model, None for {}; raises `FleetError`."""
    return decode(ModelSize, value, what="The size of the model") if value else None


def measure(
    client: Client,
    source: Source,
    known: Callable[[str], ModelSize | None] = lambda _: None,
) -> ModelSize:
    """Ask the first hub that answers for config.json and the headers of all shards.

    ``known`` gives what was measured of a commit before: then only the commit is asked for.
    Raises `UnreachableError` when none answers, `FleetError` for an answer that cannot be used.
    """
    reasons = []
    for endpoint in source.endpoints:
        try:
            return _measure(client, source, endpoint, known)
        except UnavailableError as error:
            reasons.append(f"{endpoint}: {error}")
    raise UnreachableError(
        "No hub can be asked how large the model is",
        expected="an answer of one of model_endpoint and model_mirrors",
        found="; ".join(reasons) or "no endpoint",
    )


def _measure(
    client: Client, source: Source, endpoint: str, known: Callable[[str], ModelSize | None]
) -> ModelSize:
    commit, files = client.describe(endpoint, source.repository, source.revision)
    check_commit(source.revision, commit)
    found = known(commit)
    if found:
        return found
    listed = {each.path: each for each in files if source.selects(each.path)}
    shards = [each for each in listed.values() if each.path.endswith(_SHARD)]
    if "config.json" not in listed or not shards:
        raise FleetError(
            "The repository does not hold a model that vLLM loads",
            expected=f"config.json and files {_SHARD} in {source.repository}",
            found=f"{len(shards)} files {_SHARD}"
            + ("" if "config.json" in listed else ", and no config.json"),
            remedy="correct model_repository, or model_include and model_exclude",
        )

    def read(name: str, begin: int, end: int) -> bytes:
        blocks: list[bytes] = []
        client.download(endpoint, source.repository, commit, name, (begin, end), blocks.append)
        return b"".join(blocks)

    def header(shard: HubFile) -> dict[str, Tensor]:
        length = int.from_bytes(read(shard.path, 0, _LENGTH)[:_LENGTH], "little")
        if not 0 < length <= min(shard.size, LARGEST_SMALL):
            raise FleetError(
                "A shard of the model is damaged on the hub",
                expected=f"the length of its header at the beginning of {shard.path}",
                found=f"{length} bytes of {shard.size}",
                remedy="ask another endpoint, or choose another revision",
            )
        return read_header(
            read(shard.path, _LENGTH, _LENGTH + length), f"The header of {shard.path}"
        )

    config = read_config(
        read("config.json", 0, listed["config.json"].size), f"config.json of {source.repository}"
    )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        headers = list(pool.map(header, shards))
    return weigh(source.repository, commit, config, headers)


def weigh(
    repository: str, commit: str, config: Config, headers: Sequence[Mapping[str, Tensor]]
) -> ModelSize:
    """Sum up the tensors of all shards by what tensor parallelism does with them."""
    sharded = replicated = 0
    indexers: dict[str, int] = {}
    for header in headers:
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            size = max(0, end - begin)
            layer = _LAYER.search(name)
            if layer and int(layer[1]) >= config["num_hidden_layers"]:
                continue
            indexer = _INDEXER.search(name)
            if indexer:
                indexers[indexer[1]] = indexers.get(indexer[1], 0) + size
            elif _REPLICATED.search(name):
                replicated += size
            else:
                sharded += size
    return {
        "repository": repository,
        "commit": commit,
        "config": config,
        "sharded": sharded,
        "replicated": replicated,
        "indexers": indexers,
    }


def fit(size: ModelSize, plan: Plan) -> Fit:
    """Return what one GPU would hold; ``tokens`` is 0 where the weights alone are too much."""
    config = size["config"]
    indexed = indexed_layers(config, plan.release)
    weights = (
        size["sharded"] // plan.tensor_parallel
        + size["replicated"]
        + sum(size["indexers"].get(str(layer), 0) for layer in indexed)
        + _absorbed(config) // plan.tensor_parallel
    )
    token = _token_bytes(config, len(indexed), plan.tensor_parallel)
    workspace = _WORKSPACE if indexed else 0
    budget = int(plan.gpu_bytes * plan.utilisation)
    other = OTHER + workspace * plan.context
    cache = max(0, budget - weights - other)
    longest = max(0, budget - weights - OTHER) // (token + workspace)
    return Fit(
        weights=weights,
        other=other,
        cache=cache,
        token=token,
        tokens=cache // token,
        longest=min(longest, config.get("max_position_embeddings", longest)),
    )


def indexed_layers(config: Config, release: str) -> list[int]:
    """Return the layers that have an indexer, and its keys in the cache, under a release.

    A ref that is no version is taken for a new one.
    """
    layers = range(config["num_hidden_layers"])
    if not config.get("index_topk"):
        return []
    if not _reaches(release, _SHARES_INDEXERS):
        return list(layers)
    pattern = config.get("index_topk_pattern")
    if pattern:
        return [layer for layer in layers if pattern[layer : layer + 1] != "S"]
    every = config.get("index_topk_freq") or 1
    offset = config.get("index_skip_topk_offset")
    first = 2 if offset is None else offset
    return [layer for layer in layers if max(layer - first + 1, 0) % every == 0]


def unloadable(size: ModelSize, release: str) -> str:
    """Say why a release cannot load the model's quantisation; '' when it can."""
    config = size["config"]
    groups = ((config.get("quantization_config") or {}).get("config_groups") or {}).values()
    asymmetric = any((group.get("weights") or {}).get("symmetric") is False for group in groups)
    if asymmetric and config.get("n_routed_experts") and not _reaches(release, _ASYMMETRIC_EXPERTS):
        since = _ASYMMETRIC_EXPERTS
        return f"its experts are quantised asymmetrically, which vLLM loads from {since} on"
    return ""


def _absorbed(config: Config) -> int:
    """Bytes of the copies of kv_b that MLA multiplies into queries and results."""
    rank = config.get("kv_lora_rank") or 0
    widths = config.get("qk_nope_head_dim", 0) + config.get("v_head_dim", 0)
    return config["num_hidden_layers"] * config["num_attention_heads"] * widths * rank * _BF16


def _token_bytes(config: Config, indexed: int, tensor_parallel: int) -> int:
    layers, rank = config["num_hidden_layers"], config.get("kv_lora_rank")
    if rank:
        latent = layers * (rank + config.get("qk_rope_head_dim", 0)) * _BF16
        return latent + indexed * (config.get("index_head_dim", 0) + _SCALE)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    mine = max(1, config.get("num_key_value_heads", heads) // tensor_parallel)
    return max(1, layers * 2 * mine * width * _BF16)


def _reaches(release: str, version: str) -> bool:
    found = re.match(r"v?(\d+(?:\.\d+)+)", release)
    return not found or parse_version(found[1]) >= parse_version(version)
