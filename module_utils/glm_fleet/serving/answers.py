# SPDX-License-Identifier: Apache-2.0
"""Known answers: the same prompts alone, in a crowd, as before, and as the neighbours answer them.

An engine can answer, repeat itself, and be wrong: the attention of one request reaches into the
memory of another, a kernel scales one head wrongly, a GPU computes wrongly. Whoever looks at one
answer cannot see it. A fixed set of prompts shows it, by the log probabilities of their greedy
answers:

- in a crowd: each prompt is asked alone, then all of them at once;
- as before and as the neighbours: the values are kept, and compared with those of another start
  or another node that serves the same weights.

Two right engines differ by rounding. A token may then be another one where two were nearly
equally likely. From there on the texts differ, so a comparison ends at the first other token.

How much rounding is, depends on the engine: above 2048 tokens, where attention selects, one on a
GPU does not even repeat itself bit by bit. So each prompt is asked alone twice, and what an engine
differs by from itself is allowed for, within a bound: see `rounding`.
"""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any, Callable, TypedDict

from ..core.check import Check
from ..core.decode import Amount, Count, Range, Size, Words, parse
from ..core.errors import FleetError
from ..core.http import Http

# Prompts of these many tokens, all asked at once. Sparse attention selects above 2048 tokens. The
# five long ones end in the same block of 64 and not at its end, so that whatever a row of one
# writes past its end lands in the next one. However the engine orders eight requests, two of five
# are neighbours.
_LONG = (2307, 2313, 2320, 2327, 2335)
_SHORT = (61, 517, 1290)
# Long enough that all of them decode together after the last one was read.
_ANSWER_TOKENS = 16
# A prompt begins with tokens of its own and ends with the first of them, so that the model goes
# on by looking back at its beginning: what loses the beginning, loses the answer.
_BEGINNING, _REPEATED = 40, 24
_FIRST_ID, _IDS = 16, 480
# How many likely tokens are listed at each place.
_LISTED = 5

# How many times what an engine differs by from itself is taken as rounding, and how many times the
# tolerance at most: a GPU that computes at random must not excuse itself.
_OWN, _MOST = 2.0, 4.0

# Whether each prompt has one answer, whoever runs beside it.
ALONE_AND_IN_A_CROWD = "same answers alone and in a crowd"
# The check that fails where the server could not be asked.
ASKED = "known answers"

LogProbability = Annotated[float, Range(-1e5, 1.0)]
_Listed = Annotated[Mapping[str, LogProbability], Size(64)]


class Step(TypedDict):
    """One place of an answer: the token, and the log probabilities of the likely ones by token."""

    token: Words
    listed: _Listed


class Said(TypedDict):
    """The greedy answer to one prompt."""

    prompt: Words
    steps: Annotated[Sequence[Step], Size(256)]


class Apart(TypedDict):
    """How far the answers are from those of ``whom``: see `kept_answers.compare`."""

    whom: Words
    release: Words
    # Mean difference of the log probabilities, over all prompts, and up to where it is rounding.
    mean: Amount
    rounding: Amount
    # Prompts that differ by more than the tolerance, and how many were compared.
    moved: Annotated[Sequence[Words], Size(64)]
    prompts: Count


class Own(TypedDict):
    """By how much two answers alone differ: at most, and on average over all prompts."""

    worst: Amount
    mean: Amount


class _Figures(TypedDict, total=False):
    own: Own
    # The largest difference of a log probability between alone and in a crowd.
    crowd: Amount
    apart: Annotated[Sequence[Apart], Size(100)]


class Answers(_Figures):
    """The answers of one start, each prompt asked alone, and the figures by which they were judged.

    ``prompts`` names the set of prompts; ``invocation`` is systemd's id of the start.
    """

    prompts: Words
    release: Words
    model: Words
    invocation: Words
    said: Annotated[Sequence[Said], Size(64)]


class _LogProbs(TypedDict):
    tokens: Annotated[Sequence[Words], Size(256)]
    top_logprobs: Annotated[Sequence[_Listed], Size(256)]


class _Choice(TypedDict):
    logprobs: _LogProbs


class _Completion(TypedDict):
    choices: Annotated[Sequence[_Choice], Size(1)]


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, so that its length is exact with any tokenizer."""

    name: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Difference:
    """How far two answers to one prompt are apart.

    ``mean`` and ``worst`` are differences of the log probabilities of the likely tokens over
    ``steps`` places, up to and including the first other token if there is one (``parted``).
    """

    prompt: str
    steps: int
    mean: float
    worst: float
    parted: bool


def prompts(context: int) -> list[Prompt]:
    """Return the prompts that fit the context, in tokens."""
    fitting = [each for each in (*_LONG, *_SHORT) if each + _ANSWER_TOKENS <= context]
    return [Prompt(f"{length} tokens", _ids(length)) for length in fitting]


def _ids(length: int) -> list[int]:
    """Return token ids that only depend on the length; every vocabulary has them."""
    beginning = min(_BEGINNING, length // 2)
    repeated = beginning * _REPEATED // _BEGINNING
    state, made = length, []
    for _ in range(length - repeated):
        # The constants of the C library's generator: the upper bits are even enough.
        state = (state * 1103515245 + 12345) % 2**31
        made.append(_FIRST_ID + (state >> 16) % _IDS)
    return made + made[:repeated]


def name_of(asked: Sequence[Prompt]) -> str:
    """Return what a set of prompts is called: by its content."""
    hashed = hashlib.sha256(repr([(each.ids, _ANSWER_TOKENS) for each in asked]).encode())
    return hashed.hexdigest()[:12]


def ask(http: Http, model: str, prompt: Prompt, salt: str) -> Said:
    """Ask for the greedy answer to a prompt; raises `FleetError`.

    Answers of different ``salt`` share nothing in the engine's cache: each prompt is read anew.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt.ids),
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": _LISTED,
        "return_tokens_as_token_ids": True,
        "cache_salt": salt,
    }
    status, lines = http("/v1/completions", body)
    text = "\n".join(lines)
    if status != 200:
        raise FleetError(
            f"The prompt of {prompt.name} is not answered",
            expected="HTTP 200",
            found=f"{status}: {text[:200]}",
        )
    choices = parse(_Completion, text, what=f"The answer to {prompt.name}")["choices"]
    told = choices[0]["logprobs"] if choices else _LogProbs(tokens=(), top_logprobs=())
    steps = [
        Step(token=token, listed={key: round(each, 4) for key, each in listed.items()})
        for token, listed in zip(told["tokens"], told["top_logprobs"])
        if token in listed
    ]
    if len(steps) < _ANSWER_TOKENS:
        raise FleetError(
            f"The answer to {prompt.name} cannot be used",
            expected=f"{_ANSWER_TOKENS} tokens with their log probabilities",
            found=f"{len(steps)}",
        )
    return Said(prompt=prompt.name, steps=steps)


