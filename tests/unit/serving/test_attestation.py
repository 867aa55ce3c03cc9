# SPDX-License-Identifier: Apache-2.0
"""The attestation, on journals of real starts and against a server that answers as vLLM does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core import http as core_http
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import Runner, RunResult
from glm_fleet.serving import attestation, client, diagnosis, metrics, startup
from glm_fleet.serving import evidence as serving_evidence
from glm_fleet.serving.deployment import Deployments, Places, make
from glm_fleet.serving.kept_answers import Known
from glm_fleet.serving.policy import parse_policy

from tests.defaults import defaults

ROOT = Path(__file__).resolve().parents[3]
LOGS = ROOT / "tests/unit/fixtures/vllm-logs"
DEFAULTS = defaults("serving")


def journal_of(name: str) -> list[str]:
    return (LOGS / name).read_text().splitlines()


GOOD = journal_of("h200-0.23.0-pr38476-piecewise-ok.log")
CRASH = journal_of("h200-0.23.0-pr38476-full-graphs-crash.log")
CPU = journal_of("cpu-0.32.0-ok.log")


def test_the_defaults_accept_the_journal_of_the_right_path() -> None:
    checks = serving_evidence.check_journal(
        GOOD,
        DEFAULTS["serving_journal_required"],
        [*DEFAULTS["serving_journal_forbidden"], "Enforce eager set"],
    )
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 6


@pytest.mark.parametrize(
    "log",
    [
        "h100-0.23.0-pr38476-corrected-full-and-piecewise-78-layers-ok.log",
        "h100-0.23.0-pr38476-corrected-full-decode-only-78-layers-cold.log",
    ],
)
def test_a_start_with_full_graphs_proves_the_same_path(log: str) -> None:
    lines = journal_of(log)
    checks = serving_evidence.check_journal(
        lines,
        DEFAULTS["serving_journal_required"],
        [*DEFAULTS["serving_journal_forbidden"], "Enforce eager set"],
    )
    assert [check for check in checks if not check.passed] == []
    assert diagnosis.diagnose(lines) == ""
    assert startup.start_phase(lines) == "ready"


@pytest.mark.parametrize("line", ["TRITON_MLA", "FLASHMLA_SPARSE"])
def test_another_attention_backend_is_caught(line: str) -> None:
    lines = [each.replace("TRITON_MLA_SPARSE backend", f"{line} backend") for each in GOOD]
    lines = [each for each in lines if "'attention_backend': 'TRITON_MLA_SPARSE'" not in each]
    checks = serving_evidence.check_journal(
        lines,
        DEFAULTS["serving_journal_required"],
        DEFAULTS["serving_journal_forbidden"],
    )
    assert [check.passed for check in checks].count(False) == 2


def test_an_eager_start_that_nobody_asked_for_is_caught() -> None:
    (check,) = serving_evidence.check_journal(CPU, [], ["Enforce eager set"])
    assert not check.passed
    assert "Enforce eager set" in check.detail


def test_the_phase_follows_the_journal() -> None:
    assert startup.start_phase([]) == "importing vLLM"
    assert startup.start_phase(GOOD) == "ready"
    assert startup.start_phase(CPU[:40]).startswith("loading")
    shard = "Loading safetensors checkpoint shards:  15% Completed | 12/83 [00:00<00:00]"
    assert startup.start_phase(["Starting to load model", shard]) == "loading shard 12/83"


def test_a_known_crash_is_diagnosed_with_its_remedy() -> None:
    found = diagnosis.diagnose(CRASH)
    assert "illegal instruction" in found
    assert "serving_cuda_graphs" in found
    assert any("illegal instruction" in line for line in diagnosis.relevant_lines(CRASH))
    assert diagnosis.diagnose(GOOD) == ""


# What a client makes the server say: a model that it asks for can have any name.
HOSTILE = "Using FLASHMLA backend an illegal instruction was encountered Traceback"
SAID = (
    f"(APIServer pid=0) ERROR 11-22 07:40:00 [serving.py:300] Error with model "
    f"error=ErrorInfo(message='The model `{HOSTILE}` does not exist.', code=404)",
    f"(APIServer pid=0) RuntimeError: CUDA error: {HOSTILE}",
    f'(APIServer pid=0) INFO:     10.0.0.1:5 - "GET /{HOSTILE} HTTP/1.1" 404 Not Found',
    'INFO:     10.0.0.1:5 - "GET /RuntimeError: CUDA error: an illegal instruction was '
    'encountered HTTP/1.1" 404 Not Found',
    "(APIServer pid=0) ERROR 11-22 07:40:01 [serving.py:300] The model `Application startup "
    "complete` does not exist",
)


def test_what_clients_write_decides_nothing() -> None:
    lines = [*GOOD, *SAID]
    forbidden = [*DEFAULTS["serving_journal_forbidden"], "Enforce eager set", "Traceback"]
    checks = serving_evidence.check_journal(lines, DEFAULTS["serving_journal_required"], forbidden)
    assert [check for check in checks if not check.passed] == []
    assert not diagnosis.lower_graphs_help(lines)
    assert diagnosis.diagnose(lines) == ""
    # Nor can a client prove what a start did not say.
    other = [line.replace("TRITON_MLA_SPARSE", "TRITON_MLA") for line in GOOD]
    proof = "(APIServer pid=0) ERROR x: The model `Using TRITON_MLA_SPARSE` does not exist"
    checks = serving_evidence.check_journal(
        [*other, proof], DEFAULTS["serving_journal_required"], ()
    )
    assert not checks[0].passed


def test_an_engine_that_crashes_when_it_is_up_is_still_diagnosed() -> None:
    crash = "(EngineCore_DP0 pid=9) ERROR 11-22 07:41:00 [core.py:9] RuntimeError: CUDA error: "
    crash += "an illegal instruction was encountered"
    lines = [*GOOD, *SAID, crash, *SAID]
    assert diagnosis.lower_graphs_help(lines)
    assert "illegal instruction" in diagnosis.diagnose(lines)


def test_a_start_that_was_attested_is_not_judged_by_what_came_later() -> None:
    known = {"proof": "the line"}
    (required, forbidden) = serving_evidence.check_journal([*SAID], ["proof"], ["FLASHMLA"], known)
    assert required.passed
    assert forbidden.passed
    # One that was not is judged by all that there is.
    assert not serving_evidence.check_journal([SAID[0]], [], ["FLASHMLA"])[0].passed


def test_the_crash_of_full_graphs_is_one_that_a_lower_mode_avoids() -> None:
    assert diagnosis.lower_graphs_help(CRASH)
    assert not diagnosis.lower_graphs_help(GOOD)
    assert not diagnosis.lower_graphs_help([])


@pytest.mark.parametrize(
    ("line", "remedy", "lower"),
    [
        ("CUDA error: operation not permitted when stream is capturing", "eager", True),
        ("RuntimeError: CUDA error: 802", "fabric manager", False),
        ("CUDA error: system not yet initialized", "fabric manager", False),
        ("torch.OutOfMemoryError: CUDA out of memory.", "gpu_memory_utilization", False),
        ("ValueError: No available memory for the cache blocks.", "gpu_memory_utilization", False),
        (
            "ValueError: To serve at least one request with the model's max seq len (32768), (9.0 "
            "GiB KV cache is needed, which is larger than the available KV cache memory (4 GiB).",
            "max_model_len",
            False,
        ),
        ("PackageNotFoundError: No package metadata was found for vllm", "build", False),
        ("TimeoutError: Timed out waiting for engine core", "ENGINE_READY_TIMEOUT", False),
        ("vllm serve: error: argument --x: invalid choice", "extra_arguments", False),
        ("vllm: error: unrecognized arguments: --y", "extra_arguments", False),
        ("NVRM: Xid (PCI:0000:07:00): 74, pid=1", "nvlink", False),
        ("ncclUnhandledCudaError: Call to CUDA function failed", "nvlink", False),
        ("start gate: An earlier engine still holds", "line of the start gate", False),
        ("RuntimeError: Engine core initialization failed.", "first error above", False),
    ],
)
def test_each_known_crash_has_its_remedy(line: str, remedy: str, lower: bool) -> None:
    lines = [*GOOD[:40], f"(EngineCore pid=9) ERROR {line}", "Shutting down"]
    found = diagnosis.diagnose(lines)
    assert line[-60:] in found
    assert remedy in found
    assert diagnosis.lower_graphs_help(lines) is lower


def test_the_cause_is_named_before_the_frame_around_it() -> None:
    frame = "RuntimeError: Engine core initialization failed. See root cause above."
    cause = "torch.OutOfMemoryError: CUDA out of memory."
    for lines in ([cause, frame], [frame, cause]):
        assert "gpu_memory_utilization" in diagnosis.diagnose(lines)


def test_a_start_that_failed_carries_what_the_ladder_needs() -> None:
    watched = {"phase": "capturing CUDA graphs"}
    details = startup.failed_start(watched, CRASH, "the service died").as_fail()
    assert details["step_down"] is True
    assert "illegal instruction" in details["diagnosis"]
    assert any("illegal instruction" in line for line in details["journal"])
    assert details["remedy"] == details["diagnosis"]
    unknown = startup.failed_start(watched, ["something else"], "the service died").as_fail()
    assert (unknown["step_down"], unknown["diagnosis"]) == (False, "")
    assert "journalctl" in unknown["remedy"]


def test_metrics_are_summed_over_labels() -> None:
    text = (
        "# HELP x\n"
        'vllm:generation_tokens_total{engine="0"} 5.0\n'
        'vllm:generation_tokens_total{engine="1"} 7\n'
        'vllm:ttft_bucket{le="1"} 3\n'
        "process_cpu_seconds_total 1.5 1700000000\n"
    )
    assert metrics.parse_metrics(text) == {
        "vllm:generation_tokens_total": 12.0,
        "process_cpu_seconds_total": 1.5,
    }


class Server:
    """Answers like vLLM's API server; a fault changes one thing."""

    def __init__(self, *, fault: str = "", context: int = 4096) -> None:
        self.fault = fault
        self.context = context
        self.tokens = 100
        self.prompts: list[Any] = []

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]:
        if self.fault == "dead":
            return 0, iter(["connection refused"])
        if path == "/v1/models":
            name = "other" if self.fault == "other model" else "glm-5.2"
            data = {"data": [{"id": name, "max_model_len": self.context}]}
            return 200, iter([json.dumps(data)])
        if path == "/metrics":
            return 200, iter([f'vllm:generation_tokens_total{{e="0"}} {self.tokens}'])
        assert body is not None
        self.prompts.append(body["prompt"])
        if self.fault == "dies on long prompts" and len(self.prompts[-1]) > 2048:
            return 500, iter(["EngineDeadError"])
        if self.fault != "frozen metrics":
            self.tokens += 24
        text = f"answer {len(self.prompts) if self.fault == 'unsteady' else ''}"
        events = [
            {"choices": [{"text": text}]},
            {"choices": [], "usage": {"completion_tokens": 24, "prompt_tokens": 9}},
        ]
        lines = [f"data: {json.dumps(each)}" for each in events]
        if self.fault != "cut stream":
            lines.append("data: [DONE]")
        return 200, iter(lines)


