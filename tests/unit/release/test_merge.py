# SPDX-License-Identifier: Apache-2.0
"""Conflicts as git writes them, joined by structure or refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import run_program
from glm_fleet.release.conflict import MARKER_SIZE, Joined, Versions, refuse_file
from glm_fleet.release.merge import Resolver

START, BASE, MIDDLE, END = (char * MARKER_SIZE for char in "<|=>")


def conflict(ours: str, theirs: str, base: str | None = None) -> str:
    middle = "" if base is None else f"{BASE} base\n{base}"
    return f"{START} ours\n{ours}{middle}{MIDDLE}\n{theirs}{END} theirs\n"


def merge(base: str, ours: str, theirs: str) -> tuple[str, str]:
    """Merge as the compiler does, with git itself."""
    with tempfile.TemporaryDirectory() as folder:
        names = [str(Path(folder, name)) for name in ("ours", "base", "theirs")]
        for name, text in zip(names, (ours, base, theirs)):
            Path(name).write_text(text)
        size = f"--marker-size={MARKER_SIZE}"
        merged = [
            run_program(["git", "merge-file", "-p", *style, size, *names], check=False).stdout
            for style in ([], ["--diff3"])
        ]
    return merged[0], merged[1]


def resolution(base: str, ours: str, theirs: str, conflicts: int = 1) -> Joined:
    return Resolver().resolve("x.py", Versions(base, ours, theirs, conflicts), merge)


def resolve(base: str, ours: str, theirs: str) -> str:
    return resolution(base, ours, theirs).text


def function(block: str, name: str = "f") -> str:
    return f"def {name}(q, chunk):\n    q = q.view()\n{block}    return logits.shape\n\n\n"


PLAIN = """\
    logits = mqa_logits(
        q,
        chunk.start,
    )
"""
XPU = """\
    if current_platform.is_xpu():
        logits = xpu_mqa_logits(q)
    else:
        logits = mqa_logits(
            q,
            chunk.start,
        )
"""
TRITON = """\
    if use_deep_gemm:
        logits = mqa_logits(
            q,
            chunk.start,
        )
    else:
        # Slower, and everywhere.
        logits = triton_mqa_logits(q)
"""
JOINED = """\
    if current_platform.is_xpu():
        logits = xpu_mqa_logits(q)
    elif use_deep_gemm:
        logits = mqa_logits(
            q,
            chunk.start,
        )
    else:
        # Slower, and everywhere.
        logits = triton_mqa_logits(q)
"""


def test_two_dispatches_become_three_way() -> None:
    base, ours, theirs, joined = (
        function(block) + function(block, "g") for block in (PLAIN, XPU, TRITON, JOINED)
    )
    result = resolution(base, ours, theirs, 5)
    assert result.text == joined
    assert [(join.rule, join.conflicts) for join in result.joins] == [
        ("dispatch-join", 3),
        ("dispatch-join", 2),
    ]


def test_a_choice_that_the_release_moved_is_joined_where_it_is() -> None:
    deeper = "".join(f"    {line}\n" for line in XPU.splitlines())
    moved = function(
        "    start = chunk.start\n    if q is None:\n        logits = empty()\n    else:\n"
        + deeper.replace("chunk.start", "start")
    )
    wanted = "".join(f"    {line}\n" for line in JOINED.splitlines())
    joined = resolve(function(PLAIN), moved, function(TRITON))
    assert wanted.replace("chunk.start", "start") in joined


def test_a_name_that_is_bound_twice_stands_for_nothing() -> None:
    ours = function(
        "    start = chunk.start\n    start = 0\n" + XPU.replace("chunk.start", "start")
    )
    with pytest.raises(FleetError, match="not what the pull request guards"):
        resolve(function(PLAIN), ours, function(TRITON))


@pytest.mark.parametrize(
    ("side", "old", "new", "reason"),
    [
        ("theirs", "if use_deep_gemm:", "if use_deep_gemm and x:", "no 'if use_deep_gemm:'"),
        ("ours", "is_xpu()", "is_rocm()", "has no 'if current_platform.is_xpu"),
        ("ours", "chunk.start", "chunk.end", "not what the pull request guards"),
        ("base", "chunk.start", "chunk.end", "not what the pull request guards|base had"),
    ],
)
def test_other_shapes_are_refused_with_both_sides(
    side: str, old: str, new: str, reason: str
) -> None:
    texts = {"base": function(PLAIN), "ours": function(XPU), "theirs": function(TRITON)}
    texts[side] = texts[side].replace(old, new)
    with pytest.raises(FleetError, match=reason) as caught:
        resolve(texts["base"], texts["ours"], texts["theirs"])
    conflicts = caught.value.details["conflicts"]
    assert conflicts[0]["path"] == "x.py"
    assert conflicts[0]["line"] == 3
    assert "current_platform" in conflicts[0]["ours"]
    assert conflicts[0]["closest_rule"]
    assert "rebased" in caught.value.remedy
    assert "release_resolutions" in caught.value.remedy


GUARD = """\
class Indexer:
    def __init__(self):
        self.a = 1
{}            )

        self.b = 2
