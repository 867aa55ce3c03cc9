# SPDX-License-Identifier: Apache-2.0
"""A pull request of our own on the real vLLM 0.21.0, with the shape of the real one.

Like the real one it guards the two calls of the indexer, warns where an error was, adds a
backend to the registry and to one list of priorities, and touches one page, two tests and a
`.cu` file. Its kernels do nothing. Every edit names an anchor that must occur once.
"""

from __future__ import annotations

from lab.standin import add_dispatch, replace_once

BASE = "0.21.0"
INDEXER = "vllm/model_executor/layers/sparse_attn_indexer.py"
DOCS = "docs/design/attention_backends.md"
STUB = "csrc/libtorch_stable/quantization/fp4/nvfp4_quant_entry.cu"

PREFILL_FALLBACK = """\
logits = fp8_mqa_logits_triton(
    q_slice_cast,
    (k_quant_cast, k_scale_cast),
    weights[chunk.token_start : chunk.token_end],
    chunk.cu_seqlen_ks,
    chunk.cu_seqlen_ke,
)
"""
DECODE_FALLBACK = """\
# A buffer for the longest request of the batch is enough.
longest = attn_metadata_narrowed.max_seq_len
logits = fp8_paged_mqa_logits_triton(
    padded_q_quant_cast,
    kv_cache,
    weights[:num_padded_tokens],
    seq_lens,
    decode_metadata.block_table,
    max_model_len=longest,
)
"""
ERROR = """\
        if current_platform.is_cuda() and not has_deep_gemm():
            raise RuntimeError(
                "Sparse Attention Indexer CUDA op requires DeepGEMM to be installed."
            )
"""
WARNING = """\
        # Older GPUs have no DeepGEMM: they take the Triton kernels.
        if current_platform.is_cuda() and not is_deep_gemm_supported():
            logger.warning_once(
                "DeepGEMM not supported on this platform; "
                "using Triton fallback for sparse attention indexer."
            )
"""
OPS = "from vllm.v1.attention.ops.common import pack_seq_triton, unpack_seq_triton\n"
IMPORTS = """\
from vllm.v1.attention.ops.mqa_logits_triton import (
    fp8_mqa_logits_triton,
    fp8_paged_mqa_logits_triton,
)
"""

NEW_FILES = {
    "vllm/v1/attention/ops/mqa_logits_triton.py": '''\
"""Stand-ins for the Triton kernels of the indexer."""

import torch


def fp8_mqa_logits_triton(q, kv, weights, starts, ends):
    return torch.zeros(q.shape[0], kv[0].shape[0])


def fp8_paged_mqa_logits_triton(q, cache, weights, lengths, table, max_model_len):
    return torch.zeros(q.shape[0], max_model_len)
''',
    "vllm/v1/attention/ops/triton_mla_sparse_kernel.py": '''\
"""A stand-in for the Triton kernel of the backend."""


def triton_mla_sparse_attention(q, cache, indices):
    return q
''',
    "vllm/v1/attention/backends/mla/triton_mla_sparse.py": '''\
"""A stand-in for the backend."""

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.ops.triton_mla_sparse_kernel import triton_mla_sparse_attention


class TritonMLASparseBackend(AttentionBackend):
    forward = staticmethod(triton_mla_sparse_attention)
''',
    "tests/kernels/attention/test_mqa_logits_triton.py": "def test_nothing():\n    pass\n",
    "tests/v1/attention/test_triton_mla_sparse.py": "def test_nothing():\n    pass\n",
}


def with_imports(text: str) -> str:
    text = replace_once(text, "    has_deep_gemm,\n)", "    is_deep_gemm_supported,\n)")
    return replace_once(text, OPS, OPS + IMPORTS)


def with_test(text: str, anchor: str) -> str:
    test = (
        "    use_deep_gemm = is_deep_gemm_supported()\n"
        "    if not use_deep_gemm:\n"
        '        assert not use_fp4_cache, "the fallback has no FP4 cache"\n'
    )
    return replace_once(text, anchor, anchor + test)


def indexer(text: str) -> str:
    for name, fallback in (("", PREFILL_FALLBACK), ("paged_", DECODE_FALLBACK)):
        text = add_dispatch(text, f"logits = fp8_fp4_{name}mqa_logits(", fallback)
    text = replace_once(text, ERROR, WARNING)
    anchor = "    topk_indices_buffer[: hidden_states.shape[0]] = -1\n"
    return with_test(with_imports(text), anchor)


def indexer_backend(text: str) -> str:
    text = replace_once(text, "    has_deep_gemm,\n)", "    is_deep_gemm_supported,\n)")
    return replace_once(text, "and has_deep_gemm():\n", "and is_deep_gemm_supported():\n")


def registry(text: str) -> str:
    anchor = '    CUTLASS_MLA = "vllm.v1.attention.backends.mla.cutlass_mla.CutlassMLABackend"\n'
    entry = (
        "    TRITON_MLA_SPARSE = (\n"
        '        "vllm.v1.attention.backends.mla.triton_mla_sparse.TritonMLASparseBackend"\n'
        "    )\n"
    )
    return replace_once(text, anchor, entry + anchor)


def priorities(text: str) -> str:
    before, after = (
        f"                AttentionBackendEnum.{name},\n"
        for name in ("TRITON_MLA", "FLASHMLA_SPARSE")
    )
    entry = "                AttentionBackendEnum.TRITON_MLA_SPARSE,\n"
    return replace_once(text, before + after, before + entry + after)


def documentation(text: str) -> str:
    anchor = "## Setting the Attention Backend\n"
    return replace_once(text, anchor, f"Older GPUs take `TRITON_MLA_SPARSE`.\n\n{anchor}")


def stub(text: str) -> str:
    anchor = '#include "nvfp4_utils.cuh"\n'
    return replace_once(text, anchor, anchor + "\n// Nothing to see here, and nothing to build.\n")


EDITS = {
    INDEXER: indexer,
    "vllm/v1/attention/backends/mla/indexer.py": indexer_backend,
    "vllm/v1/attention/backends/registry.py": registry,
    "vllm/platforms/cuda.py": priorities,
    DOCS: documentation,
    STUB: stub,
}
