# SPDX-License-Identifier: Apache-2.0
"""What a look at the engine of a node gives, as types: see `engine.look` and `attestation.attest`.

The controller reads the answers of nodes by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NoReturn, TypedDict

from ..core.decode import Amount, Count, Range, Size, Words
from ..core.systemd import UnitState
from .answers import Answers, Apart, Own

EngineState = Literal["serving", "busy", "hung", "starting", "silent", "down", ""]
Speed = Annotated[float, Range(0.0, 1e7)]


class Histogram(TypedDict):
    """Requests by seconds: ``buckets`` are (upper bound, requests up to it), bounds rising."""

    count: Amount
    sum: Amount
    buckets: Annotated[Sequence[tuple[Amount, Amount]], Size(1000)]


class Sample(TypedDict):
    """The engine's figures at ``time_s``, in seconds since 1970: see `engine.parse_sample`."""

    time_s: Amount
    running: Amount
    waiting: Amount
    kv_cache_usage: Amount
    steps: Amount
    generated_tokens: Amount
    prompt_tokens: Amount
    requests: Amount
    preemptions: Amount
    first_token: Histogram
    between_tokens: Histogram


# A server that gave no figures: {}.
Nothing = Mapping[str, NoReturn]


class EngineLook(TypedDict, total=False):
    """How the engine is doing; ``before`` and ``after`` are {} where it gave no figures."""

    state: EngineState
    phase: Words
    before: Sample | Nothing
    after: Sample | Nothing
    steps: Amount
    tokens: Amount
    seconds: Amount


class CheckOutcome(TypedDict):
    """One point of the attestation."""

    name: Words
    passed: bool
    detail: Words


class Canary(TypedDict, total=False):
    """What the canary request measured."""

    tokens_per_second: Speed
    time_to_first_token_s: Amount
    completion_tokens: Count
    text: Words
    first_answer_s: Amount


class Graphs(TypedDict, total=False):
    """The modes of CUDA graphs: the one that runs, the one that was wanted, why they differ."""

    runs: Words
    wanted: Words
    reason: Words


class KnownAnswers(TypedDict, total=False):
    """How far known answers were from others when the start that runs was attested."""

    own: Own
    crowd: Amount
    apart: Annotated[Sequence[Apart], Size(100)]


class Probe(TypedDict, total=False):
    """The attestation of a node, or why there is none."""

    passed: bool
    checks: Annotated[Sequence[CheckOutcome], Size(1000)]
    release_id: Words
    model_id: Words
    invocation_id: Words
    started_at: Words
    unit: UnitState
    canary: Canary
    metrics: Mapping[str, Amount]
    diagnosis: Words
    step_down: bool
    journal: Annotated[Sequence[Words], Size(10_000)]
    cuda_graphs: Graphs
    engine: EngineLook
    # What was answered, with the figures by which it was judged. A look has the figures alone.
    answers: Answers
    known_answers: KnownAnswers