"""
OLD = """\
        if current_platform.is_cuda() and not has_deep_gemm():
            raise RuntimeError(
                "DeepGEMM is needed."
"""
ERROR = OLD.replace('needed."', 'needed in "\n                "this environment."')
WARNING = """\
        # It goes on without.
        if current_platform.is_cuda() and not is_deep_gemm_supported():
            logger.warning_once(
                "DeepGEMM not supported; using Triton fallback."
"""


def guard(base: str, ours: str, theirs: str) -> str:
    return resolve(GUARD.format(base), GUARD.format(ours), GUARD.format(theirs))


def test_error_becomes_the_warning() -> None:
    assert guard(OLD, ERROR, WARNING) == GUARD.format(WARNING)


def test_what_the_release_adds_before_the_error_stays() -> None:
    added = "        self.rank = 0\n"
    assert guard(OLD, added + ERROR, WARNING) == GUARD.format(added + WARNING)


def test_another_error_is_not_replaced() -> None:
    with pytest.raises(FleetError) as caught:
        guard(OLD, ERROR.replace("has_deep_gemm", "has_cuda"), WARNING)
    rules = caught.value.details["conflicts"][0]["rules"]
    assert "asks for deep_gemm" in rules["warn-instead-of-error"]


def test_code_beside_the_warning_is_not_taken() -> None:
    with pytest.raises(FleetError, match="other code before its 'if'"):
        guard(OLD, ERROR, "        self.c = 1\n" + WARNING)


def test_an_error_outside_init_is_not_replaced() -> None:
    text = GUARD.replace("__init__", "forward")
    with pytest.raises(FleetError, match="not inside an __init__"):
        resolve(*(text.format(part) for part in (OLD, ERROR, WARNING)))


LIST = "x = [\n    a,\n{}    z,\n]\n"


def test_two_additions_to_one_list() -> None:
    texts = (LIST.format(part) for part in ("", "    b,\n    c,\n", "    b,\n    d,\n"))
    assert resolve(*texts) == LIST.format("    b,\n    c,\n    d,\n")


def test_two_additions_of_imports() -> None:
    ours, theirs = "from a import b\n", "from c import d\n"
    text = "import os\n{}import sys\n"
    joined = resolve(*(text.format(part) for part in ("", ours, theirs)))
    assert joined == text.format(ours + theirs)


def test_two_additions_of_imported_names() -> None:
    text = "from a import (\n    b,\n{}    z,\n)\n"
    joined = resolve(*(text.format(part) for part in ("", "    c,\n", "    d,\n")))
    assert joined == text.format("    c,\n    d,\n")


def test_a_change_on_both_sides_is_not_an_addition() -> None:
    with pytest.raises(FleetError, match="changes or removes"):
        resolve(*(LIST.format(f"    b({number}),\n") for number in (0, 1, 2)))


BODY = "def f(a, skip):\n    b = a\n{}    return b\n"
FILL = "    a[0] = -1\n"
CHANGED = "    # Cleared before.\n    if not skip:\n        a[0] = -1\n"
ADDED = "    fast = supported()\n    if not fast:\n        assert b\n"


def test_statements_after_a_changed_one_are_kept() -> None:
    joined = resolve(*(BODY.format(part) for part in (FILL, CHANGED, FILL + ADDED)))
    assert joined == BODY.format(CHANGED + ADDED)


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        ("    skip = 1\n", "uses a name"),
        ("    b = a[0]\n", "uses a name"),
        ("    return 1\n", "leaves"),
        ("    while b:\n", "a shape that no rule knows"),
    ],
)
def test_statements_that_depend_on_the_change_are_refused(added: str, reason: str) -> None:
    with pytest.raises(FleetError, match=reason):
        resolve(*(BODY.format(part) for part in (FILL, CHANGED, FILL + added)))


def test_a_refusal_shows_every_conflict_whole() -> None:
    def conflict(line: int, ours: str, theirs: str) -> dict[str, object]:
        return {"path": "a.py", "line": line, "ours": ours, "theirs": theirs,
                "closest_rule": "none", "reason": "no"}  # fmt: skip

    long = "".join(f"    line_{number}()\n" for number in range(40))
    error = refuse_file("a.py", [conflict(3, "one\n", ""), conflict(90, long, "two\n")])
    assert "a.py, line 3:\nthe release has:\none\nthe pull request has:\n(nothing)" in error.found
    assert "a.py, line 90:" in error.found
    assert "line_39()" in error.found


def test_a_call_of_the_release_that_gained_an_argument_is_joined_and_named() -> None:
    """The pull request's own call does not get the argument, and the manifest says so."""
    more = "            indices=pick(chunk),\n"
    ours = function(XPU.replace("            chunk.start,\n", f"            chunk.start,\n{more}"))
    result = resolution(function(PLAIN), ours, function(TRITON), 4)
    wanted = JOINED.replace("            chunk.start,\n", f"            chunk.start,\n{more}")
    assert result.text == function(wanted)
    assert [join.rule for join in result.joins] == ["dispatch-join without indices"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("            chunk.start,\n", "            chunk.start,\n            chunk.end,\n"),
        ("            chunk.start,\n", "            chunk.end,\n            indices=q,\n"),
        ("            chunk.start,\n", "            chunk.start,\n            **chunk.more,\n"),
        ("        )\n", "            indices=q,\n        )\n        logits = logits + 1\n"),
        ("logits = mqa_logits", "rows = mqa_logits"),
    ],
)
def test_a_call_that_changed_otherwise_is_not_joined(old: str, new: str) -> None:
    ours = function(XPU.replace(old, new))
    with pytest.raises(FleetError, match="not what the pull request guards"):
        resolve(function(PLAIN), ours, function(TRITON))


IMPORTS = "from vllm.deep import (\n    metadata,\n    has_it,\n)\n\n\n"
BUILD = """\
class Builder:
    def build(self, rows):
        rows = rows + 1
        # Needed on CUDA.
        if is_cuda() and has_it():
            self.rows = metadata(rows)
        return rows
"""
REPLACED = (IMPORTS + BUILD).replace("has_it", "is_supported")
# The release rewrote what stands around the condition, and asks for the name once more.
REWRITTEN = """\
from vllm.deep import (
    metadata,
    has_it,
    next_n,
)


def other():
    return has_it()


class Builder:
    def build(self, rows):
        rows = self.local(rows)
        if is_cuda() and has_it():
            lengths = rows[:, -1]
            self.rows = metadata(lengths)
        return rows
"""


def test_a_condition_in_rewritten_surroundings_is_replaced_in_the_syntax_tree() -> None:
    base = (IMPORTS + BUILD).replace("has_it,\n", "has_it,\n")
    result = resolution(base, REWRITTEN, REPLACED, 2)
    wanted = REWRITTEN.replace("    has_it,\n", "    has_it,\n    is_supported,\n").replace(
        "if is_cuda() and has_it()", "if is_cuda() and is_supported()"
    )
    assert result.text == wanted
    assert [(join.rule, join.line, join.conflicts) for join in result.joins] == [
        ("replaced-in-tree", 1, 1),
        ("replaced-in-tree", 15, 1),
    ]


def test_an_import_that_nothing_needs_any_more_goes() -> None:
    ours = REWRITTEN.replace("return has_it()", "return next_n()")
    assert "has_it" not in resolution(IMPORTS + BUILD, ours, REPLACED, 2).text


@pytest.mark.parametrize(
    ("side", "old", "new", "reason"),
    [
        ("ours", "def build(", "def make(", "0 such conditions in Builder.build"),
        ("ours", "is_cuda() and has_it()", "has_it()", "0 such conditions in Builder.build"),
        (
            "ours",
            "        return rows\n",
            "        if is_cuda() and has_it():\n            metadata(0)\n        return rows\n",
            "2 such conditions in Builder.build",
        ),
        ("ours", "metadata(lengths)", "lengths", "guards another call"),
        ("ours", "    metadata,\n    has_it,\n", "    metadata, has_it,\n", "not one a line"),
        ("theirs", "rows = rows + 1", "rows = rows + 2", "more than conditions and imports"),
        ("theirs", "# Needed on CUDA.", "# Needed.", "changes comments"),
        ("theirs", "        return rows\n", "        log()\n        return rows\n", "statements"),
        ("theirs", "def build(self, rows)", "def build(self, rows, n)", "more than conditions"),
    ],
)
def test_what_cannot_be_replaced_is_refused(side: str, old: str, new: str, reason: str) -> None:
    texts = {"base": IMPORTS + BUILD, "ours": REWRITTEN, "theirs": REPLACED}
    assert old in texts[side]
    texts[side] = texts[side].replace(old, new, 1)
    with pytest.raises(FleetError) as caught:
        resolution(conflicts=2, **texts)
    refused = caught.value.details["conflicts"]
    assert refused
    assert all(reason in each["rules"]["replaced-in-tree"] for each in refused)
