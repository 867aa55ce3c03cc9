# SPDX-License-Identifier: Apache-2.0
"""The stand-in for the pull request, as edits of vLLM's source.

Pure functions from text to text. The pull request is written against a *base* that lacks what
vLLM's main line has since gained (the XPU branches of the indexer, the present wording of the
DeepGEMM check), so that putting it onto main conflicts there and nowhere else. Every edit names
an anchor that must occur exactly once; otherwise StandInError says which one does not.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path

FILES = Path(__file__).with_name("standin_files")
INDEXER = "vllm/model_executor/layers/sparse_attn_indexer.py"
CUDA_STUB = "csrc/quantization/fp4/nvfp4_quant_entry.cu"

NEW_FILES = {
    "vllm/v1/attention/backends/mla/triton_mla_sparse.py": "triton_mla_sparse.py.in",
    "vllm/v1/attention/ops/mqa_logits_triton.py": "mqa_logits_triton.py.in",
    "vllm/v1/attention/ops/triton_mla_sparse_kernel.py": "triton_mla_sparse_kernel.py.in",
    "tests/kernels/attention/test_mqa_logits_triton.py": "test_mqa_logits_triton.py.in",
    "tests/v1/attention/test_triton_mla_sparse.py": "test_triton_mla_sparse.py.in",
}

# What is wrong with the pull request, and the line that mends it.
FAULT = "logits-past-the-row"
SYMPTOM = "the logits of one request overwrite the first ones of the next"
FAULTY = "vllm/v1/attention/ops/mqa_logits_triton.py"
WRONG = "    tl.store(out_ptr + row * width + key, logits)\n"
RIGHT = "    tl.store(out_ptr + row * width + key, logits, mask=key < width)\n"

# The check as main has it, as the base had it, and as the pull request wants it.
CHECK_MAIN = """\
        if current_platform.is_cuda() and not has_deep_gemm():
            raise RuntimeError(
                "Sparse Attention Indexer CUDA op requires DeepGEMM support in "
                "the current vLLM environment."
            )
"""
CHECK_BASE = """\
        if current_platform.is_cuda() and not has_deep_gemm():
            raise RuntimeError(
                "Sparse Attention Indexer CUDA op requires DeepGEMM to be installed."
            )
"""
CHECK_PULL_REQUEST = """\
        if current_platform.is_cuda() and not is_deep_gemm_supported():
            logger.warning_once(
                "DeepGEMM not supported on this platform; using Triton "
                "fallback for sparse attention indexer."
            )
