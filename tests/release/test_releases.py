# SPDX-License-Identifier: Apache-2.0
"""The pull request on vLLM's real releases: what git makes of it, and what the compiler."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import run_program
from glm_fleet.release.compiler import Compiler, Patched
from glm_fleet.release.conflict import Join
from glm_fleet.release.git import PullRequest, Repository
from glm_fleet.release.merge import Resolver
from glm_fleet.release.recorded import read_resolution
from glm_fleet.release.verify.model import SourceExpectations

from lab.standin import replace_once, shift

from .conftest import RELEASES, Upstream, say
from .standin import (
    DECODE_FALLBACK,
    IMPORTS,
    INDEXER,
    OPS,
    PREFILL_FALLBACK,
    STUB,
    WARNING,
    with_test,
)

pytestmark = pytest.mark.release

CUDA = "vllm/platforms/cuda.py"
BACKEND = "vllm/v1/attention/backends/mla/indexer.py"
DISPATCH = {"dispatch-join": 2}
LATER = {**DISPATCH, "warn-instead-of-error": 1}
GREW = "dispatch-join without indices"
MOVED = {**LATER, "addition-after-change": 1, "two-additions": 1}
REWRITTEN = {**MOVED, "dispatch-join": 1, GREW: 1, "replaced-in-tree": 2}


@dataclass(frozen=True)
class Row:
    """What git leaves (file -> conflicts), and the rules that resolve it; None: refused."""

    conflicts: dict[str, int]
    rules: dict[str, int] | None


TABLE = {
    "0.20.2": Row({}, {}),
    "0.21.0": Row({}, {}),
    "0.22.0": Row({INDEXER: 4}, DISPATCH),
    "0.22.1": Row({INDEXER: 4}, DISPATCH),
    "0.23.0": Row({INDEXER: 4}, DISPATCH),
    "0.24.0": Row({INDEXER: 5}, LATER),
    "0.25.1": Row({INDEXER: 5, CUDA: 1}, MOVED),
    "0.26.0": Row({INDEXER: 5, CUDA: 1}, MOVED),
    "0.27.1": Row({INDEXER: 5, CUDA: 1}, MOVED),
    "0.28.0": Row({INDEXER: 5, CUDA: 1, BACKEND: 2}, REWRITTEN),
    "0.33.0": Row({INDEXER: 6, CUDA: 1, BACKEND: 2, STUB: 0}, None),
}


@dataclass(frozen=True)
class Outcome:
    """What the compiler said of one release."""

    patched: Patched | None
    error: FleetError | None
    folder: Path

    def text(self, path: str) -> str:
        return (self.folder / path).read_text()


def compile_release(
    upstream: Upstream, folder: Path, version: str, *resolutions: Path
) -> tuple[Patched, Path]:
    repository = Repository(f"file://{upstream.path}", folder / "cache", run_program)
    pulls = [PullRequest(38476, upstream.head, ("csrc",))]
    resolved = repository.resolve(f"v{version}", pulls)
    repository.fetch(resolved, pulls)
    recorded = tuple(read_resolution(file) for file in resolutions)
    compiler = Compiler(repository, Resolver(), SourceExpectations(), recorded)
    dest = folder / f"patch-{version}"
    return compiler.build(resolved, pulls, dest=dest), dest


@pytest.fixture(scope="session")
def outcomes(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("compiler")
    found = {}
    for version in RELEASES:
        dest = folder / f"patch-{version}"
        try:
            found[version] = Outcome(compile_release(upstream, folder, version)[0], None, dest)
        except FleetError as error:
            found[version] = Outcome(None, error, dest)
    return found


def conflicts_of_git(upstream: Upstream, version: str) -> dict[str, int]:
    """Count the conflicts that git itself leaves, file by file."""
    merged = upstream.git(
        "merge-tree", "--write-tree", "--name-only", f"v{version}", upstream.head, check=False
    )
    tree, *names = merged.split("\n\n")[0].splitlines()
    return {
        name: upstream.git("cat-file", "blob", f"{tree}:{name}").count("\n<<<<<<< ")
        for name in names
    }


def rules(joins: tuple[Join, ...]) -> dict[str, int]:
    return dict(Counter(join.rule for join in joins))


def test_the_table(upstream: Upstream, outcomes: dict[str, Outcome]) -> None:
    lines = [f"{'onto':8}{'conflicts':11}{'in':70}outcome"]
    found = {}
    for version in sorted(RELEASES):
        conflicts = conflicts_of_git(upstream, version)
        patched = outcomes[version].patched
        found[version] = Row(conflicts, rules(patched.joins) if patched else None)
        files = ", ".join(Path(name).name for name in conflicts) or "none"
        how = (
            ", ".join(f"{count}x {rule}" for rule, count in rules(patched.joins).items())
            if patched
            else ""
        )
        outcome = f"built: {how or 'applies cleanly'}" if patched else "refused, with a report"
        lines.append(f"{version:8}{sum(conflicts.values()):<11}{files:70}{outcome}")
    say("\n" + "\n".join(lines))
    assert found == TABLE


@pytest.mark.parametrize(
    "version", [version for version, row in TABLE.items() if row.rules is not None]
)
def test_every_check_passed(outcomes: dict[str, Outcome], version: str) -> None:
    patched = outcomes[version].patched
    assert patched is not None, outcomes[version].error
    assert len(patched.checks) == 12
    assert all(check.passed for check in patched.checks)
    assert patched.dropped == (STUB,)
    counted = sum(join.conflicts for join in patched.joins)
    assert counted == sum(TABLE[version].conflicts.values())


@pytest.mark.parametrize(
    "version", ["0.22.0", "0.22.1", "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1"]
)
def test_both_parts_choose_between_three(outcomes: dict[str, Outcome], version: str) -> None:
    """Read the result without the compiler's own means."""
    text = outcomes[version].text(INDEXER)
    calls = re.findall(
        r"(if|elif) (current_platform\.is_xpu\(\)|use_deep_gemm):|\blogits = ([\w.]+)\(", text
    )
    words = [test or call.rpartition(".")[2] for _, test, call in calls]
    chain = [
        "current_platform.is_xpu()",
        "xpu_fp8_{}mqa_logits",
        "use_deep_gemm",
        "fp8_fp4_{}mqa_logits",
        "fp8_{}mqa_logits_triton",
    ]
    for name in ("", "paged_"):
        wanted = [word.format(name) for word in chain]
        assert any(words[at : at + 5] == wanted for at in range(len(words)))
    ast.parse(text)


