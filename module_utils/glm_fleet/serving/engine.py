# SPDX-License-Identifier: Apache-2.0
"""How the engine of a node is doing: what it serves, how fast, and whether it moves at all.

``/health`` answers 200 from a hung engine for hours. What cannot lie are the counts of what the
engine has done: all of them stand still while a request waits only when the engine hangs. One
alone can: while a lone long prompt is read in chunks, no step is counted and no token comes
(vLLM 0.20.2 to 0.33.0), and only the KV cache fills.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

from ..core.http import Http, local_http
from ..core.runner import Runner
from ..core.systemd import UnitState, journal, last_words, unit_state
from .attestation import attest, wanted_by
from .deployment import ENVIRONMENT, POLICY, Deployments, Places
from .diagnosis import diagnose, relevant_lines
from .evidence import EVIDENCE
from .metrics import parse_metrics
from .policy import Modes, Policy, read_api_key, read_policy
from .probe import (
    CheckOutcome,
    EngineLook,
    EngineState,
    Graphs,
    KnownAnswers,
    Nothing,
    Probe,
    Sample,
)
from .record import START_RECORD
from .startup import start_phase

POLICY_PATH = Places().etc / POLICY
ENVIRONMENT_PATH = Places().etc / ENVIRONMENT
# What the server says of itself is in its memory and comes at once, also under load.
_QUICK_S = 5.0
_PLACES = Places()
_GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
}
_COUNTERS = {
    "steps": "vllm:iteration_tokens_total_count",
    "generated_tokens": "vllm:generation_tokens_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "requests": "vllm:request_success_total",
    "preemptions": "vllm:num_preemptions_total",
}
# An engine that changes any of these is at work.
_MOVING = (*_COUNTERS, "kv_cache_usage")
_HISTOGRAMS = {
    "first_token": "vllm:time_to_first_token_seconds",
    "between_tokens": "vllm:inter_token_latency_seconds",
}
_BUCKET = re.compile(r'^(?P<name>[\w:]+)_bucket\{.*?le="(?P<le>[^"]+)".*\}\s+(?P<count>\S+)')


def parse_sample(text: str, now: float) -> Sample | Nothing:
    """Pick the engine's figures out of ``/metrics``; {} when they are not there.

    Gauges and counters by their names here, and each histogram as {count, sum, buckets},
    ``buckets`` being [upper bound in seconds, requests up to it] in rising order.
    """
    totals = parse_metrics(text)
    if _GAUGES["running"] not in totals:
        return {}
    sample: dict[str, Any] = {"time_s": round(now, 3)}
    for key, name in {**_GAUGES, **_COUNTERS}.items():
        sample[key] = totals.get(name, 0.0)
    buckets: dict[str, dict[float, float]] = {name: {} for name in _HISTOGRAMS.values()}
    for line in text.splitlines():
        match = _BUCKET.match(line)
        if match and match["name"] in buckets:
            try:
                bound, count = float(match["le"]), float(match["count"])
            except ValueError:
                continue
            counts = buckets[match["name"]]
            total = counts.get(bound, 0.0) + count
            # The last bound is +Inf, which every request is below.
            if math.isfinite(bound) and math.isfinite(total):
                counts[bound] = total
    for key, name in _HISTOGRAMS.items():
        bounded = [[bound, count] for bound, count in buckets[name].items()]
        sample[key] = {
            "count": totals.get(f"{name}_count", 0.0),
            "sum": totals.get(f"{name}_sum", 0.0),
            "buckets": sorted(bounded),
        }
    return sample


def read_sample(http: Http, clock: Callable[[], float] = time.time) -> Sample | Nothing:
    """Ask the server for its figures; {} when it does not answer."""
    status, lines = http("/metrics")
    return parse_sample("\n".join(lines), clock()) if status == 200 else {}


def progress_mark(sample: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return what differs between two samples of an engine that moves; None without a sample."""
    return tuple(float(sample.get(key, 0.0)) for key in _MOVING) if sample else None


def quantile(buckets: Sequence[Sequence[float]], count: float, share: float) -> float | None:
    """Estimate a quantile of a histogram, as Prometheus does; None when it is empty.

    A value above the highest bound is given as that bound.
    """
    if count <= 0 or not buckets:
        return None
    rank = share * count
    below_bound, below_count = 0.0, 0.0
    for bound, upto in buckets:
        if upto >= rank:
            inside = upto - below_count
            part = (rank - below_count) / inside if inside > 0 else 1.0
            return float(below_bound + (bound - below_bound) * part)
        below_bound, below_count = bound, upto
    return float(below_bound)