def systemd(
    argv: Sequence[str], *, state: str = "active", sub: str = "running", log: Sequence[str] = CPU
) -> RunResult:
    if argv[0] == "journalctl":
        most = next((int(word[8:]) for word in argv if word.startswith("--lines=")), len(log))
        return RunResult(0, "\n".join(log[-most:]), "")
    return RunResult(
        0,
        f"ActiveState={state}\nSubState={sub}\nNRestarts=0\nMainPID=7\nInvocationID=i1\n"
        "Result=success\nActiveEnterTimestamp=Sun 2026-11-22 07:11:24 UTC\n",
        "",
    )


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "maps").write_text(
        "7f00-7f01 r-xp 0 fe:00 1 /opt/glm-fleet/releases/rel-1/lib/python3.11/x.so\n"
    )
    record = {"release": "rel-1", "model": "mod-1", "invocation": "i1"}
    (tmp_path / "record.json").write_text(json.dumps(record))
    return tmp_path


def run(host: Path, server: Server, *, thorough: bool = True, **changed: Any) -> dict[str, Any]:
    wanted = {
        "unit": "glm-serving.service",
        "model_name": "glm-5.2",
        "release": "rel-1",
        "model": "mod-1",
        "required": ["KV cache size: [0-9,]+ tokens"],
        "forbidden": [],
        **changed,
    }
    return attestation.attest(
        lambda argv, **_: systemd(argv),
        server,
        attestation.Wanted(**wanted),
        thorough=thorough,
        record_path=host / "record.json",
        evidence_path=host / "attested.json",
        proc=host,
    )