def test_what_the_pull_requests_call_does_not_get_is_named(outcomes: dict[str, Outcome]) -> None:
    """0.28.0 passes one more argument to the call that is guarded."""
    text = outcomes["0.28.0"].text(INDEXER)
    guarded, fallback = text.split("elif use_deep_gemm:")[2].split("else:", 1)
    assert "indices=decode_metadata.indices" in guarded
    assert "indices" not in fallback.split("num_rows")[0]


def test_a_condition_is_replaced_where_the_release_moved_it(outcomes: dict[str, Outcome]) -> None:
    """Two more places of 0.28.0 ask has_deep_gemm: they stay as they are."""
    text = outcomes["0.28.0"].text(BACKEND)
    assert text.count("is_cuda() and is_deep_gemm_supported()") == 1
    assert "    has_deep_gemm,\n    is_deep_gemm_supported,\n" in text
    assert text.count("has_deep_gemm()") == 2


def test_the_refusal_says_what_to_do(outcomes: dict[str, Outcome]) -> None:
    error = outcomes["0.33.0"].error
    assert error is not None
    conflicts = error.details["conflicts"]
    assert {each["path"] for each in conflicts} == {INDEXER, CUDA}
    for each in conflicts:
        assert each["line"] > 0
        assert each["ours"] or each["theirs"]
        assert each["ours"].rstrip() in error.found
        assert each["theirs"].rstrip() in error.found
        assert each["closest_rule"]
        assert each["reason"]
    assert "rebased" in error.remedy
    assert "release_resolutions" in error.remedy
    assert not outcomes["0.33.0"].folder.exists()


# 0.33.0 works on a part of the rows, and its branches say for which keys: so must the fallback.
ROWS = (
    ("weights[chunk.token_start : chunk.token_end]", "weights[row_start:row_end]"),
    (
        "    chunk.cu_seqlen_ks,\n    chunk.cu_seqlen_ke,\n",
        "    cu_seqlen_ks,\n    cu_seqlen_ke,\n",
    ),
)
KEYS = "row_starts = cu_seqlen_ks\nrow_ends = cu_seqlen_ke\n"


