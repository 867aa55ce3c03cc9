# SPDX-License-Identifier: Apache-2.0
"""The sentry: up only while the very start that runs was attested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from glm_fleet.node import readiness


@pytest.mark.parametrize(
    ("record", "evidence", "stalled", "said"),
    [
        ("", "", "", "down #nothing was started"),
        ("a", "", "", "down #not attested"),
        ("b", "a", "", "down #not attested"),
        ("b", "b", "", "up"),
        ("b", "b", "b", "down #the engine makes no progress"),
        ("b", "a", "a", "down #not attested"),
        ("b", "b", "a", "up"),
    ],
)
def test_up_is_said_of_an_attested_start_alone(
    tmp_path: Path, record: str, evidence: str, stalled: str, said: str
) -> None:
    files = [tmp_path / name for name in ("serving.json", "attested.json", "stalled")]
    for path, invocation in zip(files, (record, evidence, stalled)):
        if invocation:
            path.write_text(json.dumps({"invocation": invocation}))
    assert readiness.answer(*files) == said


class Node:
    """A node over time: what the watch sees of it, and how often it attests."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ready = self.attested = self.passes = False
        self.tried: list[float] = []
        self.watch = readiness.Attestor(
            ready=lambda: self.ready,
            attested=lambda: self.attested,
            attest_now=self.attest,
            clock=lambda: self.now,
        )

    def attest(self) -> bool:
        self.tried.append(self.now)
        self.attested = self.passes
        return self.passes

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.watch.look()
            self.now += 1


def test_a_start_that_nobody_attends_is_attested_after_a_grace() -> None:
    node = Node()
    node.passes = True
    node.run(60)
    assert node.tried == []
    node.ready = True
    node.run(60)
    assert len(node.tried) == 1
    assert 60 < node.tried[0] < 90


def test_a_start_that_a_controller_attests_is_left_alone() -> None:
    node = Node()
    node.ready = True
    node.run(5)
    node.attested = True
    node.run(600)
    assert node.tried == []


def test_failing_is_tried_again_with_growing_pauses() -> None:
    node = Node()
    node.ready = True
    node.run(4000)
    pauses = [after - before for before, after in zip(node.tried, node.tried[1:])]
    assert len(node.tried) > 3
    assert pauses == sorted(pauses)
    assert pauses[-1] > 10 * pauses[0]