def failed(found: dict[str, Any]) -> list[str]:
    return [check["name"] for check in found["checks"] if not check["passed"]]


def test_a_good_node_passes_with_every_canary(host: Path) -> None:
    server = Server()
    found = run(host, server)
    assert failed(found) == []
    assert found["passed"]
    assert found["release_id"] == "rel-1"
    assert [len(prompt) for prompt in server.prompts[2:]] == [2304, 2304]
    assert found["canary"]["completion_tokens"] == 24


def test_an_engine_that_dies_of_a_question_says_why(host: Path) -> None:
    server = Server(fault="dies on long prompts")
    cause = "(Worker pid=9) ERROR torch.OutOfMemoryError: CUDA out of memory."

    def runner(argv: Sequence[str], **_: Any) -> RunResult:
        died = any(len(prompt) > 2048 for prompt in server.prompts)
        return systemd(argv, log=[*CPU, cause] if died else CPU)

    found = attestation.attest(
        runner,
        server,
        attestation.Wanted(
            "glm-serving.service", "glm-5.2", "rel-1", "mod-1", ["KV cache size"], []
        ),
        thorough=True,
        record_path=host / "record.json",
        evidence_path=host / "attested.json",
        proc=host,
    )
    assert not found["passed"]
    assert "CUDA out of memory" in found["diagnosis"]
    assert cause in found["journal"]