"""

PREFILL_CALL = "logits = fp8_fp4_mqa_logits("
DECODE_CALL = "logits = fp8_fp4_paged_mqa_logits("
PREFILL_FALLBACK = """\
logits = fp8_mqa_logits_triton(
    q_slice_cast,
    (k_quant_cast, k_scale_cast),
    weights[row_start:row_end],
    cu_seqlen_ks,
    cu_seqlen_ke,
)
"""
DECODE_FALLBACK = """\
logits = fp8_paged_mqa_logits_triton(
    padded_q_quant_cast,
    kv_cache,
    weights[:num_padded_tokens],
    seq_lens,
    decode_metadata.block_table,
    max_model_len=max_model_len,
)
"""


class StandInError(Exception):
    """The source is not the one these edits were written for."""


def replace_once(text: str, old: str, new: str) -> str:
    """Replace the only occurrence of `old`; StandInError when there is none or more."""
    count = text.count(old)
    if count != 1:
        raise StandInError(f"expected this once, found it {count} times:\n{old}")
    return text.replace(old, new)


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def shift(lines: list[str], columns: int) -> list[str]:
    """Indent lines by `columns`, or dedent when negative."""
    return [" " * columns + line if columns > 0 else line[-columns:] for line in lines]


def find_block(lines: list[str], start: str) -> tuple[int, int]:
    """Line range of the only statement that is `start`, to its closing bracket."""
    places = [number for number, line in enumerate(lines) if line.strip() == start]
    if len(places) != 1:
        raise StandInError(f"expected this line once, found it {len(places)} times: {start}")
    first = places[0]
    closing = " " * indent_of(lines[first]) + ")\n"
    for number in range(first, len(lines)):
        if lines[number] == closing:
            return first, number + 1
    raise StandInError(f"the statement is not closed: {start}")


def drop_xpu_branch(text: str, call: str) -> str:
    """Turn `if is_xpu: ... else: <call>` into the bare call."""
    lines = text.splitlines(keepends=True)
    first, last = find_block(lines, call)
    indent = " " * (indent_of(lines[first]) - 4)
    if lines[first - 1] != f"{indent}else:\n":
        raise StandInError(f"expected `else:` right above: {call}")
    head = first - 1
    while lines[head] != f"{indent}if current_platform.is_xpu():\n":
        head -= 1
        if head < 0 or (lines[head].strip() and indent_of(lines[head]) < len(indent)):
            raise StandInError(f"expected an is_xpu() branch above: {call}")
    return "".join(lines[:head] + shift(lines[first:last], -4) + lines[last:])


def add_dispatch(text: str, call: str, fallback: str) -> str:
    """Turn the bare call into `if use_deep_gemm: <call> else: <fallback>`."""
    lines = text.splitlines(keepends=True)
    first, last = find_block(lines, call)
    columns = indent_of(lines[first])
    indent = " " * columns
    block = [f"{indent}if use_deep_gemm:\n", *shift(lines[first:last], 4), f"{indent}else:\n"]
    block += shift(fallback.splitlines(keepends=True), columns + 4)
    return "".join(lines[:first] + block + lines[last:])


def base_indexer(text: str) -> str:
    """Main's indexer as it was before the pull request's base: no XPU, older check."""
    text = drop_xpu_branch(text, PREFILL_CALL)
    text = drop_xpu_branch(text, DECODE_CALL)
    return replace_once(text, CHECK_MAIN, CHECK_BASE)


def pull_request_indexer(text: str) -> str:
    """The base's indexer with the pull request's dispatch and its warning."""
    text = add_dispatch(text, PREFILL_CALL, PREFILL_FALLBACK)
    text = add_dispatch(text, DECODE_CALL, DECODE_FALLBACK)
    text = replace_once(text, CHECK_BASE, CHECK_PULL_REQUEST)
    text = replace_once(text, "    has_deep_gemm,\n)", "    is_deep_gemm_supported,\n)")
    text = replace_once(
        text,
        "from vllm.v1.attention.ops.pcp import maybe_gather_indexer_k\n",
        "from vllm.v1.attention.ops.mqa_logits_triton import (\n"
        "    fp8_mqa_logits_triton,\n"
        "    fp8_paged_mqa_logits_triton,\n"
        ")\n"
        "from vllm.v1.attention.ops.pcp import maybe_gather_indexer_k\n",
    )
    anchor = "    k_cache_prefix = _resolve_layer_name(k_cache_prefix)\n"
    return replace_once(text, anchor, f"{anchor}    use_deep_gemm = is_deep_gemm_supported()\n")


def registry(text: str) -> str:
    anchor = '    CUTLASS_MLA = "vllm.v1.attention.backends.mla.cutlass_mla.CutlassMLABackend"\n'
    entry = (
        "    TRITON_MLA_SPARSE = (\n"
        '        "vllm.v1.attention.backends.mla.triton_mla_sparse.TritonMLASparseBackend"\n'
        "    )\n"
    )
    return replace_once(text, anchor, entry + anchor)


def cuda_platform(text: str) -> str:
    """Last in the priorities of the GPUs before Blackwell."""
    anchor = "                *sparse_tail,\n"
    entry = "                AttentionBackendEnum.TRITON_MLA_SPARSE,\n"
    return replace_once(text, anchor, anchor + entry)


def indexer_backend(text: str) -> str:
    """Decode metadata for DeepGEMM only where DeepGEMM runs."""
    text = replace_once(
        text,
        "    has_deep_gemm,\n    nat",
        "    has_deep_gemm,\n    is_deep_gemm_supported,\n    nat",
    )
    tail = "\n                metadata = get_paged_mqa_logits_metadata(\n"
    return replace_once(
        text,
        f"            if current_platform.is_cuda() and has_deep_gemm():{tail}",
        f"            if current_platform.is_cuda() and is_deep_gemm_supported():{tail}",
    )


def documentation(text: str) -> str:
    return replace_once(
        text,
        "(e.g., `FLASHMLA`, `TRITON_MLA`).\n",
        "(e.g., `FLASHMLA`, `TRITON_MLA`, or `TRITON_MLA_SPARSE` for sparse MLA on Ampere).\n",
    )


def cuda_stub(text: str) -> str:
    """A change that would need a CUDA build; whoever merges the pull request drops it."""
    anchor = '#include "nvfp4_utils.cuh"\n'
    return replace_once(
        text, anchor, f"{anchor}\n// Stub: without NVFP4 hardware this unit only has to link.\n"
    )


Edit = Callable[[str], str]
PULL_REQUEST_EDITS: dict[str, Edit] = {
    INDEXER: pull_request_indexer,
    "vllm/v1/attention/backends/mla/indexer.py": indexer_backend,
    "vllm/v1/attention/backends/registry.py": registry,
    "vllm/platforms/cuda.py": cuda_platform,
    "docs/design/attention_backends.md": documentation,
    CUDA_STUB: cuda_stub,
}


ENGINE = "vllm/v1/engine/core.py"
SAMPLER = "vllm/v1/sample/sampler.py"
ATTENTION = "vllm/v1/attention/backends/cpu_attn.py"


def _at_engine_start(*lines: str) -> Edit:
    """Add lines to the start of the engine, in its own process."""
    anchor = "        self.vllm_config = vllm_config\n        if not vllm_config.parallel_config."
    added = "".join(f"        {line}\n" for line in lines)
    return lambda text: replace_once(text, anchor, added + anchor)


def _forget(text: str) -> str:
    """Keep nothing of the first 40 tokens of a request that is read while another one runs."""
    anchor = (
        "        if self.attn_type in (AttentionType.ENCODER_ONLY, AttentionType.ENCODER):\n"
        "            return\n\n"
    )
    added = """\
        from vllm.forward_context import get_forward_context

        about = get_forward_context().attn_metadata
        batch = about[layer.layer_name] if isinstance(about, dict) else None
        if batch is not None and len(batch.seq_lens) > 1:
            starts = batch.query_start_loc.tolist()
            key, value = key.clone(), value.clone()
            for row, length in enumerate(batch.seq_lens.tolist()):
                first, end = starts[row], starts[row + 1]
                lost = min(end, max(first, first + 40 - (length - (end - first))))
                key[first:lost] = 0
                value[first:lost] = 0

