# SPDX-License-Identifier: Apache-2.0
"""The fallback of a choice that a person resolved: the release's rows, the pull request's call."""

from __future__ import annotations

import ast

import pytest
from glm_fleet.release.verify.fallback import wrong_fallback

GUARDED = "logits = mqa_logits((q, scale), keys, weights[chunk.start], chunk.first, clean=False)"
WANTED = (
    "width = chunk.width\nlogits = mqa_logits_triton(q, keys, weights[chunk.start], chunk.first)"
)
# The release narrows the rows, so `first` is bound twice and stands for nothing.
FUNCTION = """\
def f(q, chunk):
    first = chunk.first
    if shard:
        first, row = shard.narrow(chunk)
    if is_xpu():
        logits = xpu_mqa_logits(q, keys, weights[row], first)
        rows = first
    else:
        logits = mqa_logits((q, scale), keys, other_weights, first)
"""
RIGHT = (
    "width = chunk.width\nlogits = mqa_logits_triton(q, keys, weights[row], first)\nrows = first"
)


def said(found: str, function: str = FUNCTION) -> list[str]:
    scope = ast.parse(function).body[0]
    release = next(node for node in ast.walk(scope) if isinstance(node, ast.If) and node.orelse)
    return wrong_fallback(
        ast.parse(WANTED).body,
        ast.parse(found).body,
        base=ast.parse(GUARDED),
        release=release,
        scope=scope,
    )


def test_what_the_release_passes_now_is_right() -> None:
    assert said(RIGHT) == []


def test_a_name_for_the_same_thing_is_not_another_argument() -> None:
    """Where the release only gave a name to what it passed, both words are right."""
    named = FUNCTION.replace("        first, row = shard.narrow(chunk)\n", "        pass\n")
    named = named.replace("weights[row]", "weights[chunk.start]")
    assert said(WANTED, named) == []
    assert said(WANTED.replace("chunk.first", "first"), named) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("weights[row]", "weights[chunk.start]", "which the release no longer does"),
        ("row], first)", "row], chunk.first)", "which the release no longer does"),
        ("weights[row], first", "first, weights[row]", "no branch of the release passes"),
        ("(q, keys", "(q, rows", "passes rows for keys"),
        ("mqa_logits_triton(", "mqa_logits(", "another call"),
        (", first)", ", first, clean=True)", "another call"),
        ("width = chunk.width\n", "", "lost 'width = chunk.width'"),
        ("rows = first", "rows = None", "neither side has 'rows = None'"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, problem: str) -> None:
    assert old in RIGHT
    assert any(problem in each for each in said(RIGHT.replace(old, new)))