def interval(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the engine did between two samples of one start.

    Without ``before``, or when its counts are higher (another start), since the start:
    then no rate is known. Seconds and tokens per second; quantiles are None without requests.
    """
    if not after:
        return {}
    same = bool(before) and all(before.get(key, 0) <= after[key] for key in _COUNTERS)
    seconds = after["time_s"] - before["time_s"] if same else 0.0
    figures: dict[str, Any] = {"seconds": round(seconds, 1) if seconds > 0 else None}
    for key in _COUNTERS:
        figures[key] = after[key] - (before[key] if same else 0.0)
    figures["tokens_per_second"] = (
        round(figures["generated_tokens"] / seconds, 2) if seconds > 0 else None
    )
    for key in _HISTOGRAMS:
        earlier = dict(before[key]["buckets"]) if same else {}
        count = after[key]["count"] - (before[key]["count"] if same else 0.0)
        buckets = [[bound, upto - earlier.get(bound, 0.0)] for bound, upto in after[key]["buckets"]]
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            found = quantile(buckets, count, share)
            figures[f"{key}_{name}_s"] = None if found is None else round(found, 4)
    return figures


def look(
    run: Runner,
    *,
    unit: str,
    release: str = "",
    model: str = "",
    canary_timeout_s: float = 20.0,
    policy_path: Path = POLICY_PATH,
    environment_path: Path = ENVIRONMENT_PATH,
    record_path: Path = START_RECORD,
    evidence_path: Path = EVIDENCE,
    proc: Path = Path("/proc"),
    places: Places = _PLACES,
    client: Callable[..., Http] = local_http,
) -> Probe:
    """Look at the service of this node once, without disturbing it.

    An active one gives its attestation with one short canary, and ``engine``: {state,
    phase, before, after, steps, tokens, seconds}. ``state`` is one of

    - serving: the canary was answered;
    - busy: it was not answered in time, but the engine moves;
    - hung: it was not, and nothing that the engine counts changed meanwhile;
    - starting: nothing answers yet, ``phase`` says how far the start has come;
    - silent: the server does not answer although it was ready.

    One that is not active gives the last words of its journal. `FleetError` without a policy.
    """
    state = unit_state(run, unit)
    if state["active_state"] != "active":
        return _down(run, state, unit)
    policy = read_policy(policy_path)
    ask = _open(client, policy, read_api_key(environment_path), canary_timeout_s)
    begun = time.monotonic()
    before = read_sample(ask)
    if not before:
        return _without_answer(run, state, unit)
    found = attest(
        run,
        ask,
        wanted_by(policy, unit, release=release, model=model),
        thorough=False,
        record_path=record_path,
        evidence_path=evidence_path,
        proc=proc,
    )
    deployments = Deployments(places)
    ran = (found["release_id"], found["model_id"])
    found["cuda_graphs"] = _graphs(policy["cuda_graphs"], *ran, deployments)
    found["known_answers"] = _known_answers(found["invocation_id"], deployments)
    found["engine"] = _judge(before, read_sample(ask), found["checks"])
    found["engine"]["seconds"] = round(time.monotonic() - begun, 3)
    return found


def _open(client: Callable[..., Http], policy: Policy, key: str, canary_timeout_s: float) -> Http:
    """Return a client of the engine that waits ``canary_timeout_s`` seconds for a completion."""
    quick, patient = (
        client(policy["port"], address=policy["address"], api_key=key, timeout_s=timeout_s)
        for timeout_s in (_QUICK_S, canary_timeout_s)
    )

    def ask(path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Iterator[str]]:
        status, lines = (quick if body is None else patient)(path, body)
        # A busy server can be late once: that is asked again, with more patience.
        return (status, lines) if status or body is not None else patient(path, body)

    return ask


def _judge(
    before: Sample | Nothing, after: Sample | Nothing, checks: Sequence[CheckOutcome]
) -> EngineLook:
    """Say how the engine is doing from its figures before and after a canary."""
    answered = all(each["passed"] for each in checks if each["name"] == "canary answers")
    moves = progress_mark(before) != progress_mark(after)
    verdict: EngineState = "serving" if answered else "busy" if moves else "hung"
    progress = interval(before, after)
    return {
        "state": verdict if after else "silent",
        "phase": "ready",
        "before": before,
        "after": after,
        "steps": progress.get("steps", 0.0),
        "tokens": progress.get("generated_tokens", 0.0),
    }


def _down(run: Runner, state: UnitState, unit: str) -> Probe:
    """Give the last words of a service that is not active."""
    words = last_words(run, unit)
    return {
        "unit": state,
        "diagnosis": diagnose(words),
        "journal": relevant_lines(words),
        "engine": {"state": "down", "phase": start_phase(words)},
    }


def _graphs(modes: Modes, release: str, model: str, deployments: Deployments) -> Graphs:
    """Say which CUDA graphs run, which were wanted, and why they differ."""
    runs, wanted = modes.get("runs", ""), modes.get("wanted", "")
    reason = ""
    if runs != wanted:
        reason = deployments.why_not(release, model, wanted)
    return {"runs": runs, "wanted": wanted, "reason": reason}


def _known_answers(invocation: str, deployments: Deployments) -> KnownAnswers:
    """Return the figures of the known answers of this start, {} where none were asked for."""
    kept = deployments.answers(deployments.current())
    if not kept or kept["invocation"] != invocation:
        return {}
    figures: KnownAnswers = {"crowd": kept.get("crowd", 0.0), "apart": kept.get("apart", ())}
    return {**figures, "own": kept["own"]} if "own" in kept else figures


def _without_answer(run: Runner, state: UnitState, unit: str) -> Probe:
    """Tell a start that is under way from a server that was ready and fell silent."""
    lines = journal(run, state["invocation_id"])
    phase = start_phase(lines)
    words = last_words(run, unit) if state["n_restarts"] else lines
    return {
        "unit": state,
        "passed": False,
        "checks": [],
        "diagnosis": diagnose(words),
        "journal": relevant_lines(words),
        "engine": {"state": "silent" if phase == "ready" else "starting", "phase": phase},
    }