class Answering(Server):
    """Lists the likely tokens too; ``forgets`` makes all of a crowd answer otherwise."""

    forgets = False

    def __init__(self, *, fault: str = "") -> None:
        super().__init__(fault=fault)
        self.salts: list[str] = []

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]:
        status, lines = super().__call__(path, body)
        if body is None or "logprobs" not in body or status != 200:
            return status, lines
        beside_others = body["cache_salt"] in self.salts
        self.salts.append(body["cache_salt"])
        likely = (
            {"a": -3.0, "b": -0.1} if beside_others and self.forgets else {"a": -0.1, "b": -3.0}
        )
        best = max(likely, key=lambda token: likely[token])
        told = {"tokens": [best] * 16, "top_logprobs": [likely] * 16}
        return 200, iter([json.dumps({"choices": [{"logprobs": told}]})])


@pytest.fixture
def known(tmp_path: Path) -> Known:
    places = Places(deployments=tmp_path / "deployments", etc=tmp_path)
    places.deployments.mkdir()
    deployments = Deployments(places)
    policy = '{"port": 8000, "served_model_name": "glm-5.2", "required": [], "forbidden": []}'
    made = make(
        release="rel-1", model="mod-1", cuda_graphs="eager", unit="", environment="", policy=policy
    )
    deployments.stage(made)
    (places.deployments / "current").symlink_to(places.deployments / made.id)
    return Known({"tolerance": 0.5, "drift": 0.15, "needles": False}, deployments)


def test_known_answers_are_asked_and_kept_once(host: Path, known: Known) -> None:
    server = Answering()
    found = run(host, server, known=known)
    assert found["passed"], failed(found)
    assert "same answers alone and in a crowd" in [each["name"] for each in found["checks"]]
    assert known.store.answers_before("mod-1") == found["answers"]
    assert found["answers"]["release"] == "rel-1"
    assert known.store.answers_before("mod-2") is None
    asked = len(server.salts)
    again = run(host, server, known=known)
    assert again["passed"]
    assert len(server.salts) == asked, "this start has proven them"
    assert "answers" not in again


def test_wrong_answers_are_the_reason_that_is_told_and_are_not_kept(
    host: Path, known: Known
) -> None:
    server = Answering()
    server.forgets = True
    found = run(host, server, known=known)
    assert failed(found) == ["same answers alone and in a crowd"]
    assert found["diagnosis"].startswith("it answers wrongly: same answers alone and in a crowd: ")
    assert attestation.remedy(found).endswith(
        "docs/answers.md says what each of these checks means"
    )
    assert known.store.answers_before("mod-1") is None
    assert not (host / "attested.json").exists(), "the sentry says that it was not attested"


def test_an_engine_that_does_not_answer_is_not_asked_for_more(host: Path, known: Known) -> None:
    server = Answering(fault="unsteady")
    assert failed(run(host, server, known=known)) == ["greedy answer repeats"]
    assert server.salts == []