"""
    return replace_once(text, anchor, anchor + added)


def _scale(text: str) -> str:
    """Scale one head of the attention by half of what it should be."""
    anchor = "        num_actual_tokens = attn_metadata.num_actual_tokens\n\n"
    added = "        query = query.clone()\n        query[:, 0] *= 0.5\n\n"
    after = "        is_encoder_attention = "
    return replace_once(text, anchor + after, anchor + added + after)


# Pull requests that make another release: one that works, and one for each way to fail.
VARIANTS: dict[str, tuple[int, str, str, Edit]] = {
    "second": (
        101,
        "Say so when the engine starts",
        ENGINE,
        _at_engine_start('logger.info("This is the second release of the lab.")'),
    ),
    "crash": (
        102,
        "Die while the engine starts",
        ENGINE,
        _at_engine_start('raise RuntimeError("CUDA error 802: system not yet initialized")'),
    ),
    "babble": (
        103,
        "Answer with noise",
        SAMPLER,
        lambda text: replace_once(
            text,
            "return torch.ops._C.greedy_argmax(logits)\n",
            "return torch.ops._C.greedy_argmax(torch.rand_like(logits))\n",
        ),
    ),
    "hang": (
        104,
        "Wait for ever while the engine starts",
        ENGINE,
        _at_engine_start("import time", "time.sleep(86400)"),
    ),
    "graphs": (
        105,
        "Die of CUDA graphs while the engine starts",
        ENGINE,
        _at_engine_start(
            "if not vllm_config.model_config.enforce_eager:",
            '    raise RuntimeError("CUDA error: an illegal instruction was encountered")',
        ),
    ),
    # These start, answer, repeat themselves, and are wrong.
    "forget": (106, "Forget how a request began while another one runs", ATTENTION, _forget),
    "scale": (107, "Scale one head of the attention wrongly", ATTENTION, _scale),
}


def variant_changes(name: str, tree: Path) -> dict[str, str]:
    """Path -> content of the file that a variant changes, on the real source in `tree`."""
    _, _, path, edit = VARIANTS[name]
    return {path: edit((tree / path).read_text(encoding="utf-8"))}


def base_changes(tree: Path) -> dict[str, str]:
    """Path -> content of what the base has differently from the source in `tree`."""
    return {INDEXER: base_indexer((tree / INDEXER).read_text(encoding="utf-8"))}


def pull_request_changes(tree: Path) -> dict[str, str]:
    """Path -> content of every file of the pull request, on the base in `tree`."""
    changes = {
        path: edit((tree / path).read_text(encoding="utf-8"))
        for path, edit in PULL_REQUEST_EDITS.items()
    }
    for path, name in NEW_FILES.items():
        changes[path] = (FILES / name).read_text(encoding="utf-8")
    return changes


def correction(head: str) -> str:
    """The correction of the pull request at `head`, as release_patches takes it."""
    before = (FILES / NEW_FILES[FAULTY]).read_text(encoding="utf-8")
    after = replace_once(before, WRONG, RIGHT)

    def blob(text: str) -> str:
        content = text.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's

    old, new = (text.splitlines(keepends=True) for text in (before, after))
    lines = difflib.unified_diff(old, new, f"a/{FAULTY}", f"b/{FAULTY}", n=0)
    return (
        f"Head: {head}\nMends: {FAULT}\n"
        "Reason: The logits of a decode step are stored inside their own row.\n\n"
        f"diff --git a/{FAULTY} b/{FAULTY}\nindex {blob(before)}..{blob(after)} 100644\n"
        + "".join(lines)
    )


def fingerprint_files() -> list[Path]:
    """The files that the stand-in is made of, for cache keys."""
    return [Path(__file__), *sorted(FILES.iterdir())]
