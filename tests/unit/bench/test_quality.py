# SPDX-License-Identifier: Apache-2.0
"""Questions with known answers: what is right, and what is too few of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from glm_fleet.bench import quality
from glm_fleet.bench.quality import Ask, Question, Score
from glm_fleet.core.errors import FleetError

ASK = Ask("glm-5.2", 4, 64)


@pytest.mark.parametrize(
    ("known", "said", "right"),
    [
        ("3 + 4 = 7. #### 7", "First 3, then 4. So the answer is 7.", True),
        ("#### 7", "It is 7. Not 8", False),
        ("#### 1,234", "That makes $1234.00", True),
        ("#### -5", "minus: -5", True),
        ("$ 18", "$18", True),
        ("#### 7", "seven", False),
        ("Paris", "The capital is PARIS.", True),
        ("Paris", "Rome", False),
        ("Room 7", "It is room 7.", True),
    ],
)
def test_an_answer_is_right_by_its_last_number_or_its_words(
    known: str, said: str, right: bool
) -> None:
    assert quality.is_right({"question": "q", "answer": known}, said) is right


def test_a_set_is_read_or_refused_with_the_line() -> None:
    line = json.dumps({"question": "q", "answer": "#### 1", "more": 3})
    assert len(quality.read_set(f"{line}\n\n{line}\n{line}\n", 2)) == 2
    with pytest.raises(FleetError, match="Line 3 of benchmark_quality_set"):
        quality.read_set(f"{line}\n\nnonsense\n", 9)
    with pytest.raises(FleetError, match="no questions"):
        quality.read_set("\n", 9)


QUESTIONS: list[Question] = [
    {"question": f"What is {each} and {each}?", "answer": f"#### {2 * each}"}
    for each in range(1, 101)
]


class Server:
    """Adds rightly up to a number, and is silent about some questions."""

    def __init__(self, knows: int = 100, silent: int = 0) -> None:
        self.knows, self.silent = knows, silent

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]:
        assert path == "/v1/chat/completions"
        assert body is not None
        number = int(body["messages"][0]["content"].split()[2])
        if number <= self.silent:
            return 500, iter(["busy"])
        said = f"It is {2 * number if number <= self.knows else 0}."
        return 200, iter([json.dumps({"choices": [{"message": {"content": said}}]})])


def test_right_answers_are_counted_in_the_order_of_the_set() -> None:
    assert quality.ask_all(Server(knows=40), QUESTIONS, ASK) == "1" * 40 + "0" * 60
    assert quality.ask_all(Server(silent=2), QUESTIONS, ASK) == "00" + "1" * 98
    with pytest.raises(FleetError, match="3 without one"):
        quality.ask_all(Server(silent=3), QUESTIONS, ASK)


def score(release: str, right: str, *, model: str = "m", questions: str = "s") -> Score:
    return {"release": release, "model": model, "questions": questions, "right": right}


def test_a_release_is_compared_with_the_last_other_one() -> None:
    known = [score("r1", "1111"), score("r2", "1100"), score("r2", "1", model="other"),
             score("r3", "1110")]  # fmt: skip
    before = quality.reference(score("r3", "1010"), known)
    assert before == score("r2", "1100")
    found = quality.judge(score("r3", "1010"), before, 0.03)
    assert found == {"share": 0.5, "before": 0.5, "lost": 1, "gained": 1, "passed": True}
    assert not quality.judge(score("r3", "1000"), before, 0.03)["passed"]
    assert quality.judge(score("r3", "1000"), before, 0.25)["passed"]
    # What ran before is known in a roll, and may have had other weights.
    assert (
        quality.reference(score("r3", "1010"), known, {"release": "r1", "model": "m"}) == known[0]
    )
    other = quality.reference(score("r3", "1"), known, {"release": "r2", "model": "other"})
    assert other == known[2]
    assert quality.reference(score("r3", "1"), known, {"release": "r9", "model": "m"}) == known[1]
    others = [score("r3", "1"), score("r2", "1", questions="others")]
    assert quality.reference(score("r3", "1"), others) is None
    assert quality.judge(score("r3", "0000"), None, 0.0)["passed"], "nothing to compare with"
