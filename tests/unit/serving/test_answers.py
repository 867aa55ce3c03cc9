# SPDX-License-Identifier: Apache-2.0
"""Known answers: rounding is no alarm, and whatever answers wrongly is named."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from glm_fleet.serving import answers, kept_answers, needles
from glm_fleet.serving.answers import Answers, Prompt, Said
from glm_fleet.serving.kept_answers import Known, Start

LIMITS: Any = {"tolerance": 0.3, "drift": 0.15, "needles": False}
START = Start("rel-1", "mod-1", "i1", 4096)


class Engine:
    """Answers token by token from what it attends to; ``noise`` is the rounding of its kernels.

    ``scale`` changes every log probability, as a wrong scale does. With ``forgets`` a request that
    runs beside others loses the first tokens of its prompt, if it is longer than that.
    """

    def __init__(self, *, noise: float = 0.0, scale: float = 1.0, forgets: int = 0) -> None:
        self.noise, self.scale, self.forgets = noise, scale, forgets
        self.broken = ""
        self.asked: list[dict[str, Any]] = []
        self.random = random.Random(7)  # noqa: S311 - the same rounding on every run
        # All of a crowd are there before one is answered: one after the other would break it.
        self.crowd = threading.Barrier(8)
        self.alone = 16

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]:
        assert path == "/v1/completions"
        assert body is not None
        self.asked.append(dict(body))
        if self.broken:
            return 500, iter([self.broken])
        seen = list(body["prompt"])
        if len(self.asked) > self.alone:
            self.crowd.wait(20)
            if len(seen) > 2048:
                seen = seen[self.forgets :]
        tokens, listed = [], []
        for place in range(body["max_tokens"]):
            likely = self._likely(seen, place)
            best = max(likely, key=lambda token: likely[token])
            tokens.append(best)
            listed.append(likely)
        logprobs = {"tokens": tokens, "top_logprobs": listed, "token_logprobs": []}
        return 200, iter([json.dumps({"choices": [{"text": "", "logprobs": logprobs}]})])

    def _likely(self, seen: list[int], place: int) -> dict[str, float]:
        chance = random.Random(f"{sum(seen) * len(seen)} {place}")  # noqa: S311
        rounding = self.random.uniform
        return {
            f"token_id:{chance.randrange(100) + 100 * each}": min(
                self.scale * -chance.uniform(0.1, 5) + rounding(-self.noise, self.noise), 0.0
            )
            for each in range(5)
        }


def ask(engine: Engine) -> answers.Found:
    return answers.ask_all(engine, "glm-5.2", 4096, tolerance=0.3)


def test_prompts_are_the_same_for_ever_and_as_long_as_they_say() -> None:
    made = answers.prompts(4096)
    assert [f"{len(each.ids)} tokens" for each in made] == [each.name for each in made]
    assert answers.name_of(made) == "1dc3b5c7752a", "kept answers are of these prompts"
    assert all(16 <= token < 496 for each in made for token in each.ids)
    for each in made:
        repeated = (len(each.ids) > 100 and 24) or 18
        assert each.ids[:repeated] == each.ids[-repeated:], "it goes on by looking back"


def test_several_rows_end_in_one_block_of_the_selection_and_off_its_end() -> None:
    long = [len(each.ids) for each in answers.prompts(4096) if len(each.ids) > 2048]
    assert len(long) >= 5
    assert len(set(long)) == len(long)
    assert len({length // 64 for length in long}) == 1
    for length in long:
        assert (length + 16) // 64 == length // 64, "also after the last token of the answer"
    others = 8 - len(long)
    assert len(long) > others + 1, "in any order, two of them are neighbours"


@pytest.mark.parametrize(("context", "count"), [(4096, 8), (2048, 3), (100, 1), (64, 0)])
def test_a_context_takes_the_prompts_that_fit(context: int, count: int) -> None:
    assert len(answers.prompts(context)) == count


def test_a_right_engine_passes_alone_and_in_a_crowd() -> None:
    engine = Engine(noise=0.05)
    found = ask(engine)
    (check,) = found.checks
    assert check.passed, check.detail
    assert "8 prompts" in check.detail
    assert [each["prompt"] for each in found.said] == [each.name for each in answers.prompts(4096)]
    salts = [each["cache_salt"] for each in engine.asked]
    assert len(set(salts[:16])) == 16
    assert set(salts[16:]).isdisjoint(salts[:16]), "nothing of it lies in the cache"
    assert not any("prompt_logprobs" in each for each in engine.asked)


def test_what_forgets_beside_others_is_caught_and_named() -> None:
    (check,) = ask(Engine(noise=0.05, forgets=40)).checks
    assert not check.passed
    assert "5 of 8 prompts" in check.detail
    assert "2307 tokens by" in check.detail
    assert "517 tokens" not in check.detail


def test_an_engine_that_does_not_repeat_itself_is_judged_by_its_own_rounding() -> None:
    # As one on a GPU above 2048 tokens: 0.3 would be an alarm on each start.
    restless = Engine(noise=0.3)
    found = ask(restless)
    assert found.own is not None
    assert found.own["worst"] > 0.3
    assert found.crowd > 0.3
    assert [each.passed for each in found.checks] == [True]
    (check,) = ask(Engine(noise=0.3, forgets=40)).checks
    assert not check.passed, "what is lost is more than that"


def test_what_computes_at_random_does_not_excuse_itself() -> None:
    (check,) = ask(Engine(noise=3.0)).checks
    assert not check.passed
    assert "at most 1.2 is rounding" in check.detail


def test_a_tolerance_that_was_raised_by_hand_stays() -> None:
    assert answers.rounding(5.0, 0.0) == 5.0
    assert answers.rounding(0.5, 0.1) == 0.5
    assert answers.rounding(0.5, 0.6) == 1.2
    assert answers.rounding(0.5, 9.0) == 2.0


def test_a_server_that_cannot_be_asked_is_not_called_wrong() -> None:
    engine = Engine()
    engine.broken = "EngineDeadError"
    (check,) = ask(engine).checks
    assert (check.name, check.passed) == ("known answers", False)
    assert "EngineDeadError" in check.detail


@pytest.mark.parametrize(
    "choices",
    [[], [{"logprobs": None}], [{"logprobs": {"tokens": ["a"], "top_logprobs": [{"a": -1.0}]}}]],
)
def test_an_answer_without_its_log_probabilities_is_no_answer(choices: Any) -> None:
    def http(path: str, body: Any = None) -> tuple[int, Iterator[str]]:
        return 200, iter([json.dumps({"choices": choices})])

    (check,) = answers.ask_all(http, "m", 4096, tolerance=0.3).checks
    assert not check.passed
    nan = '{"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [{"a": NaN}]}}]}'
    (check,) = answers.ask_all(
        lambda path, body=None: (200, iter([nan])), "m", 4096, tolerance=0.3
    ).checks
    assert "NaN" in check.detail


def said(*steps: Mapping[str, float]) -> Said:
    """Return an answer by what is listed at each place, the likeliest token first."""
    return {"prompt": "p", "steps": [{"token": next(iter(each)), "listed": each} for each in steps]}


def test_two_answers_are_compared_up_to_the_first_other_token() -> None:
    mine = said({"a": -0.1, "b": -2.0}, {"c": -0.70, "d": -0.72}, {"e": -0.1})
    same = answers.difference(mine, mine)
    assert (same.steps, same.mean, same.worst, same.parted) == (3, 0.0, 0.0, False)
    tie = said({"a": -0.15, "b": -2.0}, {"d": -0.69, "c": -0.71}, {"x": -9.0})
    found = answers.difference(mine, tie)
    assert (found.steps, found.parted) == (2, True)
    assert found.worst == pytest.approx(0.05)
    # What is wrong may show in the other tokens alone.
    sure = said({"a": -0.1, "b": -2.6}, {"c": -0.70, "d": -0.72}, {"e": -0.1})
    found = answers.difference(mine, sure)
    assert (found.steps, found.parted) == (3, False)
    assert found.worst == pytest.approx(0.6)
    # Another token that was far behind is no tie.
    other = said({"b": -0.1, "a": -2.0})
    assert answers.difference(mine, other).worst == pytest.approx(1.9)
    # One that is not listed at all is at most as likely as the last that is.
    lost = said({"z": -0.1, "y": -3.0})
    assert answers.difference(mine, lost).worst == pytest.approx(2.9)


class Store:
    """What a node keeps."""

    def __init__(self, kept: Answers | None = None) -> None:
        self.kept = kept

    def answers_before(self, model: str) -> Answers | None:
        return self.kept

    def note_answers(self, answers: Answers) -> None:
        self.kept = answers


def prove(engine: Engine, known: Known, start: Start = START) -> kept_answers.Proof:
    return kept_answers.prove(engine, "glm-5.2", start, known)


def kept_of(engine: Engine, invocation: str = "i0") -> Answers:
    start = replace(START, invocation=invocation)
    found = prove(engine, Known(LIMITS, Store()), start).answers
    assert found is not None
    return found


@pytest.fixture(scope="module")
def right() -> Answers:
    return {**kept_of(Engine(noise=0.04)), "release": "rel-0"}


def apart_of(proof: kept_answers.Proof) -> Sequence[answers.Apart]:
    assert proof.answers is not None
    return proof.answers["apart"]


def failed(proof: kept_answers.Proof) -> list[str]:
    return [each.name for each in proof.checks if not each.passed]


def test_the_same_engine_answers_as_before_and_as_its_neighbours(right: Answers) -> None:
    proof = prove(Engine(noise=0.05), Known(LIMITS, Store(right), {"gpu02": right}))
    assert failed(proof) == []
    assert [each.name for each in proof.checks] == [
        "same answers alone and in a crowd",
        "same answers as the neighbours",
        "same answers as before",
    ]
    assert [each["whom"] for each in apart_of(proof)] == ["this node before", "gpu02"]
    assert all(0 < each["mean"] < 0.15 and not each["moved"] for each in apart_of(proof))
    assert proof.answers is not None
    assert proof.answers["invocation"] == "i1"
    assert 0 < proof.answers["crowd"] < 0.3


def test_a_wrong_scale_is_seen_against_what_was_before(right: Answers) -> None:
    proof = prove(Engine(noise=0.05, scale=0.8), Known(LIMITS, Store(right)))
    assert failed(proof) == ["same answers as before"]
    (check,) = [each for each in proof.checks if not each.passed]
    assert "this node before (rel-0)" in check.detail
    assert "prompts moved" in check.detail


@pytest.mark.parametrize(
    ("wrong", "caught"),
    [(0, False), (1, False), (2, True), (3, True)],
)
def test_the_majority_of_the_neighbours_decides(right: Answers, wrong: int, caught: bool) -> None:
    other = kept_of(Engine(scale=0.5))
    neighbours = {f"gpu0{each}": other if each < wrong else right for each in range(3)}
    proof = prove(Engine(noise=0.05), Known(LIMITS, Store(), neighbours))
    assert failed(proof) == (["same answers as the neighbours"] if caught else [])


def test_one_neighbour_that_differs_is_enough_and_half_that_agree_are_too(right: Answers) -> None:
    other = kept_of(Engine(scale=0.5))
    alone = prove(Engine(), Known(LIMITS, Store(), {"gpu02": other}))
    assert failed(alone) == ["same answers as the neighbours"]
    half = prove(Engine(), Known(LIMITS, Store(), {"gpu02": other, "gpu03": right}))
    assert failed(half) == []


def test_a_node_that_was_wrong_before_and_was_mended_joins(right: Answers) -> None:
    wrong = kept_of(Engine(scale=0.5))
    same = {**right, "release": "rel-1"}
    proof = prove(Engine(), Known(LIMITS, Store(wrong), {"gpu02": same}))
    assert failed(proof) == []
    # A neighbour with another release proves nothing of this one.
    proof = prove(Engine(), Known(LIMITS, Store(wrong), {"gpu02": right}))
    assert failed(proof) == ["same answers as before"]


def test_other_weights_and_other_prompts_are_not_compared(right: Answers) -> None:
    for change in ({"model": "mod-2"}, {"prompts": "of-another-version"}, {"said": []}):
        proof = prove(Engine(scale=0.5), Known(LIMITS, Store(), {"gpu02": {**right, **change}}))
        assert failed(proof) == []
        assert not apart_of(proof)


def test_a_start_is_asked_once_unless_it_has_to_be_again() -> None:
    store = Store(kept_of(Engine(), "i1"))
    engine = Engine()
    (check,) = prove(engine, Known(LIMITS, store)).checks
    assert check.passed
    assert engine.asked == []
    prove(engine, Known(LIMITS, store, again=True))
    prove(engine2 := Engine(), Known(LIMITS, store), replace(START, invocation="i2"))
    assert len(engine.asked) == len(engine2.asked) == 24


def test_whoever_waits_is_told_what_is_asked() -> None:
    told: list[str] = []
    prove(Engine(), Known(LIMITS, Store(), say=told.append))
    assert told == [
        "known answers: 8 prompts, one after the other, twice",
        "known answers: 8 prompts at once",
    ]


class Reader:
    """A model that finds the code word in the part of a text that it can see."""

    def __init__(self, first: int = 0, last: int | None = None) -> None:
        self.seen = slice(first, last)
        self.crowd = threading.Barrier(8)

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]:
        assert path == "/v1/chat/completions"
        assert body is not None
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        self.crowd.wait(20)
        words = body["messages"][0]["content"].split()[self.seen]
        found = next((word for word in words if "-" in word), "I cannot see one")
        content = {"choices": [{"message": {"role": "assistant", "content": f"It is {found}"}}]}
        return 200, iter([json.dumps(content)])


def test_code_words_are_hidden_at_both_lengths_and_in_every_place() -> None:
    hidden = needles.needles(32768)
    assert len({each.code for each in hidden}) == 8
    assert {each.place.split(" ")[0] for each in hidden} == {"beginning", "middle", "end"}
    for each, other in itertools.permutations(hidden, 2):
        assert each.code in each.text
        assert each.code not in other.text
    lengths = sorted(len(each.text.split()) for each in hidden)
    # English takes 1 to 1.3 tokens a word: about 3,000, and about half of the context.
    assert 2000 < lengths[0] <= lengths[5] < 3000
    assert 12000 < lengths[6] <= lengths[7] < 16384
    assert needles.needles(2048) == []
    assert needles.check_needles(Reader(), "m", 2048) == []


def test_eight_readers_at_once_find_their_own_word() -> None:
    (check,) = needles.check_needles(Reader(), "glm-5.2", 32768)
    assert check.passed, check.detail


@pytest.mark.parametrize(
    ("reader", "lost"), [(Reader(first=30), "beginning"), (Reader(last=2000), "end")]
)
def test_what_loses_a_part_of_a_long_text_is_caught(reader: Reader, lost: str) -> None:
    (check,) = needles.check_needles(reader, "glm-5.2", 32768)
    assert not check.passed
    assert f"at the {lost}" in check.detail


def test_a_server_that_is_too_slow_for_long_texts_is_not_called_wrong() -> None:
    def http(path: str, body: Any = None) -> tuple[int, Iterator[str]]:
        return 0, iter(["TimeoutError: timed out"])

    (check,) = needles.check_needles(http, "glm-5.2", 32768)
    assert (check.name, check.passed) == ("known answers", False)
    assert "timed out" in check.detail


def test_code_words_are_asked_for_where_the_model_follows_instructions() -> None:
    engine, reader = Engine(), Reader()

    def http(path: str, body: Any = None) -> tuple[int, Iterator[str]]:
        return (reader if "chat" in path else engine)(path, body)

    limits: Any = {**LIMITS, "needles": True}
    proof = kept_answers.prove(http, "glm-5.2", START, Known(limits, Store()))
    assert "code words are found in long texts" in [each.name for each in proof.checks]


def test_a_prompt_names_itself() -> None:
    assert answers.name_of([Prompt("a", [1])]) != answers.name_of([Prompt("a", [2])])
