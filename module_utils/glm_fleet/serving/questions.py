# SPDX-License-Identifier: Apache-2.0
"""What a server is asked whose weights are random: it has to answer, whatever it says.

Releases died of each of these after a short prompt was answered: a second request with the same
beginning, a prompt above the 2,048 tokens that the sparse attention selects, one that is read in
several chunks, and many such sequences that generate at once. And what it says has to be the same
alone and in a crowd.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Callable

from ..core.check import Check
from ..core.http import Http
from .answers import ask_all, sensitivity
from .client import ANSWER_TOKENS, Answer, complete, served_model
from .metrics import read_metrics

# Above what the sparse attention selects.
_LONG_TOKENS = 2304
# Enough that the first sequence still generates when the last one has been read.
_TOGETHER_TOKENS = 64
_LONGEST_TOKENS = 20_000
_MOST_SEQUENCES = 32
_PROMPT = "The capital of France is Paris. The capital of Japan is"


def prompt_ids(length: int, start: int = 0) -> list[int]:
    """Return a prompt as token ids, so that its length is exact with any tokenizer.

    Prompts of another ``start`` have no beginning in common.
    """
    return [10 + (start * 31 + each * 7) % 97 for each in range(length)]


def together_lengths(context: int, sequences: int) -> list[int]:
    """Return lengths in tokens of prompts that are asked at once, ragged and off every block."""
    longest = max(1, context - _TOGETHER_TOKENS)
    if longest <= _LONG_TOKENS:
        return [max(1, longest - each) for each in range(sequences)]
    span = min(longest - 2049, 1500)
    return [2049 + (each * 211) % span for each in range(sequences)]


def ask_questions(
    http: Http,
    model: str,
    *,
    tolerance: float,
    sequences: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Ask them all, until one is not answered; return the outcome of each.

    ``sequences`` is how many the server takes at once (0: what it does by itself), ``tolerance``
    how far log probabilities may be apart alone and in a crowd: see `answers.ask_all`. ``say`` is
    told what is asked next.
    """
    served, context = served_model(http, model)
    checks = [served]
    if not served.passed:
        return checks
    before = read_metrics(http).get(_GENERATED, 0.0)

    def ask(name: str, prompt: str | Sequence[int]) -> None:
        if checks[-1].passed:
            say(name)
            checks.append(_outcome(name, [complete(http, model, prompt)]))

    ask("a short prompt", _PROMPT)
    ask("the same again", _PROMPT)
    room = context - ANSWER_TOKENS
    if room >= _LONG_TOKENS:
        ask(f"a prompt of {_LONG_TOKENS} tokens", prompt_ids(_LONG_TOKENS))
        ask(f"the same {_LONG_TOKENS} tokens again", prompt_ids(_LONG_TOKENS))
    if room > 2 * _LONG_TOKENS:
        longest = min(room, _LONGEST_TOKENS)
        ask(f"a prompt of {longest} tokens", prompt_ids(longest, 1))
    if checks[-1].passed:
        checks.append(_together(http, model, context, sequences, say))
    if checks[-1].passed:
        found = ask_all(http, model, context, tolerance=tolerance, say=say)
        checks += [_as_seen(each, sensitivity(found.said), tolerance) for each in found.checks]
    if checks[-1].passed:
        advanced = read_metrics(http).get(_GENERATED, 0.0) - before
        checks.append(Check("tokens advance in the metrics", advanced > 0, f"{advanced:g} tokens"))
    return checks


_GENERATED = "vllm:generation_tokens_total"


def _as_seen(check: Check, sensitivity: float, tolerance: float) -> Check:
    """Say so where the same answers prove little: vLLM's random weights are very small."""
    if not check.passed or sensitivity > tolerance:
        return check
    return replace(
        check,
        detail=f"{check.detail}; these weights answer different prompts alike (by "
        f"{sensitivity:.3f}), so this shows that it answers, and little of whether it is right",
    )


def _together(
    http: Http, model: str, context: int, sequences: int, say: Callable[[str], None]
) -> Check:
    """Ask as many long prompts at once as the server takes, each of another length."""
    count = min(sequences or _MOST_SEQUENCES, _MOST_SEQUENCES)
    lengths = together_lengths(context, count)
    name = f"{count} sequences of {min(lengths)} to {max(lengths)} tokens at once"
    say(name)
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(complete, http, model, prompt_ids(length, 2 + number),
                        tokens=_TOGETHER_TOKENS)
            for number, length in enumerate(lengths)
        ]  # fmt: skip
        return _outcome(name, [job.result() for job in jobs])


def _outcome(name: str, answers: Sequence[Answer]) -> Check:
    problems = [each.problem or "no token" for each in answers if each.problem or not each.tokens]
    if problems:
        of = f" ({len(problems)} of {len(answers)})" if len(answers) > 1 else ""
        return Check(name, False, f"{problems[0]}{of}")
    tokens, seconds = sum(each.tokens for each in answers), max(each.total_s for each in answers)
    return Check(name, True, f"{tokens} tokens in {seconds:.2f} s")
