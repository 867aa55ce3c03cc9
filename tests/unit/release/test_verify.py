# SPDX-License-Identifier: Apache-2.0
"""Wrong merges of a small tree: each is caught, and by the check that names its kind."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Callable

import pytest
from glm_fleet.release.verify.model import FileVersions, SourceExpectations
from glm_fleet.release.verify.tree import verify_tree
from test_compiler import (
    BACKEND,
    BASE_FILES,
    ENTRY,
    EXPECT,
    KERNELS,
    MAIN_FILES,
    PULL_FILES,
    STUB,
    TRITON,
    XPU,
)
from test_merge import merge

IX = EXPECT.indexer
RIGHT = {
    **BASE_FILES,
    **{path: text for path, text in PULL_FILES.items() if path != STUB},
}


def joined() -> str:
    text = PULL_FILES[IX]
    for name in ("mqa_logits", "paged_mqa_logits"):
        xpu = XPU.replace("@NAME@", name).replace(
            "        else:\n", "        elif use_deep_gemm:\n"
        )
        text = text.replace(
            TRITON.replace("@NAME@", name),
            f"{xpu}\n        else:\n            logits = {name}_triton(q, k)",
        )
    return text


RIGHT[IX] = joined()


def outcome(
    folder: Path, result: dict[str, str], expect: SourceExpectations = EXPECT
) -> dict[str, str]:
    """Verify a result; return the failed checks with their detail."""
    before = {**BASE_FILES, **MAIN_FILES}
    head = {**BASE_FILES, **PULL_FILES}
    for path, text in result.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    paths = sorted({*before, *head, *result})
    changed = [path for path in paths if before.get(path) != result.get(path)]
    versions = []
    for path in paths:
        if path == STUB:
            continue
        texts = [source.get(path) for source in (before, BASE_FILES, head)]
        versions.append(FileVersions(path, 1, texts[0], texts[1], texts[2], result.get(path)))
    checks = verify_tree(
        folder,
        changed=changed,
        before={path: before.get(path) for path in changed},
        versions=versions,
        expectations=expect,
        merge=merge,
    )
    return {check.name: check.detail for check in checks if not check.passed}


def test_the_right_merge_passes(tmp_path: Path) -> None:
    assert outcome(tmp_path, RIGHT) == {}


def edit(path: str, old: str, new: str) -> Callable[[dict[str, str]], None]:
    def change(tree: dict[str, str]) -> None:
        assert old in tree[path], old
        tree[path] = tree[path].replace(old, new, 1)

    return change


def swap_fallbacks(tree: dict[str, str]) -> None:
    text = tree[IX].replace("= mqa_logits_triton(", "= @(")
    text = text.replace("= paged_mqa_logits_triton(", "= mqa_logits_triton(")
    tree[IX] = text.replace("= @(", "= paged_mqa_logits_triton(")


def move_fallback_down(tree: dict[str, str]) -> None:
    tail = "        else:\n            logits = mqa_logits_triton(q, k)\n"
    text = tree[IX].replace(tail, "", 1)
    anchor = "        ops.top_k(logits, num_rows)\n"
    tree[IX] = text.replace(anchor, anchor + tail.replace("else", "if k"), 1)


def drop_xpu(tree: dict[str, str]) -> None:
    start = tree[IX].index("        if current_platform.is_xpu():")
    end = tree[IX].index("        elif use_deep_gemm:")
    tree[IX] = tree[IX][:start] + tree[IX][end:].replace("elif", "if", 1)


def move_to_init(tree: dict[str, str]) -> None:
    line = "    use_deep_gemm = is_deep_gemm_supported()\n"
    anchor = "        self.k_cache = 1\n"
    tree[IX] = tree[IX].replace(line, "", 1).replace(anchor, f"{anchor}    {line}")


def move_in_kernel(tree: dict[str, str]) -> None:
    text = tree[KERNELS].replace("    return q\n", "", 1)
    tree[KERNELS] = text.replace("    return k\n", "    return q\n    return k\n").replace(
        "(q, k):\n\n", "(q, k):\n    pass\n\n"
    )


def keep_error(tree: dict[str, str]) -> None:
    tree[IX] = tree[IX].replace("logger.warning_once(", "raise RuntimeError(")


def add_file(path: str, text: str) -> Callable[[dict[str, str]], None]:
    return lambda tree: tree.update({path: text})


def remove_file(path: str) -> Callable[[dict[str, str]], None]:
    return lambda tree: tree.pop(path) and None


GUARD_Q = '            if q is None:\n                raise RuntimeError("no Q")\n'
MUTATIONS: dict[str, tuple[Callable[[dict[str, str]], None], str]] = {
    "a hunk one block too low": (move_fallback_down, "prefill_dispatch"),
    "a lost else": (
        edit(IX, "        else:\n            logits = paged_mqa_logits_triton(q, k)\n", ""),
        "decode_dispatch",
    ),
    "prefill and decode swapped": (swap_fallbacks, "prefill_dispatch"),
    "the XPU branch dropped": (drop_xpu, "prefill_dispatch"),
    "a line of the XPU branch lost": (edit(IX, GUARD_Q, ""), "nothing_else_changed"),
    "order reversed": (
        edit(IX, "elif use_deep_gemm:", "elif not use_deep_gemm:"),
        "prefill_dispatch",
    ),
    "elif became if": (edit(IX, "elif use_deep_gemm:", "if use_deep_gemm:"), "prefill_dispatch"),
    "the error kept": (keep_error, "no_deep_gemm_error"),
    "the warning lost": (
        edit(IX, "using Triton fallback", "going on"),
        "fallback_warning",
    ),
    "the support test lost": (
        edit(IX, "    use_deep_gemm = is_deep_gemm_supported()\n", ""),
        "no_undefined_names",
    ),
    "the support test made up": (
        edit(IX, "use_deep_gemm = is_deep_gemm_supported()", "use_deep_gemm = True"),
        "every_added_line_present",
    ),
    "an undefined helper": (
        edit(IX, "mqa_logits_triton(q, k)", "_helper(mqa_logits_triton(q, k))"),
        "no_undefined_names",
    ),
    "a changed line outside the hunks": (
        edit(IX, "self.k_cache = 1", "self.k_cache = 2"),
        "nothing_else_changed",
    ),
    "an inserted line outside the hunks": (
        edit(IX, "        q_padded = q\n", "        q_padded = q\n        q = k\n"),
        "nothing_else_changed",
    ),
    "a missing registry entry": (edit(EXPECT.registry, ENTRY, ""), "backend_registered"),
    "a registry entry without its class": (
        edit(EXPECT.registry, "SparseBackend", "OtherBackend"),
        "backend_registered",
    ),
    "a missing priority": (
        edit(EXPECT.priorities, f"AttentionBackendEnum.{EXPECT.backend},", ""),
        "backend_in_cuda_priorities",
    ),
    "a priority for Blackwell only": (
        lambda tree: tree.update(
            {
                EXPECT.priorities: BASE_FILES[EXPECT.priorities].replace(
                    "AttentionBackendEnum.TRITON_MLA,\n",
                    f"AttentionBackendEnum.TRITON_MLA,\n                "
                    f"AttentionBackendEnum.{EXPECT.backend},\n",
                    1,
                )
            }
        ),
        "backend_in_cuda_priorities",
    ),
    "a .cu left in": (add_file(STUB, PULL_FILES[STUB]), "only_python_tests_docs"),
    "a file of nobody": (add_file("vllm/extra.py", "a = 1\n"), "nothing_else_changed"),
    "a missing new file": (remove_file(KERNELS), "vllm_imports_exist"),
    "a new file that differs": (
        edit(BACKEND, "pass", "a = 1"),
        "nothing_else_changed",
    ),
    "a kernel renamed": (
        edit(KERNELS, "def paged_mqa_logits_triton", "def paged_logits_triton"),
        "vllm_imports_exist",
    ),
    "a marker left in": (
        edit(IX, "    if has_decode:\n", "<<<<<<< ours\n    if has_decode:\n"),
        "every_changed_file_compiles",
    ),
    "a hunk inside another function": (move_to_init, "no_undefined_names"),
    "a kernel's line inside another kernel": (move_in_kernel, "nothing_else_changed"),
    "another call in the fallback": (
        edit(IX, "mqa_logits_triton(q, k)", "mqa_logits_triton(k, q)"),
        "nothing_else_changed",
    ),
    "the call of DeepGEMM changed": (
        edit(IX, "clean=False", "clean=True"),
        "nothing_else_changed",
    ),
    "a fallback in no branch": (
        edit(
            IX,
            "        num_rows = logits.shape[0]\n",
            "        logits = mqa_logits_triton(q, k)\n        num_rows = logits.shape[0]\n",
        ),
        "nothing_else_changed",
    ),
    "a line that the release changed is back": (
        edit(
            IX,
            '                "DeepGEMM not',
            '                "DeepGEMM to be installed"\n                "DeepGEMM not',
        ),
        "nothing_else_changed",
    ),
    "the docs left out": (
        edit("docs/backends.md", "two\n", ""),
        "every_added_line_present",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_merges_are_caught(name: str, tmp_path: Path) -> None:
    change, check = MUTATIONS[name]
    tree = copy.copy(RIGHT)
    change(tree)
    failed = outcome(tmp_path, tree)
    assert check in failed, failed


def test_checks_of_another_pull_request(tmp_path: Path) -> None:
    assert outcome(tmp_path, RIGHT, replace(EXPECT, backend="")) == {}