def by_hand(text: str) -> str:
    """Resolve the indexer of 0.33.0 as a person would."""
    prefill = PREFILL_FALLBACK + KEYS
    for old, new in ROWS:
        prefill = replace_once(prefill, old, new)
    for first, last, fallback in (
        ("q_scale_slice, chunk_weights =", "num_rows = logits.shape[0]\n", prefill),
        ("padded_q_scale, decode_weights =", "num_rows = logits.shape[0]\n", DECODE_FALLBACK),
    ):
        start = text.index("else:\n", text.rindex("\n", 0, text.index(first)) - 30)
        columns = start - text.rindex("\n", 0, start) - 1
        text = f"{text[:start]}elif use_deep_gemm:{text[start + len('else:') :]}"
        end = text.rindex("\n", 0, text.index(last, start)) + 1
        branch = [f"{' ' * columns}else:\n"]
        branch += shift(fallback.splitlines(keepends=True), columns + 4)
        text = text[:end] + "".join(branch) + text[end:]
    start = text.index("        if current_platform.is_cuda() and not has_deep_gemm()")
    end = text.index("            )\n", start) + len("            )\n")
    text = text[:start] + WARNING + text[end:]
    text = replace_once(text, "    has_deep_gemm,\n    mqa", "    is_deep_gemm_supported,\n    mqa")
    text = replace_once(text, OPS, OPS + IMPORTS)
    clear = "        topk_indices_buffer[: hidden_states.shape[0]] = -1\n"
    return with_test(text, f"    if not skip_topk_buffer_clear:\n{clear}")


def platform_by_hand(text: str) -> str:
    tail = "                *sparse_tail,\n"
    return replace_once(
        text, tail, f"{tail}                AttentionBackendEnum.TRITON_MLA_SPARSE,\n"
    )


def record(upstream: Upstream, file: Path, *wrong: tuple[str, str]) -> None:
    """Write what a person decided for 0.33.0, with the mistakes of ``wrong``."""
    tree = file.with_suffix(".tree")
    upstream.git("worktree", "add", "--quiet", "--detach", str(tree), "v0.33.0")
    try:
        for path, edit in ((INDEXER, by_hand), (CUDA, platform_by_hand)):
            text = edit((tree / path).read_text())
            for old, new in wrong:
                first, found, rest = text.rpartition(old)
                text = first + new + rest if found else text
            (tree / path).write_text(text)
        patch = run_program(["git", "diff", "--full-index"], cwd=str(tree)).stdout
    finally:
        upstream.git("worktree", "remove", "--force", str(tree))
    ref = upstream.git("rev-parse", "v0.33.0")
    file.write_text(f"Ref: {ref}\nHead: {upstream.head}\n\n{patch}")


def test_a_recorded_resolution_is_the_way_out(upstream: Upstream, tmp_path: Path) -> None:
    """It passes what 0.33.0 passes there, where the pull request's text would be wrong."""
    record(upstream, tmp_path / "0.33.0.patch")
    patched, _ = compile_release(upstream, tmp_path, "0.33.0", tmp_path / "0.33.0.patch")
    assert rules(patched.joins) == {"recorded-resolution": 2, "replaced-in-tree": 2}
    assert all(check.passed for check in patched.checks)


@pytest.mark.parametrize(
    ("old", "new", "check", "said"),
    [
        pytest.param(
            "weights[row_start:row_end],\n                        cu_seqlen_ks",
            "weights[chunk.token_start : chunk.token_end],\n                        cu_seqlen_ks",
            "nothing_else_changed",
            "passes weights[chunk.token_start:chunk.token_end], which the release no longer does",
            id="the pull request's rows",
        ),
        pytest.param(
            "                        cu_seqlen_ks,\n                        cu_seqlen_ke,\n"
            "                    )\n                    row_starts",
            "                        cu_seqlen_ke,\n                        cu_seqlen_ks,\n"
            "                    )\n                    row_starts",
            "nothing_else_changed",
            "no branch of the release passes",
            id="keys in another order",
        ),
        pytest.param(
            "                    row_starts = cu_seqlen_ks\n"
            "                    row_ends = cu_seqlen_ke\n",
            "",
            "prefill_dispatch",
            "row_ends, row_starts is used, which the branch 'else' does not set",
            id="keys not told",
        ),
        pytest.param(
            "elif use_deep_gemm", "elif not use_deep_gemm", "decode_dispatch",
            "0 dispatches on use_deep_gemm", id="another choice",
        ),
        pytest.param(
            "indices=decode_metadata.indices", "indices=None", "nothing_else_changed",
            "changed outside the conflicts, near line", id="an invented argument",
        ),
        pytest.param(
            "max_model_len=longest", "max_model_len=max_model_len", "nothing_else_changed",
            "passes max_model_len for longest", id="another width of the rows",
        ),
    ],
)  # fmt: skip
def test_a_wrong_resolution_is_refused(
    upstream: Upstream, tmp_path: Path, old: str, new: str, check: str, said: str
) -> None:
    record(upstream, tmp_path / "0.33.0.patch", (old, new))
    with pytest.raises(FleetError, match=check) as caught:
        compile_release(upstream, tmp_path, "0.33.0", tmp_path / "0.33.0.patch")
    assert said in str(caught.value)
    assert "rebased pull request or another ref" in caught.value.remedy
