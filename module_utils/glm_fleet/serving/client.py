# SPDX-License-Identifier: Apache-2.0
"""One answer asked of a server, and what came back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Callable, TypedDict

from ..core.check import Check
from ..core.decode import Count, Size, Words, parse
from ..core.errors import FleetError
from ..core.http import Http

ANSWER_TOKENS = 24
# Far more than the lines of any answer that is asked for here.
_MOST_LINES = 100_000


class _Choice(TypedDict, total=False):
    text: Words


class _Usage(TypedDict, total=False):
    completion_tokens: Count | None
    prompt_tokens: Count | None


class _Event(TypedDict, total=False):
    choices: Sequence[_Choice]
    usage: _Usage | None
    error: Any


class _Message(TypedDict):
    content: Words | None


class _Said(TypedDict):
    message: _Message


class _Chat(TypedDict):
    choices: Annotated[Sequence[_Said], Size(8)]


class _ModelOptional(TypedDict, total=False):
    max_model_len: Count | None


class _Model(_ModelOptional):
    id: Words


class _Models(TypedDict):
    data: Sequence[_Model]


@dataclass(frozen=True)
class Answer:
    """One completion: its text, tokens, seconds to the first token and in all."""

    text: str
    tokens: int
    prompt_tokens: int
    first_token_s: float
    total_s: float
    problem: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the whole time of the request.

        Not over the time after the first token: a busy client reads a short answer in one
        go, and would measure itself.
        """
        return self.tokens / self.total_s if self.total_s > 0 else 0.0


def complete(
    http: Http,
    model: str,
    prompt: str | Sequence[int],
    *,
    tokens: int = ANSWER_TOKENS,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Ask for a greedy completion and measure it as a client sees it."""
    start = clock()
    first = 0.0
    text, used, prompt_used, ended = "", 0, 0, False
    body = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, lines = http("/v1/completions", body)
    if status != 200:
        return Answer("", 0, 0, 0.0, 0.0, f"HTTP {status}: {''.join(lines)[:200]}")
    for number, line in enumerate(lines):
        if number > _MOST_LINES:
            break
        if not line.startswith("data: "):
            if line.startswith("error"):
                return Answer(text, used, 0, first, clock() - start, line[:200])
            continue
        if line == "data: [DONE]":
            ended = True
            break
        try:
            event = parse(_Event, line[len("data: ") :], what="The completion")
        except FleetError as error:
            return Answer(text, used, 0, first, clock() - start, f"{error} It said: {line[:100]}")
        if "error" in event:
            return Answer(text, used, 0, first, clock() - start, str(event["error"])[:200])
        for choice in event.get("choices", ()):
            if not first:
                first = clock() - start
            text += choice.get("text", "")
        usage = event.get("usage") or _Usage()
        used = usage.get("completion_tokens") or used
        prompt_used = usage.get("prompt_tokens") or prompt_used
    problem = "" if ended else "the stream ended before its end"
    return Answer(text, used, prompt_used, first, clock() - start, problem)


def chat(http: Http, model: str, text: str, *, tokens: int, what: str) -> str:
    """Return the greedy answer to a question; raises `FleetError`, which calls it ``what``."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        # A model that thinks aloud would not come to the answer.
        "chat_template_kwargs": {"enable_thinking": False},
    }
    status, lines = http("/v1/chat/completions", body)
    said = "\n".join(lines)
    if status != 200:
        raise FleetError(
            f"{what} is not answered", expected="HTTP 200", found=f"{status}: {said[:200]}"
        )
    choices = parse(_Chat, said, what=f"The answer to: {what}")["choices"]
    return (choices[0]["message"]["content"] or "") if choices else ""


def served_model(http: Http, model: str) -> tuple[Check, int]:
    """Check that ``/v1/models`` names the model; return its longest context in tokens too."""
    status, lines = http("/v1/models")
    text = "\n".join(lines)
    if status != 200:
        return Check("model is served", False, f"HTTP {status}: {text[:120]}"), 0
    try:
        entries = parse(_Models, text, what="The list of models")["data"]
    except FleetError:
        return Check("model is served", False, f"something else answers: {text[:120]}"), 0
    names = [each["id"] for each in entries]
    length = max((each.get("max_model_len") or 0 for each in entries), default=0)
    return Check("model is served", model in names, ", ".join(names) or "none"), length
