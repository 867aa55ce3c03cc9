# SPDX-License-Identifier: Apache-2.0
"""A rehearsal: which layers, which command line, when it is needed, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.serving.deployment import Deployment, Deployments, Places, make
from glm_fleet.serving.questions import ask_questions, prompt_ids, together_lengths
from glm_fleet.serving.rehearsal import (
    REHEARSAL_UNIT,
    command_digest,
    cut_config,
    exec_words,
    is_small_file,
    rehearsal_command,
)
from glm_fleet.serving.rehearsal_run import Rehearsal, Stage
from glm_fleet.serving.rehearsals import (
    for_a_report,
    known_to_pass,
    note_rehearsal,
    read_hardware,
    read_rehearsals,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
GLM = (FIXTURES / "glm-5.2-config.json").read_text()
SMALL = {"model_type": "qwen2", "num_hidden_layers": 2, "eos_token_id": [1, 2], "hidden_size": 8}

# -- the layers ------------------------------------------------------------------------


def test_as_few_layers_as_hold_each_kind() -> None:
    cut = cut_config(GLM)
    config = json.loads(cut.text)
    # Dense with an indexer, experts without one, experts with one.
    assert (cut.layers, cut.of, config["num_hidden_layers"]) == (7, 78, 7)
    assert config["mlp_layer_types"] == ["dense"] * 3 + ["sparse"] * 4
    assert config["indexer_types"] == ["full"] * 3 + ["shared"] * 3 + ["full"]
    before = json.loads(GLM)
    changed = {name for name in before if before[name] != config[name]}
    assert changed == {"num_hidden_layers", "mlp_layer_types", "indexer_types"}


def test_kinds_that_only_a_rule_tells_count_too() -> None:
    config = json.loads(GLM)
    for name in ("mlp_layer_types", "indexer_types"):
        del config[name]
    assert cut_config(json.dumps(config)).layers == 7
    # 0.23.0 gives every layer an indexer.
    for name in ("index_topk_freq", "index_skip_topk_offset"):
        del config[name]
    assert cut_config(json.dumps(config)).layers == 4
    config["index_topk_pattern"] = "FFFFF" + "S" * 73
    cut = json.loads(cut_config(json.dumps(config)).text)
    assert cut["index_topk_pattern"] == "FFFFFS"


def test_the_layers_that_somebody_asks_for() -> None:
    cut = cut_config(GLM, 6)
    assert cut.layers == len(json.loads(cut.text)["indexer_types"]) == 6
    assert cut_config(GLM, 100).layers == 78


def test_a_model_of_two_layers_stays_as_it_is() -> None:
    cut = cut_config(json.dumps(SMALL))
    assert (cut.layers, json.loads(cut.text)) == (2, SMALL)
    deep = json.dumps({"vision_config": {}, "text_config": {**SMALL, "num_hidden_layers": 40}})
    assert json.loads(cut_config(deep).text)["text_config"]["num_hidden_layers"] == 2


@pytest.mark.parametrize("wrong", ["", "[]", "{}", '{"num_hidden_layers": "many"}', "{"])
def test_what_has_no_layers_is_refused(wrong: str) -> None:
    with pytest.raises(FleetError):
        cut_config(wrong)


def test_the_files_that_a_start_without_weights_needs() -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "a/modeling_x.py"):
        assert is_small_file(name, 20_000_000)
    for name in ("model-00001-of-00083.safetensors", "model.safetensors.index.json", "a.png"):
        assert not is_small_file(name, 1)
    assert not is_small_file("dump.json", 10**9)


# -- the unit --------------------------------------------------------------------------


def test_an_option_that_was_given_is_replaced_however_it_stands() -> None:
    words = ["vllm", "serve", "/m", "--load-format=runai", "--port", "1", "--seed", "7", "-q"]
    ours = rehearsal_command(words, program=Path("v"), model=Path("n"), port=2)
    assert ours == ["v", "serve", "n", "--seed", "7", "-q", "--host", "127.0.0.1", "--port", "2",
                    "--load-format", "dummy"]  # fmt: skip


@pytest.mark.parametrize("unit", ["", "[Service]\nExecStart=/bin/x\n", "ExecStart='a\n"])
def test_a_unit_that_serves_nothing_is_refused(unit: str) -> None:
    with pytest.raises(FleetError, match="cannot be read"):
        exec_words(unit)


# -- when one is needed ----------------------------------------------------------------

KEY = "sk-very-secret"


def deployment(release: str = "r1", graphs: str = "piecewise", **changed: str) -> Deployment:
    unit = f"[Unit]\n[Service]\nExecStart=/opt/current/bin/vllm serve /srv/m --graphs {graphs}\n"
    parts = {"unit": unit, "environment": f"A=1\nVLLM_API_KEY={KEY}\n",
             "policy": '{"port": 8000, "served_model_name": "m", "required": ["Using X"],'
                       ' "forbidden": ["Using Y"]}', **changed}  # fmt: skip
    return make(release=release, model="m1", cuda_graphs=graphs, **parts)


def test_a_digest_tells_command_lines_apart_and_no_keys() -> None:
    digest = command_digest(deployment(), GLM)
    assert digest == command_digest(deployment(environment="A=1\nVLLM_API_KEY=other\n"), GLM)
    others = [
        command_digest(deployment(environment="A=2\nVLLM_API_KEY=x\n"), GLM),
        command_digest(deployment(graphs="eager"), GLM),
        command_digest(deployment(), json.dumps(SMALL)),
    ]
    assert len({digest, *others}) == 4


def smi(argv: Sequence[str], **_: Any) -> RunResult:
    assert argv[0] == "nvidia-smi"
    return RunResult(0, "NVIDIA A100-SXM4-80GB, 550.54.15\n" * 8, "")


HARDWARE = {"gpus": "8 x NVIDIA A100-SXM4-80GB", "driver": "550.54.15"}


def test_what_passed_is_known_for_this_release_on_these_gpus(tmp_path: Path) -> None:
    hardware = read_hardware(smi)
    assert hardware == HARDWARE
    path = tmp_path / "a/rehearsals.json"
    assert read_rehearsals(path) == []
    done: Any = {**HARDWARE, "release": "r1", "cuda_graphs": "eager", "command": "c",
                 "passed": False, "problem": "it died", "seconds": 9.5, "time_s": 1e9,
                 "layers": 7, "of_layers": 78}  # fmt: skip
    note_rehearsal(done, path)
    # One that failed is tried again: what was in its way may be mended.
    assert known_to_pass(read_rehearsals(path), hardware, "r1", "c") is None
    note_rehearsal({**done, "passed": True, "problem": ""}, path)
    assert for_a_report(done) == "r1, 2001-09-09 01:46 UTC: failed: it died"
    known = read_rehearsals(path)
    assert for_a_report(known[0]).endswith("rehearsed in 10 s (7 of 78 layers with random weights)")
    assert [each["passed"] for each in known] == [True]
    assert known_to_pass(known, hardware, "r1", "c") == known[0]
    assert known_to_pass(known, hardware, "r2", "c") is None
    assert known_to_pass(known, hardware, "r1", "d") is None
    assert known_to_pass(known, {**hardware, "driver": "580.1"}, "r1", "c") is None
    assert known_to_pass(known, {**hardware, "gpus": "4 x"}, "r1", "c") is None
    for number in range(20):
        note_rehearsal({**done, "release": f"r{number}"}, path)
    assert len(read_rehearsals(path)) == 8


# -- the questions ---------------------------------------------------------------------


@dataclass
class Server:
    """Answers as vLLM does with random weights; ``wrong`` says to what it does not."""

    context: int = 32768
    wrong: Callable[[Mapping[str, Any]], bool] = lambda body: False
    score: Callable[[Mapping[str, Any]], Any] = lambda body: -1.5
    asked: list[int | str] = field(default_factory=list)
    tokens: int = 0

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]:
        if path == "/v1/models":
            entry = {"id": "m", "max_model_len": self.context}
            return 200, iter([json.dumps({"data": [entry]})])
        if body is None:
            text = f"vllm:generation_tokens_total {self.tokens}" if path == "/metrics" else ""
            return 200, iter([text])
        prompt = body["prompt"]
        self.asked.append(len(prompt) if isinstance(prompt, list) else prompt)
        if self.wrong(body):
            return 500, iter(["EngineDeadError"])
        self.tokens += body["max_tokens"]
        if "logprobs" in body:
            listed = [{"token_id:7": self.score(body)}] * body["max_tokens"]
            told = {"tokens": ["token_id:7"] * body["max_tokens"], "top_logprobs": listed}
            return 200, iter([json.dumps({"choices": [{"logprobs": told}]})])
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": len(prompt)}
        events = [{"choices": [{"text": "x"}]}, {"choices": [], "usage": usage}]
        return 200, iter([*(f"data: {json.dumps(each)}" for each in events), "data: [DONE]"])


def test_what_a_server_with_random_weights_is_asked() -> None:
    server = Server()
    said: list[str] = []
    checks = ask_questions(server, "m", tolerance=0.5, sequences=32, say=said.append)
    assert [each for each in checks if not each.passed] == []
    alone = server.asked[:5]
    assert alone[0] == alone[1]
    assert alone[2:] == [2304, 2304, 20_000]
    together = server.asked[5:37]
    assert len(together) == 32
    assert all(isinstance(each, int) and each > 2048 for each in together)
    # Ragged, and off every block.
    assert len(set(together)) > 20
    assert any(isinstance(each, int) and each % 64 for each in together)
    assert any("32 sequences of 2049 to" in each for each in said)
    assert checks[-2].name == "same answers alone and in a crowd"
    assert "answer different prompts alike (by 0.000)" in checks[-2].detail


def test_weights_that_look_at_the_prompt_are_not_called_blind() -> None:
    server = Server(score=lambda body: -float(len(body["prompt"]) % 8) - 0.1)
    (check,) = [
        each
        for each in ask_questions(server, "m", tolerance=0.5, sequences=1)
        if each.name == "same answers alone and in a crowd"
    ]
    assert check.passed
    assert "alike" not in check.detail


@pytest.mark.parametrize("context", [64, 512, 2300, 2400, 4096])
def test_a_short_context_is_filled_and_never_exceeded(context: int) -> None:
    server = Server(context)
    assert all(each.passed for each in ask_questions(server, "m", tolerance=0.5, sequences=4))
    assert max(each for each in server.asked if isinstance(each, int)) + 24 <= context
    assert all(0 < each <= context - 64 or context == 64 for each in together_lengths(context, 32))


def test_the_first_question_that_is_not_answered_is_the_last() -> None:
    server = Server(wrong=lambda body: len(body["prompt"]) == 2304)
    checks = ask_questions(server, "m", tolerance=0.5)
    assert [each.name for each in checks if not each.passed] == ["a prompt of 2304 tokens"]
    assert "EngineDeadError" in checks[-1].detail
    assert server.asked[-1] == 2304


def test_one_of_many_that_dies_is_told() -> None:
    server = Server(wrong=lambda body: body["max_tokens"] == 64 and len(body["prompt"]) % 2 == 0)
    checks = ask_questions(server, "m", tolerance=0.5, sequences=8)
    assert not checks[-1].passed
    assert checks[-1].name.startswith("8 sequences")
    assert "of 8)" in checks[-1].detail


@pytest.mark.parametrize("score", [float("nan"), None, 1.5, "x"])
def test_what_is_no_number_is_caught(score: Any) -> None:
    checks = ask_questions(Server(score=lambda _: score), "m", tolerance=0.5, sequences=1)
    assert checks[-1].name == "known answers"
    assert not checks[-1].passed


def test_prompts_share_no_beginning() -> None:
    starts = {tuple(prompt_ids(16, each)) for each in range(40)}
    assert len(starts) == 40


# -- done on a node --------------------------------------------------------------------

CRASH = (FIXTURES / "vllm-logs/h200-0.23.0-pr38476-full-graphs-crash.log").read_text().splitlines()
UP = ["Using X backend", "Application startup complete."]


@dataclass
class Node:
    """A node as a rehearsal sees it. ``starts`` is what each start logs; the last is repeated."""

    folder: Path
    starts: list[list[str]]
    server: Server = field(default_factory=Server)
    active: bool = False
    calls: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, argv: Sequence[str], **_: Any) -> RunResult:
        if argv[0] == "nvidia-smi":
            return smi(argv)
        if argv[0] == "journalctl":
            return RunResult(0, "\n".join(self.log()), "")
        if argv[1] == "show":
            state = "active" if self.active else "failed"
            return RunResult(0, f"Id={argv[-1]}\nActiveState={state}\nResult=exit-code\n"
                                f"InvocationID=i{len(self.units)}\nMainPID=7\n", "")  # fmt: skip
        self.calls.append(" ".join(each for each in argv[1:] if not each.startswith("--")))
        if argv[1] == "start":
            self.units.append((self.folder / "units" / REHEARSAL_UNIT).read_text())
            self.active = "complete" in " ".join(self.log())
            config = self.folder / "run/model/config.json"
            assert json.loads(config.read_text())["num_hidden_layers"] == 7
        return RunResult(0, "", "")

    def log(self) -> list[str]:
        return self.starts[min(len(self.units), len(self.starts)) - 1] if self.units else []

    def clock(self) -> float:
        self.seconds += 1.0
        return self.seconds


@pytest.fixture
def deployments(tmp_path: Path) -> Deployments:
    places = Places(
        deployments=tmp_path / "etc/deployments",
        etc=tmp_path / "etc",
        units=tmp_path / "real",
        releases=tmp_path / "releases",
        models=tmp_path / "models",
    )
    model = tmp_path / "models/m1"
    model.mkdir(parents=True)
    (model / "config.json").write_text(GLM)
    for name in ("tokenizer.json", "model.safetensors"):
        (model / name).write_text(name)
    maps = tmp_path / "proc/7"
    maps.mkdir(parents=True)
    (maps / "maps").write_text("0-1 r-xp 0 00:00 1 /opt/glm-fleet/releases/r1/lib/x.so\n")
    return Deployments(places)


def rehearse(node: Node, deployments: Deployments, *rungs: Deployment) -> Any:
    folder = node.folder
    for each in rungs:
        deployments.stage(each)
    stage = Stage(folder / "run", folder / "units", folder / "drop-in", folder / "records.json",
                  folder / "proc")  # fmt: skip
    rehearsal = Rehearsal(
        node, deployments, folder / "models/m1", lambda: node.calls.append("clear"),
        stall_s=30.0, stage=stage, client=lambda *_, **__: node.server,
        sleep=lambda _: None, clock=node.clock, now=lambda: 1e9,
    )  # fmt: skip
    return rehearsal.rehearse([each.id for each in rungs])


def left(folder: Path) -> list[str]:
    """Name what a rehearsal left on the node beside its record."""
    return [str(each) for part in ("run", "units") for each in (folder / part).rglob("*")]


def test_a_release_that_runs_passes_and_leaves_nothing(
    tmp_path: Path, deployments: Deployments
) -> None:
    node, wanted = Node(tmp_path, [UP]), deployment()
    made = rehearse(node, deployments, wanted)
    assert (made.deployment, made.problem) == (wanted, "")
    assert "release that runs" in [each.name for each in made.checks]
    order = ["stop glm-serving.service", "clear", "daemon-reload", f"start {REHEARSAL_UNIT}"]
    assert node.calls[:4] == order
    assert f"stop {REHEARSAL_UNIT}" in node.calls[4:]
    assert "start glm-serving.service" not in node.calls
    assert left(tmp_path) == []
    (record,) = read_rehearsals(tmp_path / "records.json")
    assert record["passed"]
    assert (record["release"], record["layers"], record["of_layers"]) == ("r1", 7, 78)
    assert record["seconds"] > 0
    assert KEY not in (tmp_path / "records.json").read_text()
    assert KEY not in node.units[0]


def test_a_crash_of_graphs_steps_down_and_is_remembered(
    tmp_path: Path, deployments: Deployments
) -> None:
    node = Node(tmp_path, [CRASH, UP])
    full, eager = deployment(graphs="full"), deployment(graphs="eager")
    made = rehearse(node, deployments, full, eager)
    assert made.deployment == eager
    assert "illegal instruction" in deployments.refused(full.id)
    assert [each["passed"] for each in read_rehearsals(tmp_path / "records.json")] == [False, True]
    assert left(tmp_path) == []


def test_a_release_that_dies_is_refused_with_its_diagnosis(
    tmp_path: Path, deployments: Deployments
) -> None:
    with pytest.raises(FleetError, match="its rehearsal failed") as caught:
        rehearse(Node(tmp_path, [CRASH]), deployments, deployment())
    details = caught.value.as_fail()
    assert "illegal instruction" in details["diagnosis"]
    assert details["journal"]
    assert details["step_down"] is False
    assert left(tmp_path) == []
    (record,) = read_rehearsals(tmp_path / "records.json")
    assert not record["passed"]


@pytest.mark.parametrize(
    ("log", "server", "said"),
    [
        (["Using Z", UP[1]], Server(), "journal has Using X"),
        (["Using Y", *UP], Server(), "journal has no Using Y"),
        (UP, Server(wrong=lambda body: body["max_tokens"] == 64), "sequences of 2049"),
    ],
)
def test_what_starts_and_is_wrong_is_refused(
    tmp_path: Path, deployments: Deployments, log: list[str], server: Server, said: str
) -> None:
    with pytest.raises(FleetError, match=said):
        rehearse(Node(tmp_path, [log], server), deployments, deployment())
    assert left(tmp_path) == []


def test_a_start_that_hangs_is_given_up(tmp_path: Path, deployments: Deployments) -> None:
    node = Node(tmp_path, [["Starting to load model"]])
    node.log = lambda: ["Starting to load model"] if node.units else []  # type: ignore[method-assign]
    original = node.__call__

    def hung(argv: Sequence[str], **options: Any) -> RunResult:
        node.active = bool(node.units)
        return original(argv, **options)

    for each in (deployment(),):
        deployments.stage(each)
    stage = Stage(tmp_path / "run", tmp_path / "units", tmp_path / "d", tmp_path / "r.json",
                  tmp_path / "proc")  # fmt: skip
    rehearsal = Rehearsal(
        hung, deployments, tmp_path / "models/m1", lambda: None, stall_s=30.0, stage=stage,
        client=lambda *_, **__: node.server, sleep=lambda _: None, clock=node.clock,
    )  # fmt: skip
    with pytest.raises(FleetError, match="no progress for 30 s: loading the model"):
        rehearsal.rehearse([deployment().id])
    assert left(tmp_path) == []


def test_without_the_files_of_the_model_nothing_is_stopped(
    tmp_path: Path, deployments: Deployments
) -> None:
    node = Node(tmp_path, [UP])
    (tmp_path / "models/m1/config.json").unlink()
    with pytest.raises(FleetError, match="nothing to rehearse with"):
        rehearse(node, deployments, deployment())
    assert node.calls == []
