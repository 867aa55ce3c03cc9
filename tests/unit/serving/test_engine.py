# SPDX-License-Identifier: Apache-2.0
"""The engine's own figures, and how a hung engine is told from a busy or a starting one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.serving import engine
from glm_fleet.serving.deployment import Places

METRICS = """\
# HELP vllm:num_requests_running x
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} 3
vllm:kv_cache_usage_perc{{engine="0"}} 0.25
vllm:iteration_tokens_total_count{{engine="0"}} {steps}
vllm:generation_tokens_total{{engine="0"}} {tokens}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1"}} 2
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.5"}} 10
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf"}} 10
vllm:time_to_first_token_seconds_count{{engine="0"}} 10
vllm:time_to_first_token_seconds_sum{{engine="0"}} 2.5
"""


class Server:
    """Answers as vLLM does; ``steps`` are made between two looks at the metrics."""

    def __init__(self, *, answers: bool = True, steps: int = 5, tokens: bool = True) -> None:
        self.answers, self.steps, self.tokens = answers, steps, tokens
        self.made = 100
        self.time_outs: set[float] = set()
        self.missed = 0
        self.kv_step = 0.0
        self.kv = 0.25

    def client(self, port: int, **options: Any) -> Any:
        self.time_outs.add(options["timeout_s"])

        def ask(path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Iterator[str]]:
            if not self.answers:
                return 0, iter(["refused"])
            if options["timeout_s"] == 5.0 and self.missed:
                self.missed -= 1
                return 0, iter(["TimeoutError: timed out"])
            if path == "/metrics":
                self.made += self.steps
                self.kv += self.kv_step
                text = METRICS.format(running=2, steps=self.made, tokens=self.made * 8)
                text = text.replace(" 0.25", f" {self.kv:.4f}")
                return 200, iter(text.splitlines())
            if path == "/v1/models":
                return 200, iter([json.dumps({"data": [{"id": "glm-5.2"}]})])
            if not self.tokens:
                return 200, iter(["error: the stream broke off: TimeoutError"])
            usage = {"choices": [{"text": "x"}], "usage": {"completion_tokens": 24}}
            return 200, iter([f"data: {json.dumps(usage)}", "data: [DONE]"])

        return ask


def system(active: str = "active", restarts: int = 0, journal: str = "") -> Any:
    def run(argv: Sequence[str], **_: Any) -> RunResult:
        if argv[0] == "journalctl":
            return RunResult(0, journal, "")
        text = f"ActiveState={active}\nNRestarts={restarts}\nInvocationID=abc\nMainPID=41\n"
        return RunResult(0, text, "")

    return run


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "attestation.json"
    path.write_text(
        json.dumps({"port": 8000, "served_model_name": "glm-5.2", "required": [], "forbidden": []})
    )
    return path


def look(server: Server, policy: Path, run: Any = None) -> dict[str, Any]:
    return engine.look(
        run or system(),
        unit="glm-serving.service",
        policy_path=policy,
        environment_path=policy.with_name("none"),
        record_path=policy.with_name("none"),
        evidence_path=policy.with_name("none"),
        proc=policy.parent,
        places=Places(deployments=policy.parent / "deployments"),
        canary_timeout_s=7.0,
        client=server.client,
    )


@pytest.mark.parametrize(
    ("server", "state"),
    [
        (Server(), "serving"),
        (Server(tokens=False), "busy"),
        (Server(tokens=False, steps=0), "hung"),
    ],
)
def test_state_of_an_engine_that_was_ready(server: Server, state: str, policy: Path) -> None:
    found = look(server, policy)
    assert found["engine"]["state"] == state
    assert found["engine"]["after"]["running"] == 2
    # A hung engine holds a health check up for as long as the canary may wait, no longer.
    assert server.time_outs == {5.0, 7.0}
    json.dumps(found)


def test_a_look_tells_the_known_answers_of_the_start_that_runs(policy: Path) -> None:
    folder = policy.parent / "deployments/0123456789ab"
    folder.mkdir(parents=True)
    (policy.parent / "deployments/current").symlink_to(folder)
    apart: dict[str, Any] = {
        "whom": "gpu02",
        "release": "r",
        "mean": 0.01,
        "rounding": 0.15,
        "moved": [],
    }
    apart["prompts"] = 8
    kept = {"prompts": "p", "release": "r", "model": "m", "said": [], "crowd": 0.09}
    for invocation, told in (("abc", {"crowd": 0.09, "apart": [apart]}), ("earlier", {})):
        text = json.dumps({**kept, "apart": [apart], "invocation": invocation})
        (folder / "answers.json").write_text(text)
        assert look(Server(), policy)["known_answers"] == told


@pytest.mark.parametrize("missed", range(1, 8))
def test_missed_looks_are_asked_again_and_are_not_death(missed: int, policy: Path) -> None:
    busy = Server(tokens=False)
    busy.missed = missed
    assert look(busy, policy)["engine"]["state"] == "busy"
    well = Server()
    well.missed = missed
    found = look(well, policy)
    assert found["engine"]["state"] == "serving"
    assert all(check["passed"] for check in found["checks"] if check["name"] == "model is served")


def test_a_lone_long_prompt_that_is_read_is_work(policy: Path) -> None:
    server = Server(tokens=False, steps=0)
    server.kv_step = 0.01
    assert look(server, policy)["engine"]["state"] == "busy"


def test_the_marks_of_a_real_prefill_differ() -> None:
    folder = Path(__file__).parents[1] / "fixtures/cases/05-lone-long-prefill"
    early, late = (
        engine.parse_sample((folder / f"metrics-{seconds}s.txt").read_text(), float(seconds))
        for seconds in (60, 180)
    )
    assert early["steps"] == late["steps"]
    assert engine.progress_mark(early) != engine.progress_mark(late)
    assert engine.progress_mark({}) is None


@pytest.mark.parametrize(
    "name",
    [
        "vllm:iteration_tokens_total_count",
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:kv_cache_usage_perc",
        "vllm:request_success_total",
        "vllm:num_preemptions_total",
    ],
)
def test_any_count_of_the_engine_is_progress(name: str) -> None:
    text = "vllm:num_requests_running 1\nvllm:num_requests_waiting {}\n" + name + " {}\n"
    before = engine.progress_mark(engine.parse_sample(text.format(0, 0.1), 1.0))
    assert engine.progress_mark(engine.parse_sample(text.format(0, 0.2), 2.0)) != before
    waits = engine.parse_sample(text.format(9, 0.1), 2.0)
    assert engine.progress_mark(waits) == before, "more who wait is no progress"


@pytest.mark.parametrize(
    ("journal", "state", "phase"),
    [
        ("Starting to load model\nshards: 4% Completed | 3/83", "starting", "loading shard 3/83"),
        ("Application startup complete", "silent", "ready"),
    ],
)
def test_a_start_is_told_from_a_server_that_fell_silent(
    journal: str, state: str, phase: str, policy: Path
) -> None:
    found = look(Server(answers=False), policy, system(journal=journal))["engine"]
    assert (found["state"], found["phase"]) == (state, phase)


def test_a_service_that_is_down_gives_its_last_words(policy: Path) -> None:
    journal = "fine\nERROR CUDA error: an illegal instruction was encountered"
    found = look(Server(), policy, system(active="failed", journal=journal))
    assert found["engine"]["state"] == "down"
    assert "serving_cuda_graphs" in found["diagnosis"]


def test_without_a_policy_there_is_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no attestation policy"):
        look(Server(), tmp_path / "none")


def test_figures_between_two_samples() -> None:
    before = engine.parse_sample(METRICS.format(running=1, steps=100, tokens=1000), 10.0)
    after = engine.parse_sample(METRICS.format(running=1, steps=150, tokens=3000), 20.0)
    assert before["first_token"]["buckets"] == [[0.1, 2.0], [0.5, 10.0]]
    figures = engine.interval(before, after)
    assert figures["steps"] == 50
    assert figures["tokens_per_second"] == 200.0
    assert figures["first_token_p50_s"] is None, "no request came in between"
    since_start = engine.interval({}, after)
    assert since_start["tokens_per_second"] is None
    assert since_start["first_token_p50_s"] == pytest.approx(0.25)
    assert engine.interval(after, before)["tokens_per_second"] is None, "another start"
    assert engine.interval(before, {}) == {}
    assert engine.parse_sample("something else", 1.0) == {}


def test_quantiles() -> None:
    assert engine.quantile([[1.0, 5.0], [2.0, 10.0]], 10, 0.75) == 1.5
    assert engine.quantile([[1.0, 5.0], [2.0, 10.0]], 20, 0.99) == 2.0
    assert engine.quantile([], 0, 0.5) is None