def difference(one: Said, other: Said) -> Difference:
    """Compare two answers to the same prompt, place by place, up to the first other token.

    All tokens count that both list, not only the likeliest: where that one is nearly certain, what
    is wrong shows in the others.
    """
    found: list[float] = []
    steps, parted = 0, False
    for mine, theirs in zip(one["steps"], other["steps"]):
        chosen = {mine["token"], theirs["token"]}
        tokens = chosen | (mine["listed"].keys() & theirs["listed"].keys())
        found += [_apart(token, mine["listed"], theirs["listed"]) for token in sorted(tokens)]
        steps, parted = steps + 1, len(chosen) > 1
        if parted:
            break
    return Difference(one["prompt"], steps, fmean(found or [0.0]), max(found, default=0.0), parted)


def sensitivity(said: Sequence[Said]) -> float:
    """Return how far the answers to different prompts are apart, on average of all pairs.

    Where that is next to nothing, the weights hardly look at a prompt, and nobody can tell by an
    answer whether all of it was seen.
    """
    pairs = itertools.combinations(said, 2)
    return fmean([difference(one, other).mean for one, other in pairs] or [0.0])


def _apart(token: str, mine: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Return by how much the log probability of a token differs, at least.

    A token that one side does not list is at most as likely there as the least of the listed.
    """
    values = [each[token] if token in each else min(each.values()) for each in (mine, theirs)]
    if token in mine and token in theirs:
        return abs(values[0] - values[1])
    known = 0 if token in mine else 1
    return max(0.0, values[known] - values[1 - known])


@dataclass(frozen=True)
class Found:
    """What asking gave: the checks, and what each prompt was answered alone.

    ``own`` is how far the engine is from itself, alone; ``crowd`` is the largest difference of a
    log probability between alone and in a crowd.
    """

    checks: Sequence[Check]
    said: Sequence[Said] = ()
    own: Own | None = None
    crowd: float = 0.0


def ask_all(
    http: Http,
    model: str,
    context: int,
    *,
    tolerance: float,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """Ask every prompt alone, twice, then all at once, and compare.

    ``context`` is the longest that the server takes, in tokens; ``tolerance`` by how much a log
    probability may differ between the two; ``say`` is told what is being done.
    """
    asked = prompts(context)
    if not asked:
        return Found(())
    try:
        say(f"known answers: {len(asked)} prompts, one after the other, twice")
        alone, again = (
            [ask(http, model, prompt, uuid.uuid4().hex) for prompt in asked] for _ in range(2)
        )
        say(f"known answers: {len(asked)} prompts at once")
        salt = uuid.uuid4().hex
        with ThreadPoolExecutor(len(asked)) as pool:
            crowd = list(pool.map(lambda each: ask(http, model, each, salt), asked))
    except FleetError as error:
        return Found([Check(ASKED, False, str(error))])
    own = _own([difference(one, other) for one, other in zip(alone, again)])
    found = [difference(one, other) for one, other in zip(alone, crowd)]
    worst = max(each.worst for each in found)
    check = check_crowd(found, rounding(tolerance, own["worst"]))
    return Found([check], alone, own, round(worst, 4))


def _own(found: Sequence[Difference]) -> Own:
    worst = max(each.worst for each in found)
    return Own(worst=round(worst, 4), mean=round(fmean(each.mean for each in found), 4))


def rounding(tolerance: float, own: float) -> float:
    """Return the largest difference that is taken as rounding.

    ``own`` is what the engine differs by from itself. A tolerance that was raised by hand is not
    lowered.
    """
    return max(tolerance, min(_OWN * own, _MOST * tolerance))


def check_crowd(found: Sequence[Difference], tolerance: float) -> Check:
    """Check that each prompt has the same answer alone and in a crowd."""
    wrong = [each for each in found if each.worst > tolerance]
    name = ALONE_AND_IN_A_CROWD
    if wrong:
        prompts_ = ", ".join(f"{each.prompt} by {each.worst:.2f}" for each in wrong)
        detail = (
            f"{len(wrong)} of {len(found)} prompts have another answer while others run: the log "
            f"probabilities of {prompts_} (at most {tolerance:g} is rounding)"
        )
        return Check(name, False, detail)
    worst = max(found, key=lambda each: each.worst)
    return Check(
        name,
        True,
        f"{len(found)} prompts, log probabilities differ by {worst.worst:.3f} at most "
        f"({worst.prompt}; {tolerance:g} is taken as rounding)",
    )
