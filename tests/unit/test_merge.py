# SPDX-License-Identifier: Apache-2.0
"""Conflicts as git writes them, joined by structure or refused."""

from __future__ import annotations

import pytest
from glm_fleet.errors import FleetError
from glm_fleet.merge import MARKER_SIZE, Common, Conflict, Resolver, parse_segments

START, BASE, MIDDLE, END = (char * MARKER_SIZE for char in "<|=>")


def conflict(ours: str, theirs: str, base: str | None = None) -> str:
    middle = "" if base is None else f"{BASE} base\n{base}"
    return f"{START} ours\n{ours}{middle}{MIDDLE}\n{theirs}{END} theirs\n"


OURS_HEAD = """\
    if current_platform.is_xpu():
        logits = xpu_mqa_logits(q)
    else:
"""
BODY = """\
        logits = mqa_logits(
            q,
        )
"""
TAIL = """\
    else:
        logits = triton_mqa_logits(q)
"""
FOUR_HUNKS = (
    "def f(q):\n"
    + conflict(OURS_HEAD, "    if use_deep_gemm:\n")
    + BODY
    + conflict("", TAIL)
    + "    return logits\n"
)
JOINED = f"""\
def f(q):
    if current_platform.is_xpu():
        logits = xpu_mqa_logits(q)
    elif use_deep_gemm:
{BODY}    else:
        logits = triton_mqa_logits(q)
    return logits
"""


def resolve(text: str, with_base: str | None = None) -> str:
    return Resolver().resolve("x.py", text, with_base or text).text


def test_segments_keep_every_line() -> None:
    segments = parse_segments("a\n" + conflict("b\n", "c\n", "d\n") + "e")
    assert segments == [
        Common(("a\n",)),
        Conflict(("b\n",), ("c\n",), ("d\n",)),
        Common(("e",)),
    ]


def test_short_markers_are_text() -> None:
    text = "Title\n=======\n<<<<<<< not a conflict\n"
    assert parse_segments(text) == [Common(tuple(text.splitlines(keepends=True)))]


def test_unfinished_conflict_is_refused() -> None:
    with pytest.raises(FleetError, match="no end marker"):
        parse_segments(f"{START} ours\na\n")


def test_two_dispatches_become_three_way() -> None:
    twice = FOUR_HUNKS + FOUR_HUNKS.replace("def f", "def g")
    resolution = Resolver().resolve("x.py", twice, twice)
    assert resolution.text == JOINED + JOINED.replace("def f", "def g")
    assert [(join.rule, join.conflicts) for join in resolution.joins] == [("dispatch-join", 2)] * 2


def test_dispatch_is_joined_wherever_git_cuts() -> None:
    one_hunk = (
        "def f(q):\n"
        + conflict(OURS_HEAD + BODY, "    if use_deep_gemm:\n" + BODY + TAIL)
        + "    return logits\n"
    )
    # git may take the last line of the two calls for common.
    last = "        logits = triton_mqa_logits(q)\n"
    ours, theirs = (
        OURS_HEAD + BODY.replace("            q,\n        )\n", ""),
        "    if use_deep_gemm:\n" + BODY + TAIL.replace("triton_mqa_logits(q)", "t("),
    )
    shared_end = "            q,\n        )\n"
    odd_cut = "def f(q):\n" + conflict(ours, theirs) + shared_end + "    return logits\n"
    assert resolve(one_hunk) == JOINED
    assert resolve(odd_cut) == JOINED.replace(last, f"        logits = t(\n{shared_end}")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("if use_deep_gemm:", "if use_deep_gemm and x:", "does not begin with 'if use_deep_gemm"),
        ("if current_platform.is_xpu():", "if current_platform.is_rocm():", "is_xpu"),
        ("logits = mqa_logits(", "other = 1\n    logits = mqa_logits(", "has no plain|not Python"),
    ],
)
def test_other_shapes_are_refused_with_both_sides(old: str, new: str, reason: str) -> None:
    with pytest.raises(FleetError, match=reason) as caught:
        resolve(FOUR_HUNKS.replace(old, new))
    conflicts = caught.value.details["conflicts"]
    assert conflicts[0]["path"] == "x.py"
    assert conflicts[0]["line"] == 2
    assert "is_" in conflicts[0]["ours"]
    assert conflicts[0]["closest_rule"]
    assert "rebased" in caught.value.remedy


def test_the_guarded_call_must_be_the_same_on_both_sides() -> None:
    ours = OURS_HEAD + "        logits = new_name(q)\n"
    theirs = "    if use_deep_gemm:\n        logits = old_name(q)\n" + TAIL
    with pytest.raises(FleetError, match="not what the pull request guards"):
        resolve("def f(q):\n" + conflict(ours, theirs) + "    return logits\n")


GUARD = """\
class Indexer:
    def __init__(self):
        self.a = 1
{}            )

        self.b = 2
"""
ERROR = """\
        if current_platform.is_cuda() and not has_deep_gemm():
            raise RuntimeError(
                "DeepGEMM is needed in "
                "this environment."
"""
WARNING = """\
        if current_platform.is_cuda() and not is_deep_gemm_supported():
            logger.warning_once(
                "DeepGEMM not supported; using Triton fallback."
"""


def test_error_becomes_the_warning() -> None:
    assert resolve(GUARD.format(conflict(ERROR, WARNING))) == GUARD.format(WARNING)


def test_another_error_is_not_replaced() -> None:
    text = GUARD.format(conflict(ERROR.replace("has_deep_gemm", "has_cuda"), WARNING))
    with pytest.raises(FleetError) as caught:
        resolve(text)
    rules = caught.value.details["conflicts"][0]["rules"]
    assert "asks for deep_gemm" in rules["warn-instead-of-error"]


def test_an_error_outside_init_is_not_replaced() -> None:
    text = GUARD.replace("__init__", "forward").format(conflict(ERROR, WARNING))
    with pytest.raises(FleetError, match="not inside an __init__"):
        resolve(text)


def test_two_additions_to_one_list() -> None:
    text = "x = [\n    a,\n{}    z,\n]\n"
    ours, theirs = "    b,\n    c,\n", "    b,\n    d,\n"
    joined = resolve(text.format(conflict(ours, theirs)), text.format(conflict(ours, theirs, "")))
    assert joined == text.format("    b,\n    c,\n    d,\n")


def test_two_additions_of_imports() -> None:
    ours, theirs = "from a import b\n", "from c import d\n"
    joined = resolve(conflict(ours, theirs), conflict(ours, theirs, ""))
    assert joined == ours + theirs


def test_a_change_on_both_sides_is_not_an_addition() -> None:
    text = "x = [\n    a,\n{}    z,\n]\n"
    ours, theirs = "    b(1),\n", "    b(2),\n"
    with pytest.raises(FleetError, match="changes or removes"):
        resolve(
            text.format(conflict(ours, theirs)), text.format(conflict(ours, theirs, "    b(0),\n"))
        )
