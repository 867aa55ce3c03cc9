# SPDX-License-Identifier: Apache-2.0
"""Attestation: may this node take traffic?

It trusts what runs, not what lies on the disk: the journal of this very start, the files
that the server has mapped, the record of the pre-start check, and answers of the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.check import Check
from ..core.files import exclusive, write_atomically
from ..core.http import Http
from ..core.runner import Runner
from ..core.systemd import journal
from .answers import ASKED
from .client import ANSWER_TOKENS, Answer, complete, served_model
from .diagnosis import diagnose, lower_graphs_help, relevant_lines
from .evidence import EVIDENCE, check_journal, read_evidence
from .kept_answers import Known, Proof, Start, prove
from .metrics import read_metrics
from .policy import Policy
from .probe import Canary, CheckOutcome, Probe
from .record import START_RECORD, read_running, running_release
from .startup import CHECKED_LINES

WRONG = "it answers wrongly"
_LONG_PROMPT_TOKENS = 2304  # above 2048, where engines died that had passed a short test


def run_canary(
    http: Http, model: str, context: int, *, thorough: bool
) -> tuple[list[Check], Canary]:
    """Ask the model itself; return the checks and the figures of the first answer.

    A short prompt always. With ``thorough``: the same again (a shared prefix, and the greedy
    answer repeats itself), and twice a prompt above 2048 tokens where the context allows.
    """
    prompt = "The capital of France is Paris. The capital of Japan is"
    before = read_metrics(http)
    first = complete(http, model, prompt)
    checks = [_answered("canary answers", first)]
    if thorough and not first.problem:
        again = complete(http, model, prompt)
        checks.append(_answered("same prefix again", again))
        checks.append(
            Check("greedy answer repeats", again.text == first.text, repr(again.text[:60]))
        )
        if context >= _LONG_PROMPT_TOKENS + ANSWER_TOKENS:
            # Token ids, so that the length is exact with any tokenizer.
            ids = [10 + each % 97 for each in range(_LONG_PROMPT_TOKENS)]
            for name in ("prompt above 2048 tokens", "the same long prompt again"):
                checks.append(_answered(name, complete(http, model, ids)))
    after = read_metrics(http)
    name = "vllm:generation_tokens_total"
    advanced = after.get(name, 0.0) - before.get(name, 0.0)
    checks.append(Check("tokens advance in the metrics", advanced > 0, f"{advanced:g} tokens"))
    # The first answer may have been compiled in; the last short one is what clients see.
    measured = again if thorough and not first.problem else first
    figures: Canary = {
        "tokens_per_second": round(measured.tokens_per_second, 2),
        "time_to_first_token_s": round(measured.first_token_s, 4),
        "completion_tokens": measured.tokens,
        "text": measured.text,
        "first_answer_s": round(first.total_s, 2),
    }
    return checks, figures


def _answered(name: str, answer: Answer) -> Check:
    if answer.problem:
        return Check(name, False, answer.problem)
    detail = (
        f"{answer.prompt_tokens} + {answer.tokens} tokens in {answer.total_s:.2f} s, "
        f"first after {answer.first_token_s:.2f} s"
    )
    return Check(name, answer.tokens > 0, detail)


# What an attestation tells of the load, from the server's metrics.
_METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens_total",
)


@dataclass(frozen=True)
class Wanted:
    """What the attestation expects of a node; empty ids mean: whatever runs.

    ``known`` says how known answers are judged, None where none are asked for.
    """

    unit: str
    model_name: str
    release: str
    model: str
    required: Sequence[str]
    forbidden: Sequence[str]
    known: Known | None = None


def wanted_by(
    policy: Policy, unit: str, *, release: str = "", model: str = "", known: Known | None = None
) -> Wanted:
    """Return what a node's policy expects."""
    return Wanted(
        unit=unit,
        model_name=policy["served_model_name"],
        release=release,
        model=model,
        required=policy["required"],
        forbidden=policy["forbidden"],
        known=known,
    )


def attest(
    runner: Runner,
    http: Http,
    wanted: Wanted,
    *,
    thorough: bool,
    record_path: Path = START_RECORD,
    evidence_path: Path = EVIDENCE,
    proc: Path = Path("/proc"),
) -> Probe:
    """Check everything and return the attestation.

    A thorough one asks for known answers. If it passes it keeps them, and leaves the lines of the
    journal that prove it in ``evidence_path``, for later checks of the same start. Two of them
    wait for each other: beside other requests a greedy answer need not repeat itself.
    """
    if thorough:
        evidence_path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(evidence_path.with_name("attest.lock")):
            return _attest(runner, http, wanted, True, record_path, evidence_path, proc)
    return _attest(runner, http, wanted, False, record_path, evidence_path, proc)


