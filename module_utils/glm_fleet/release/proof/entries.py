# SPDX-License-Identifier: Apache-2.0
"""Which Triton kernels serving launches: functions of the release, and how they are called.

Data. An argument is a literal, or one of

    {"tensor": [dtype, [size, ...]]}    a size is a number or a name of `sizes`
    {"each": [value, ...]}              one call for each value
    {"tuple": [...]}, {"slice": [start, stop]}, {"namespace": {...}}, {"size": name}
    {"values": [dtype, [number, ...]]}  a small tensor on the CPU, whose values decide
    {"name": [module, "Class.member"]}  a name of the release

``releases`` is a half-open range of vLLM's versions. ``gate`` names a file of the release and an
attribute that it sets to a condition, or ``from MODULE`` for an import that it does under one.
Where that is false for the GPU, the kernel is not launched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

# From this version on some of the release's own kernels are called otherwise, and not listed yet.
UNLISTED = "0.28"

# Shapes of GLM-5.2 on one of 8 GPUs; release_model_shapes can say otherwise.
SHAPES = {
    "heads": 8,
    "latent": 512,
    "rope": 64,
    "topk": 2048,
    "index_heads": 32,
    "index_dim": 128,
    "block": 64,
    "max_model_len": 32768,
    "vocabulary": 154880,
    "sequences": 32,
    "batched_tokens": 2048,
    "cache_tokens": 179008,
}


@dataclass(frozen=True)
class Entry:
    """One way into the release that launches kernels."""

    name: str
    module: str
    function: str
    arguments: Mapping[str, Any]
    releases: tuple[str, str] = ("0", "")
    gate: tuple[str, str] = ("", "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sizes(shapes: Mapping[str, int]) -> dict[str, int]:
    """Return every size that the entries name, from the model's shapes."""
    found = {**SHAPES, **shapes}
    return {
        **found,
        "one": 1,
        "qk": found["latent"] + found["rope"],
        "blocks": found["cache_tokens"] // found["block"],
        "row_blocks": -(-found["max_model_len"] // found["block"]),
        "index_bytes": found["index_dim"] + 4,
        "sequences_1": found["sequences"] + 1,
        "logit_rows": 512,
        "logit_keys": 8192,
    }


def _tensor(dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"tensor": [dtype, list(shape)]}


_OPS = "vllm.v1.attention.ops"
_MLA = "vllm.v1.attention.backends.mla"
_INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"

_SPARSE_ATTENTION = Entry(
    "sparse attention",
    f"{_OPS}.triton_mla_sparse_kernel",
    "triton_mla_sparse_attention",
    {
        "q": _tensor("bfloat16", "sequences", "heads", "qk"),
        "kv": _tensor("bfloat16", "cache_tokens", 1, "qk"),
        "indices": _tensor("int32", "sequences", 1, "topk"),
        "sm_scale": 0.1,
        "num_kv_splits": {"each": [1, 2, 4, 8, 16]},
        "sm_count": 108,
    },
)
_PREFILL_LOGITS = Entry(
    "indexer's logits, prefill",
    f"{_OPS}.mqa_logits_triton",
    "fp8_mqa_logits_triton",
    {
        "q": _tensor("float8_e4m3fn", "logit_rows", "index_heads", "index_dim"),
        "kv": {
            "tuple": [
                _tensor("float8_e4m3fn", "logit_keys", "index_dim"),
                _tensor("float32", "logit_keys"),
            ]
        },
        "weights": _tensor("float32", "logit_rows", "index_heads"),
        "cu_seqlen_ks": _tensor("int32", "logit_rows"),
        "cu_seqlen_ke": _tensor("int32", "logit_rows"),
        "clean_logits": False,
    },
)
_DECODE_LOGITS = Entry(
    "indexer's logits, decode",
    f"{_OPS}.mqa_logits_triton",
    "fp8_paged_mqa_logits_triton",
    {
        "q": _tensor("float8_e4m3fn", "sequences", 1, "index_heads", "index_dim"),
        "kv_cache": _tensor("uint8", "blocks", "block", 1, "index_bytes"),
        "weights": _tensor("float32", "sequences", "index_heads"),
        "context_lens": _tensor("int32", "sequences", 1),
        "block_tables": _tensor("int32", "sequences", "row_blocks"),
        # Widths that Triton compiles apart: divisible by 16, not, and one.
        "max_model_len": {"each": [32768, 8191, 1]},
        "clean_logits": False,
    },
)
_GLOBAL_INDICES = Entry(
    "selected tokens to cache slots",
    f"{_MLA}.sparse_utils",
    "triton_convert_req_index_to_global_index",
    {
        "req_id": _tensor("int32", "batched_tokens"),
        "block_table": _tensor("int32", "sequences", "row_blocks"),
        "token_indices": _tensor("int32", "batched_tokens", "topk"),
        "BLOCK_SIZE": {"size": "block"},
        "NUM_TOPK_TOKENS": {"size": "topk"},
    },
    releases=("0", "0.29"),
)
_PREFILL_CHUNK = Entry(
    "indexer's metadata of a prefill",
    f"{_MLA}.indexer",
    "build_prefill_chunk_metadata",
    {
        "start_idx": 0,
        "end_idx": 2,
        "query_start_loc": _tensor("int32", 3),
        "query_start_loc_cpu": {"values": ["int32", [0, 100, 200]]},
        "uncompressed_seq_lens": _tensor("int32", 2),
        "compressed_seq_lens": _tensor("int32", 2),
        "compressed_seq_lens_cpu": {"values": ["int32", [100, 100]]},
        "block_table": _tensor("int32", 2, "row_blocks"),
        "compress_ratio": 1,
        "query_slice": {"slice": [0, 200]},
    },
    releases=("0", "0.29"),
)
_BLOCK_TABLE: dict[str, Any] = {
    "pcp_world_size": 1,
    "pcp_rank": 0,
    "dcp_world_size": 1,
    "dcp_rank": 0,
    "max_num_batched_tokens": {"size": "batched_tokens"},
    "block_table": {"namespace": {"gpu": _tensor("int32", "sequences", "row_blocks")}},
    "block_size": {"size": "block"},
    "kv_cache_block_size": {"size": "block"},
    "blocks_per_kv_block": 1,
    "slot_mapping": {"namespace": {"gpu": _tensor("int64", "batched_tokens")}},
    "cp_kv_cache_interleave_size": 1,
}
_SLOTS = Entry(
    "slots of new tokens",
    "vllm.v1.worker.block_table",
    "BlockTable.compute_slot_mapping",
    {
        "self": {"namespace": _BLOCK_TABLE},
        "num_reqs": {"size": "sequences"},
        "query_start_loc": _tensor("int32", "sequences_1"),
        "positions": _tensor("int64", "batched_tokens"),
    },
    releases=("0", "0.26"),
)
# From 0.26 on a table can also be one that maps no tokens.
_MODE = {"name": ["vllm.v1.worker.block_table", "SlotMappingMode.TOKEN_TO_KV_SLOT"]}
_SLOTS_BY_MODE = replace(
    _SLOTS,
    arguments={
        **_SLOTS.arguments,
        "self": {"namespace": {**_BLOCK_TABLE, "slot_mapping_mode": _MODE}},
    },
    releases=("0.26", "0.29"),
)
_TOP_K_TOP_P = Entry(
    "sampling by top-k and top-p",
    "vllm.v1.sample.ops.topk_topp_triton",
    "apply_top_k_top_p_triton",
    {
        "logits": _tensor("float32", "sequences", "vocabulary"),
        "k": _tensor("int32", "sequences"),
        "p": _tensor("float32", "sequences"),
    },
    releases=("0", UNLISTED),
)
_FUSED_INDEXER_Q = Entry(
    "indexer's queries, rotated and quantised",
    _INDEXER,
    "fused_indexer_q_rope_quant",
    {
        "positions": _tensor("int64", "batched_tokens"),
        "q": _tensor("bfloat16", "batched_tokens", "index_heads", "index_dim"),
        "cos_sin_cache": _tensor("bfloat16", "max_model_len", "rope"),
        "weights": _tensor("bfloat16", "batched_tokens", "index_heads"),
        "softmax_scale": 0.1,
        "head_scale": 0.1,
        "is_neox": False,
    },
    releases=("0.25", ""),
    gate=("vllm/model_executor/models/deepseek_v2.py", "use_fused_indexer_q"),
)
# From 0.29 on GLM-5.2 has a model of its own on CUDA.
_FUSED_Q = Entry(
    "queries of attention and indexer, rotated and quantised",
    "vllm.models.deepseek_v32.common.kernels",
    "fused_q",
    {
        "positions": _tensor("int64", "batched_tokens"),
        "q_pe": _tensor("bfloat16", "batched_tokens", "heads", "rope"),
        "q_pe_cos_sin_cache": _tensor("bfloat16", "max_model_len", "rope"),
        "index_q": _tensor("bfloat16", "batched_tokens", "index_heads", "index_dim"),
        "index_q_cos_sin_cache": _tensor("bfloat16", "max_model_len", "rope"),
        "ql_nope": _tensor("bfloat16", "batched_tokens", "heads", "latent"),
        "q_scale": _tensor("float32", 1),
        "index_weights": _tensor("bfloat16", "batched_tokens", "index_heads"),
        "index_weights_softmax_scale": 0.1,
        "index_weights_head_scale": 0.1,
        "has_indexer": True,
        "index_rope_interleave": False,
        "quantize_mqa": False,
    },
    releases=("0.29", ""),
    gate=("vllm/models/deepseek_v32/__init__.py", "from .nvidia.model"),
)

_OF_PULL_REQUEST = (_SPARSE_ATTENTION, _PREFILL_LOGITS, _DECODE_LOGITS)
BACKENDS: dict[str, tuple[Entry, ...]] = {
    "TRITON_MLA_SPARSE": (
        *_OF_PULL_REQUEST,
        _GLOBAL_INDICES,
        _PREFILL_CHUNK,
        _SLOTS,
        _SLOTS_BY_MODE,
        _TOP_K_TOP_P,
        _FUSED_INDEXER_Q,
        _FUSED_Q,
    ),
}


def entries_for(backend: str, version: str) -> list[Entry]:
    """Return the entries of a backend in one version of vLLM, such as ``0.24.0``.

    A build for the CPU (``0.32.0+cpu``) has the pull request's kernels, and never takes the
    release's own ones for CUDA.
    """
    cpu = "cpu" in version.partition("+")[2].split(".")
    return [
        entry
        for entry in BACKENDS.get(backend, ())
        if (not cpu or entry in _OF_PULL_REQUEST)
        and _key(entry.releases[0]) <= _key(version)
        and (not entry.releases[1] or _key(version) < _key(entry.releases[1]))
    ]


def is_listed(version: str) -> bool:
    """Tell whether the entries hold all of the release's own kernels, or some of them."""
    return _key(version) < _key(UNLISTED)


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdigit())
