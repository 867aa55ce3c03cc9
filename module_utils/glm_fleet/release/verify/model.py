# SPDX-License-Identifier: Apache-2.0
"""What is verified, and what is expected of it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.check import Check

# An `if`, a `raise RuntimeError(`, its message over some lines, and a `)`.
ERROR_LINES = 8
FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class FileVersions:
    """One file of one pull request; None where a version does not have it.

    ``before`` and ``after`` are the release without and with the pull request, ``base``
    and ``head`` the pull request's own beginning and end.
    """

    path: str
    pull: int
    before: str | None
    base: str | None
    head: str | None
    after: str | None


@dataclass(frozen=True)
class SourceExpectations:
    """What the result must have. An empty ``backend`` skips the checks about it."""

    backend: str = "TRITON_MLA_SPARSE"
    registry: str = "vllm/v1/attention/backends/registry.py"
    registry_class: str = "AttentionBackendEnum"
    priorities: str = "vllm/platforms/cuda.py"
    priorities_function: str = "_get_backend_priorities"
    capability_major: int = 8
    indexer: str = "vllm/model_executor/layers/sparse_attn_indexer.py"
    indexer_function: str = "sparse_attn_indexer"
    first_test: str = "current_platform.is_xpu()"
    second_test: str = "use_deep_gemm"
    support_call: str = "is_deep_gemm_supported"
    fallback_module: str = "vllm.v1.attention.ops.mqa_logits_triton"
    warning: str = "using Triton fallback"
    generated_modules: tuple[str, ...] = ("vllm._version",)
    allowed_folders: tuple[str, ...] = ("tests/", "docs/")


def make_check(name: str, problems: Sequence[str]) -> Check:
    more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
    return Check(name, not problems, "; ".join(problems[:10]) + more if problems else "ok")