def _attest(
    runner: Runner,
    http: Http,
    wanted: Wanted,
    thorough: bool,
    record_path: Path,
    evidence_path: Path,
    proc: Path,
) -> Probe:
    running = read_running(runner, wanted.unit, record_path)
    unit, record = running["unit"], running["record"]
    known = read_evidence(evidence_path, running["invocation"])
    # What was proven needs no second look at months of requests: only at what came since.
    proven = not thorough and set(wanted.required) <= set(known)
    lines = journal(runner, running["invocation"], CHECKED_LINES if proven else None)
    checks = [
        Check("unit is active", running["active"], f"{unit['active_state']} {unit['result']}")
    ]
    canary: Canary = {}
    proof: list[Check] = []
    metrics: dict[str, float] = {}
    answers = Proof()
    release = running_release(unit["main_pid"], proc)
    recorded = record.get("invocation") == running["invocation"]
    model_id = record.get("model", "") if recorded else ""
    if running["active"]:
        checks += _what_runs(release, model_id, wanted, record.get("release"))
        proof = check_journal(lines, wanted.required, wanted.forbidden, known)
        checks += proof
        start = Start(release, model_id, running["invocation"], 0)
        sound = all(check.passed for check in checks)
        asked, canary, answers = _ask(http, wanted, start, thorough=thorough, sound=sound)
        checks += asked
        told = read_metrics(http)
        metrics = {key: told[key] for key in _METRICS if key in told}
    passed = all(check.passed for check in checks)
    if passed and thorough:
        evidence = dict(zip(wanted.required, (check.detail for check in proof)))
        write_atomically(
            evidence_path, json.dumps({**evidence, "invocation": running["invocation"]})
        )
        if answers.answers and wanted.known:
            wanted.known.store.note_answers(answers.answers)
    cause = ("", False, []) if passed else _cause(runner, running["invocation"], answers)
    found: Probe = {
        "passed": passed,
        "checks": _outcomes(checks),
        "release_id": release,
        "model_id": model_id,
        "invocation_id": running["invocation"],
        "started_at": unit["active_since"],
        "unit": unit,
        "canary": canary,
        "metrics": metrics,
        "diagnosis": cause[0],
        "step_down": cause[1],
        "journal": cause[2],
    }
    return {**found, "answers": answers.answers} if answers.answers else found


def _cause(runner: Runner, invocation: str, proof: Proof) -> tuple[str, bool, Sequence[str]]:
    """Return diagnosis, whether a lower mode of CUDA graphs may help, and lines of the journal.

    The journal is read once more: an engine that died of a question has only now said why.
    """
    lines = journal(runner, invocation)
    cause = _wrong_answers(proof) or diagnose(lines)
    return cause, lower_graphs_help(lines), relevant_lines(lines)


def _wrong_answers(proof: Proof) -> str:
    """Say in which way a server that answers is wrong, '' if it is not."""
    failed = [each for each in proof.checks if not each.passed and each.name != ASKED]
    return "; ".join(f"{WRONG}: {each.name}: {each.detail}" for each in failed)


def remedy(found: Probe) -> str:
    """Say what to do about an attestation that failed."""
    if found["diagnosis"].startswith(WRONG):
        # What was found is told already.
        return f"{WRONG}: docs/answers.md says what each of these checks means"
    return found["diagnosis"] or "read `journalctl -u glm-serving` on the node"


def _outcomes(checks: Sequence[Check]) -> list[CheckOutcome]:
    return [{"name": each.name, "passed": each.passed, "detail": each.detail} for each in checks]


def _ask(
    http: Http, wanted: Wanted, start: Start, *, thorough: bool, sound: bool
) -> tuple[list[Check], Canary, Proof]:
    """Ask the server as a client does: for its model, for a canary, and for known answers.

    For the last only a thorough attestation asks, of a start that is ``sound`` so far.
    """
    served, context = served_model(http, wanted.model_name)
    if not served.passed:
        return [served], {}, Proof()
    more, canary = run_canary(http, wanted.model_name, context, thorough=thorough)
    checks = [served, *more]
    # What does not answer at all need not be asked for more.
    if not (thorough and wanted.known and sound and all(check.passed for check in checks)):
        return checks, canary, Proof()
    start = replace(start, context=context)
    answers = prove(http, wanted.model_name, start, wanted.known)
    return [*checks, *answers.checks], canary, answers


def _what_runs(
    release: str, model: str, wanted: Wanted, recorded_release: str | None
) -> list[Check]:
    """Compare the libraries that are mapped, and the model that was recorded, with what is wanted.

    Without a wanted release, what the pre-start check recorded of this start is wanted.
    """
    wanted_release = wanted.release or recorded_release
    return [
        Check(
            "release that runs",
            bool(release) and release == wanted_release,
            f"{release or 'unknown'}, wanted {wanted_release}",
        ),
        Check(
            "model that runs",
            bool(model) and model == (wanted.model or model),
            f"{model or 'unknown'}, wanted {wanted.model or 'any'}",
        ),
    ]