def test_a_health_check_asks_for_no_known_answers(host: Path, known: Known) -> None:
    server = Answering()
    assert run(host, server, known=known, thorough=False)["passed"]
    assert server.salts == []


def test_a_policy_without_known_answers_is_attested_as_before(host: Path) -> None:
    old = {"port": 8000, "served_model_name": "glm-5.2", "required": [], "forbidden": []}
    assert parse_policy(json.dumps(old))["answers"] is None
    assert parse_policy(json.dumps({**old, "answers": None}))["answers"] is None
    limits = {"tolerance": 0.5, "drift": 0.15, "needles": True}
    assert parse_policy(json.dumps({**old, "answers": limits}))["answers"] == limits
    with pytest.raises(FleetError, match="drift"):
        parse_policy(json.dumps({**old, "answers": {**limits, "drift": -1}}))


def test_a_node_under_load_is_asked_once(host: Path) -> None:
    server = Server()
    assert run(host, server, thorough=False)["passed"]
    assert len(server.prompts) == 1


def test_a_short_context_gets_no_long_prompt(host: Path) -> None:
    server = Server(context=2048)
    assert run(host, server)["passed"]
    assert len(server.prompts) == 2


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("dead", "model is served"),
        ("other model", "model is served"),
        ("dies on long prompts", "prompt above 2048 tokens"),
        ("unsteady", "greedy answer repeats"),
        ("cut stream", "canary answers"),
        ("frozen metrics", "tokens advance in the metrics"),
    ],
)
def test_each_fault_of_the_server_is_caught(host: Path, fault: str, check: str) -> None:
    found = run(host, Server(fault=fault))
    assert not found["passed"]
    assert check in failed(found)


def test_a_crash_while_it_is_attested_is_a_reason_to_step_down(host: Path) -> None:
    def crashed(argv: Sequence[str], **_: Any) -> RunResult:
        return systemd(argv, log=CRASH)

    wanted = attestation.Wanted("glm-serving.service", "glm-5.2", "rel-1", "mod-1", [], [])
    paths = {"record_path": host / "record.json", "evidence_path": host / "a.json", "proc": host}
    found = attestation.attest(crashed, Server(fault="dead"), wanted, thorough=True, **paths)
    assert found["step_down"]
    assert "illegal instruction" in found["diagnosis"]
    # An old line of a node that passes is no reason for anything.
    passed = attestation.attest(crashed, Server(), wanted, thorough=True, **paths)
    assert (passed["passed"], passed["step_down"], passed["diagnosis"]) == (True, False, "")


def test_what_runs_has_to_be_what_was_activated(host: Path) -> None:
    assert "release that runs" in failed(run(host, Server(), release="rel-2"))
    assert "model that runs" in failed(run(host, Server(), model="mod-2"))


def test_a_record_of_another_start_proves_nothing(host: Path) -> None:
    record = {"release": "rel-1", "model": "mod-1", "invocation": "earlier"}
    (host / "record.json").write_text(json.dumps(record))
    assert "model that runs" in failed(run(host, Server()))


def watched(folder: Path, runner: Runner, *, health: int = 200) -> dict[str, Any]:
    """Look once at a start; ``folder`` is its /proc and holds what was attested."""
    return startup.await_attestation(
        runner,
        lambda path, body=None: (health, iter([])),
        "glm-serving.service",
        seconds=0,
        evidence_path=folder / "attested.json",
        proc=folder,
    )


@pytest.mark.parametrize(
    ("state", "sub", "log", "ready", "why"),
    [
        ("active", "running", CPU, True, ""),
        ("active", "running", CPU[:30], False, ""),
        ("failed", "failed", CPU[:30], False, "the unit is failed"),
        ("activating", "auto-restart", CPU[:30], False, "the service died"),
    ],
)
def test_a_start_is_watched(
    tmp_path: Path, state: str, sub: str, log: list[str], ready: bool, why: str
) -> None:
    found = watched(tmp_path, lambda argv, **_: systemd(argv, state=state, sub=sub, log=log))
    assert found["ready"] is ready
    assert why in found["failed"]


def progress(proc: Path, log: Sequence[str]) -> str:
    found = watched(proc, lambda argv, **_: systemd(argv, log=log), health=503)
    return str(found["progress"])


