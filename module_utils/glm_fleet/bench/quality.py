# SPDX-License-Identifier: Apache-2.0
"""Questions with known answers, asked of one server: how many are right, and are they fewer now?

The set is JSON Lines, ``{"question": ..., "answer": ...}`` each, as GSM8K has it: there the answer
stands behind ``####``. Greedy answers to the same questions are compared one by one with those
that were recorded of another release or start, so that the chance of the choice falls out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from ..core.decode import Size, Words, parse
from ..core.errors import FleetError
from ..core.http import Http
from ..serving.client import chat

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# The share of questions that may stay without an answer before nothing can be said.
_UNANSWERED = 0.02


class Question(TypedDict):
    """One line of a set."""

    question: Words
    answer: Words


class Score(TypedDict):
    """What was asked of what, and which answers were right, as 1 and 0 in the order of the set.

    ``questions`` names the set; ``release`` and ``model`` are what the pre-start check recorded.
    """

    release: Words
    model: Words
    questions: Words
    right: Annotated[str, Size(100_000)]


def read_set(text: str, most: int) -> list[Question]:
    """Return the first ``most`` questions of a set; raises `FleetError` that names the line."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    found = [
        parse(Question, line, what=f"Line {number} of benchmark_quality_set")
        for number, line in lines[:most]
    ]
    if not found:
        raise FleetError(
            "There are no questions to ask",
            expected='lines such as {"question": "...", "answer": "..."} in benchmark_quality_set',
            found="an empty file",
        )
    return found


def name_of(questions: Sequence[Question]) -> str:
    """Return what a set is called: by its content."""
    return hashlib.sha256(repr([dict(each) for each in questions]).encode()).hexdigest()[:12]


def is_right(question: Question, said: str) -> bool:
    """Tell whether an answer holds the known one: as its last number, or as its words."""
    known = question["answer"].rpartition("####")[2].strip()
    number = _NUMBER.fullmatch(known.strip("$ "))
    if not number:
        return known.casefold() in said.casefold()
    numbers = _NUMBER.findall(said)
    return bool(numbers) and _value(numbers[-1]) == _value(number.group())


def _value(number: str) -> float:
    return float(number.replace(",", ""))


@dataclass(frozen=True)
class Ask:
    """How questions are asked: so many at once, with so many tokens for each answer."""

    model: str
    streams: int
    tokens: int


def ask_all(http: Http, questions: Sequence[Question], ask: Ask) -> str:
    """Return which answers are right, as 1 and 0; raises `FleetError` if too many are missing."""

    def one(question: Question) -> str | None:
        try:
            return chat(http, ask.model, question["question"], tokens=ask.tokens, what="A question")
        except FleetError:
            return None

    with ThreadPoolExecutor(ask.streams) as pool:
        said = list(pool.map(one, questions))
    missing = sum(each is None for each in said)
    if missing > _UNANSWERED * len(questions):
        raise FleetError(
            "The questions were not answered",
            expected=f"answers to at least {1 - _UNANSWERED:.0%} of {len(questions)} questions",
            found=f"{missing} without one",
            remedy="look at the server with health.yml, then run again",
        )
    return "".join(
        str(int(each is not None and is_right(question, each)))
        for question, each in zip(questions, said)
    )


def share(score: Score) -> float:
    """Return the share of right answers, 0 to 1."""
    return score["right"].count("1") / max(1, len(score["right"]))


class Ran(TypedDict, total=False):
    """What gave a score: ids of release and model."""

    release: Words
    model: Words


def known_score(ran: Ran, questions: str, known: Sequence[Score]) -> Score | None:
    """Return the newest score of what ran, to the same questions."""
    for each in reversed(known):
        same = all(each[key] == ran.get(key) for key in ("release", "model"))
        if same and each["questions"] == questions:
            return each
    return None


def reference(score: Score, known: Sequence[Score], before: Ran | None = None) -> Score | None:
    """Return what a score is compared with: that of what ran ``before``, where it is known.

    Else the newest of the same weights and questions under another release.
    """
    if before and (found := known_score(before, score["questions"], known)):
        return found
    for each in reversed(known):
        same = all(each[key] == score[key] for key in ("model", "questions"))
        if same and each["release"] != score["release"]:
            return each
    return None


def judge(score: Score, before: Score | None, drop: float) -> Mapping[str, Any]:
    """Say how a score stands beside the one before.

    Returns {share, before, lost, gained, passed}: shares from 0 to 1 (``before`` None where there
    is none), questions that were right and are wrong now, and the reverse. It passes while the
    share is not lower by more than ``drop``.
    """
    figures: dict[str, Any] = {"share": round(share(score), 4), "before": None, "passed": True}
    if before:
        pairs = list(zip(before["right"], score["right"]))
        figures.update(
            before=round(share(before), 4),
            lost=pairs.count(("1", "0")),
            gained=pairs.count(("0", "1")),
            passed=share(score) >= share(before) - drop,
        )
    return figures
