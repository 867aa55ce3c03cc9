# SPDX-License-Identifier: Apache-2.0
"""The stand-in pull request conflicts with main as the real one does."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from lab import standin

# The shape of vLLM's indexer, reduced to what the edits touch.
MAIN = (
    """\
from vllm.utils.deep_gemm import (
    fp8_fp4_mqa_logits,
    fp8_fp4_paged_mqa_logits,
    has_deep_gemm,
)
from vllm.v1.attention.ops.pcp import maybe_gather_indexer_k


def sparse_attn_indexer(q, kv_cache, k_cache_prefix, has_prefill, has_decode):
    k_cache_prefix = _resolve_layer_name(k_cache_prefix)
    metadata = get_metadata(k_cache_prefix)
    if has_prefill:
        for chunk in metadata.chunks:
            if chunk.empty:
                logits = None
            else:
                q_slice_cast = q
                if current_platform.is_xpu():
                    if q_scale_slice is not None:
                        raise RuntimeError("XPU does not support FP4 Q")
                    logits = torch.ops.vllm.xpu_fp8_mqa_logits(
                        q_slice_cast,
                        cu_seqlen_ks,
                    )
                else:
                    logits = fp8_fp4_mqa_logits(
                        (q_slice_cast, q_scale_slice),
                        (k_quant_cast, k_scale_cast),
                        weights[row_start:row_end],
                        cu_seqlen_ks,
                        cu_seqlen_ke,
                        clean_logits=False,
                    )
                num_rows = logits.shape[0]
                ops.top_k_per_row_prefill(logits, num_rows)
        # Conflicts that are three lines apart would become one.
        finish_prefill(metadata)
    if has_decode:
        seq_lens = metadata.seq_lens
        if current_platform.is_xpu():
            seq_lens_xpu = seq_lens[:, -1]
            logits = torch.ops.vllm.xpu_fp8_paged_mqa_logits(
                padded_q_quant_cast,
                seq_lens_xpu,
            )
        else:
            logits = fp8_fp4_paged_mqa_logits(
                (padded_q_quant_cast, padded_q_scale),
                kv_cache,
                weights[:num_padded_tokens],
                seq_lens,
                decode_metadata.block_table,
                max_model_len=max_model_len,
                clean_logits=False,
            )
        num_rows = logits.shape[0]
    return num_rows


class SparseAttnIndexer:
    def __init__(self):
        self.interleave = None
"""
    + standin.CHECK_MAIN
    + "\n        self.done = True\n"
)


def cherry_pick(folder: Path, main: str, base: str, pull_request: str) -> str:
    """The file after git put a commit on the base onto main, conflicts and all."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        settings = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        command = ["git", "-C", str(folder), *settings, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def commit(text: str) -> None:
        (folder / "indexer.py").write_text(text)
        assert git("add", "indexer.py").returncode == 0
        assert git("commit", "--quiet", "--message", "change").returncode == 0

    git("init", "--quiet", "--initial-branch=main")
    commit(base)
    git("checkout", "--quiet", "-b", "pull")
    commit(pull_request)
    git("checkout", "--quiet", "main")
    commit(main)
    assert git("cherry-pick", "pull").returncode != 0
    return (folder / "indexer.py").read_text()


def hunks(text: str) -> list[tuple[str, str]]:
    """(ours, theirs) of every conflict in a merged text."""
    pattern = r"<<<<<<< [^\n]*\n(.*?)=======\n(.*?)>>>>>>> "
    return [(match[1], match[2]) for match in re.finditer(pattern, text, re.DOTALL)]


def test_merging_gives_the_conflicts_of_the_real_pull_request(tmp_path: Path) -> None:
    base = standin.base_indexer(MAIN)
    found = hunks(cherry_pick(tmp_path, MAIN, base, standin.pull_request_indexer(base)))
    assert len(found) == 5
    for head, tail, call in (
        (0, 1, "fp8_mqa_logits_triton"),
        (2, 3, "fp8_paged_mqa_logits_triton"),
    ):
        ours, theirs = found[head]
        assert ours.strip().startswith("if current_platform.is_xpu():")
        assert ours.rstrip().endswith("else:")
        assert theirs.strip() == "if use_deep_gemm:"
        ours, theirs = found[tail]
        assert ours == ""
        assert theirs.strip().startswith("else:") and call in theirs
    ours, theirs = found[4]
    assert "RuntimeError" in ours and "warning_once" in theirs


def test_base_has_no_xpu_branch_and_parses() -> None:
    base = standin.base_indexer(MAIN)
    assert "xpu" not in base and standin.CHECK_BASE in base
    ast.parse(base)
    ast.parse(standin.pull_request_indexer(base))


def test_pull_request_uses_every_name_it_imports() -> None:
    text = standin.pull_request_indexer(standin.base_indexer(MAIN))
    for name in ("is_deep_gemm_supported", "fp8_mqa_logits_triton", "fp8_paged_mqa_logits_triton"):
        assert text.count(name) >= 2
    assert "has_deep_gemm" not in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("logits = fp8_fp4_mqa_logits(", "logits = something_else("),
        ("if current_platform.is_xpu():", "if current_platform.is_tpu():"),
        ("requires DeepGEMM support in", "wants DeepGEMM support in"),
    ],
)
def test_unknown_source_is_refused(old: str, new: str) -> None:
    with pytest.raises(standin.StandInError):
        standin.base_indexer(MAIN.replace(old, new))


def test_an_anchor_found_twice_is_refused() -> None:
    with pytest.raises(standin.StandInError, match="2 times"):
        standin.replace_once("a b a", "a", "c")


def test_new_files_are_python() -> None:
    for name in standin.NEW_FILES.values():
        ast.parse((standin.FILES / name).read_text())
    assert standin.CUDA_STUB.startswith("csrc/") and standin.CUDA_STUB.endswith(".cu")