def test_shards_and_new_lines_are_progress_and_repetitions_are_none(tmp_path: Path) -> None:
    shard = "Loading safetensors checkpoint shards:  15% Completed | {}/83 [00:00<00:00]"
    hung = "WARNING 11-22 07:{}:24 No available shared memory broadcast block found in 60 seconds"
    loading = [*CPU[:30], shard.format(12)]
    waiting = [*loading, hung.format(30)]
    seen = [
        progress(tmp_path, CPU[:30]),
        progress(tmp_path, loading),
        progress(tmp_path, [*CPU[:30], shard.format(13)]),
        progress(tmp_path, waiting),
    ]
    assert len(set(seen)) == 4
    assert progress(tmp_path, [*waiting, hung.format(31), hung.format(32)]) == seen[-1]


def test_a_node_that_died_once_and_serves_now_is_ready(tmp_path: Path) -> None:
    def restarted(argv: Sequence[str], **_: Any) -> RunResult:
        answer = systemd(argv)
        return RunResult(0, answer.stdout.replace("NRestarts=0", "NRestarts=1"), "")

    assert watched(tmp_path, restarted)["ready"]


def test_a_server_that_has_answered_for_long_is_ready_at_once(tmp_path: Path) -> None:
    """Its first words are far behind the requests that it has logged since."""
    requests = [f'INFO: 10.0.0.9:{port} - "GET /health HTTP/1.1" 200 OK' for port in range(1000)]
    log = [*CPU, *requests]
    evidence = tmp_path / "attested.json"

    def ready() -> bool:
        return bool(watched(tmp_path, lambda argv, **_: systemd(argv, log=log))["ready"])

    assert ready()
    # The journal has lost its first lines, and nobody attested this start.
    log[:] = requests
    assert not ready()
    evidence.write_text(json.dumps({"KV cache": "a line", "invocation": "i1"}))
    assert ready()
    # Also when hardly anything is left of the journal.
    log[:] = requests[:3]
    assert ready()


@pytest.mark.parametrize(
    ("log", "evidence", "health", "lost"),
    [
        (CPU[-1:], False, 200, True),
        (CPU[-1:], True, 200, False),
        (CPU[-1:], False, 503, False),
        (CPU, False, 200, False),
    ],
)
def test_a_server_that_nothing_proves_any_more_needs_another_start(
    tmp_path: Path, log: list[str], evidence: bool, health: int, lost: bool
) -> None:
    if evidence:
        (tmp_path / "attested.json").write_text(json.dumps({"x": "y", "invocation": "i1"}))

    def unproven(**changed: Any) -> bool:
        return startup.unproven(
            lambda argv, **_: systemd(argv, log=log),
            lambda path, body=None: (health, iter([])),
            {"active": True, "invocation": "i1", **changed},
            ["KV cache size"],
            tmp_path / "attested.json",
        )

    assert unproven() is lost
    assert not unproven(active=False)


def test_a_start_stays_proven_when_the_journal_has_rotated(host: Path) -> None:
    wanted = ["KV cache size: [0-9,]+ tokens"]
    assert run(host, Server(), required=wanted)["passed"]
    known = serving_evidence.read_evidence(host / "attested.json", "i1")
    assert [check.passed for check in serving_evidence.check_journal([], wanted, [], known)] == [
        True
    ]
    # Another start has to prove itself.
    assert serving_evidence.read_evidence(host / "attested.json", "i2") == {}


@pytest.fixture
def broken_server() -> Iterator[int]:
    """A real socket that promises a chunk and closes in the middle of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                        b'40\r\ndata: {"choices": [{"text": "a"}]}\n'
                    )

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def test_an_engine_that_dies_while_it_answers_is_a_failed_check(broken_server: int) -> None:
    http = core_http.local_http(broken_server, timeout_s=5)
    assert "broke off" in client.complete(http, "glm-5.2", "Hello").problem
    check, _ = client.served_model(http, "glm-5.2")
    assert not check.passed


def test_the_server_is_asked_where_it_is_bound() -> None:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(5)
        status, _ = core_http.local_http(port, timeout_s=1)("/health")
        assert status == 0
        thread = threading.Thread(
            target=lambda: core_http.local_http(port, address="127.0.0.2", timeout_s=1)("/health")
        )
        thread.start()
        connection, _ = listener.accept()
        connection.close()
        thread.join()
