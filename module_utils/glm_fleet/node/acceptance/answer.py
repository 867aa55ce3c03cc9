# SPDX-License-Identifier: Apache-2.0
"""What the trials of an acceptance answer, as types: see `release.proof.trial`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from ...core.decode import Amount, Count, Size, Words, decode


class _RowOptional(TypedDict, total=False):
    seed: Count
    outside: Count
    wrong: Count
    of: Count
    worst: Amount
    error: Words
    seconds: Amount


class KernelRow(_RowOptional):
    """One case with one seed: values outside the result, wrong ones, the worst difference."""

    case: Words


class Kernels(TypedDict, total=False):
    """The release's kernels on a GPU; ``missing`` names what they cannot be run without."""

    rows: Annotated[Sequence[KernelRow], Size(1000)]
    missing: Words


class Load(TypedDict):
    """Products, memory and bandwidth of a GPU: see `trial.load`."""

    begun: Amount
    ended: Amount
    digests: Annotated[Sequence[Words], Size(100)]
    differences: Count
    tflops: Amount
    gbytes_per_second: Amount
    memory_tested_bytes: Count
    memory_wrong: Count


class Together(TypedDict, total=False):
    """All-reduce as one rank saw it; ``peers`` are pairs that reach each other's memory."""

    wrong: Count
    of: Count
    bus_gbytes_per_second: Amount
    microseconds: Amount
    peers: Annotated[Sequence[Sequence[Count]], Size(1_000_000)]


class Sampled(TypedDict, total=False):
    """What the driver said of a GPU under load; the clock is the median, the rest the worst."""

    samples: Count
    sm_clock_mhz: Count | None
    sm_clock_max_mhz: Count | None
    temperature_c: int | None
    power_w: Amount | None
    throttle_reasons: Sequence[Words]


class _TrialOptional(TypedDict, total=False):
    uuid: Words
    serial: Words
    name: Words
    kernels: Kernels
    load: Load
    together: Together
    sampled: Sampled
    errors: Mapping[str, Words]


class GpuTrial(_TrialOptional):
    """Everything about one GPU; ``errors`` says of a trial without an answer what came instead."""

    index: Count


class Outcome(TypedDict, total=False):
    """What came of a trial on one GPU: its answer, or what was said instead."""

    answer: Any
    said: Words


def read_outcomes(answer: Any) -> list[Outcome]:
    """Check what a trial gave for all GPUs; raises `FleetError`."""
    return decode(list[Outcome], answer, what="What the trial gave")


def read_kernels(answer: Any) -> Kernels:
    """Check what the trial ``kernels`` answered; raises `FleetError`."""
    return decode(Kernels, answer, what="The answer of the kernels' trial")


def read_load(answer: Any) -> Load:
    """Check what the trial ``load`` answered; raises `FleetError`."""
    return decode(Load, answer, what="The answer of the load's trial")


def read_together(answer: Any) -> Together:
    """Check what the trial ``together`` answered; raises `FleetError`."""
    return decode(Together, answer, what="The answer of the trial of all GPUs")
