# SPDX-License-Identifier: Apache-2.0
"""Needles: a code word hidden in a long text has to be found, by eight requests at once.

This needs a model that follows instructions. It catches what forgets a part of a long prompt:
its first tokens, its middle, or what lies beyond a limit.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..core.check import Check
from ..core.errors import FleetError
from ..core.http import Http
from .answers import ASKED
from .client import chat

# Tokens of the shorter texts; the longer ones take half of the context.
_TOKENS = 3000
# An English sentence of these words takes at most so many tokens with any tokenizer of today.
_SENTENCE = "The grass is green and the sky is blue over the {number} hills of the {place}."
_PLACES = ("north", "south", "east", "west", "coast", "valley", "island", "plain")
_SENTENCE_TOKENS = 20
_CODES = ("KESTREL", "MARBLE", "LANTERN", "ORCHID", "SALMON", "COPPER", "WILLOW", "THUNDER")
_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Needle:
    """A text with a code word: where it is hidden, and the text."""

    code: str
    place: str
    text: str


def needles(context: int) -> list[Needle]:
    """Return eight texts with a word of its own each; [] where the context is too short.

    Six take about 3,000 tokens, and two half of the context.
    """
    if context < _TOKENS + 1000:
        return []
    half = max(_TOKENS, context // 2)
    sizes = (_TOKENS,) * 6 + (half,) * 2
    wheres = ("beginning", "middle", "end", "beginning", "middle", "end", "beginning", "middle")
    return [
        _needle(number, tokens, where) for number, (tokens, where) in enumerate(zip(sizes, wheres))
    ]


def _needle(number: int, tokens: int, where: str) -> Needle:
    code = f"{_CODES[number]}-{4096 + 613 * number}"
    filler = [
        _SENTENCE.format(number=each + number, place=_PLACES[(each + number) % 8])
        for each in range(tokens // _SENTENCE_TOKENS)
    ]
    secret = f"Remember this: the code word is {code}."
    # At the beginning, the sentence lies within the first forty tokens of the text.
    at = {"beginning": 0, "middle": len(filler) // 2, "end": len(filler)}[where]
    filler.insert(at, secret)
    text = " ".join(filler) + "\n\nWhat is the code word? Answer with the code word alone."
    return Needle(code, f"{where} of about {tokens} tokens", text)


def check_needles(http: Http, model: str, context: int) -> list[Check]:
    """Ask for all code words at once; [] where the context is too short for that."""
    hidden = needles(context)
    if not hidden:
        return []

    def ask(needle: Needle) -> str:
        what = f"The question for {needle.code}"
        return chat(http, model, needle.text, tokens=_ANSWER_TOKENS, what=what)

    try:
        with ThreadPoolExecutor(len(hidden)) as pool:
            answers = list(pool.map(ask, hidden))
    except FleetError as error:
        return [Check(ASKED, False, str(error))]
    lost = [
        f"{each.code} at the {each.place}: {answer[:60]!r}"
        for each, answer in zip(hidden, answers)
        if each.code not in answer
    ]
    detail = "; ".join(lost) or f"all {len(hidden)}, asked at once"
    return [Check("code words are found in long texts", not lost, detail)]
