# SPDX-License-Identifier: Apache-2.0
"""A hung engine is told, recorded and restarted, in this order; a busy one is left alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.procfs import Process
from glm_fleet.core.runner import RunResult
from glm_fleet.node import readiness, watchdog
from glm_fleet.node.helper import Answer, Question

METRICS = """\
vllm:num_requests_running {running}
vllm:num_requests_waiting 0
vllm:iteration_tokens_total_count {steps}
vllm:kv_cache_usage_perc {kv:.4f}
"""


def test_progress() -> None:
    progress = watchdog.EngineProgress(100.0)
    assert progress.observe(0, (5.0,), wanted=True) == "fine"
    assert progress.observe(24, (5.0,), wanted=True) == "fine"
    assert progress.observe(26, (5.0,), wanted=True) == "suspect"
    assert progress.observe(99, (6.0,), wanted=True) == "fine", "one step is enough"
    assert progress.observe(198, (6.0,), wanted=True) == "suspect"
    assert progress.observe(200, (6.0,), wanted=True) == "hung"
    assert progress.observe(201, (6.0,), wanted=False) == "fine", "nobody waits any more"
    assert progress.observe(900, (6.0,), wanted=True) == "fine", "idle before is no stall"
    assert progress.observe(999, (6.0,), wanted=True) == "suspect"
    assert progress.observe(1000, None, wanted=True) == "hung", "a silent server makes no step"


class Clock:
    """A clock that only sleep moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then: dict[float, tuple[str, str]] = {}
        self.agent = readiness.Told()

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        for at, (gateway, line) in self.then.items():
            if before < at <= self.now:
                self.agent.note(gateway, line)


def test_nobody_waits_longer_than_until_every_gateway_was_told(tmp_path: Path) -> None:
    clock = Clock()
    clock.agent = readiness.Told(tmp_path / "told.json")
    flag = watchdog.Flag(
        tmp_path / "stalled", tmp_path / "told.json", lambda: clock.now, clock.sleep
    )
    flag.wait_until_told()
    assert clock.now == pytest.approx(3.0, abs=0.2), "an agent that notes nobody may have told all"
    clock.now = 0.0
    clock.agent.note("10.0.0.1", "up")
    clock.agent.note("10.0.0.2", "up")
    clock.then = {0.4: ("10.0.0.1", "down #x"), 0.8: ("10.0.0.2", "down #x")}
    flag.wait_until_told()
    assert clock.now == pytest.approx(0.8, abs=0.11)
    flag.wait_until_told()
    assert clock.now == pytest.approx(0.8, abs=0.11), "they were told before"
    # A gateway that was taken away never asks again.
    clock.then, clock.now = {}, 0.0
    clock.agent.note("10.0.0.3", "up")
    flag.wait_until_told()
    assert clock.now == pytest.approx(3.0, abs=0.2)


class Node:
    """A node whose engine makes ``step`` steps from one look to the next, five seconds on."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.steps, self.step, self.running = 0.0, 1.0, 0
        self.answers, self.serves = True, True
        self.kv, self.kv_step = 0.0, 0.0
        # Other counts by their names, and how long the server takes to tell them.
        self.counts: dict[str, float] = {}
        self.late = 0.0
        # Canaries that it got.
        self.asked = 0
        self.invocation = 1
        self.commands: list[list[str]] = []
        self.out = ""
        self.active = "active"
        self.stopped = threading.Event()
        policy = folder / "policy.json"
        wanted: dict[str, list[str]] = {"required": [], "forbidden": []}
        policy.write_text(json.dumps({"port": 1, "served_model_name": "glm-5.2", **wanted}))
        settings = watchdog.Settings(
            "glm-serving.service", 40.0, 2, folder / "incidents", policy, folder / "none"
        )
        self.dies_at_once = True
        self.watch = watchdog.Watchdog(
            settings,
            self.run,
            self,  # type: ignore[arg-type]
            client=self.client,
            clock=lambda: self.now,
            sleep=lambda seconds: None,
            processes=lambda: [
                Process(41, 999, "/opt/x/python /opt/x/bin/vllm serve /m"),
                Process(42, 999, "VLLM::EngineCore"),
                Process(43, 0, "VLLM::Worker of somebody else"),
            ],
            helper=self.helper,
        )

    def take_out(self, invocation: str, reason: str) -> None:
        self.out = invocation

    def let_in(self) -> None:
        self.out = ""

    def wait_until_told(self) -> None:
        assert self.out
        self.commands.append(["told"])

    def run(self, argv: Sequence[str], **_: Any) -> RunResult:
        if argv[:2] == ["systemctl", "show"]:
            text = f"ActiveState={self.active}\nInvocationID=i{self.invocation}\nMainPID=41\n"
            return RunResult(0, text, "")
        self.commands.append(list(argv))
        assert argv[0] == "journalctl", "it runs nothing that needs root"
        return RunResult(0, "last words", "")

    def helper(self, question: Question) -> Answer:
        if question["do"] == "stack":
            return {"done": True, "said": f"stack of {question['pid']}"}
        assert question["do"] == "signal"
        self.commands.append(["signal", question["signal"]])
        if question["signal"] == "SIGKILL":
            self.invocation += int(self.dies_at_once)
            self.steps, self.serves = 0.0, False
        return {"done": True, "said": ""}

    def client(self, port: int, *, timeout_s: float, **_: Any) -> Any:
        def ask(path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Iterator[str]]:
            if not self.serves:
                return 0, iter(["refused"])
            if path == "/metrics":
                self.now += min(self.late, timeout_s)
                if self.late > timeout_s:
                    return 0, iter(["TimeoutError: timed out"])
                text = METRICS.format(running=self.running, steps=self.steps, kv=self.kv)
                text += "".join(f"{name} {count}\n" for name, count in self.counts.items())
                return 200, iter(text.splitlines())
            self.asked += 1
            if not self.answers:
                self.stopped.wait(20)
                return 0, iter(["gone"])
            self.steps += 1
            usage = {"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}}
            return 200, iter([f"data: {json.dumps(usage)}", "data: [DONE]"])

        return ask

    def look(self, times: int = 1) -> str:
        seen = ""
        for _ in range(times):
            self.now += 5
            self.steps += self.step
            self.kv += self.kv_step
            seen = self.watch.look()
            for thread in threading.enumerate():
                if self.answers and thread.name == watchdog.CANARY:
                    thread.join(5)
        return seen


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.stopped.set()


def test_a_busy_node_is_left_alone(node: Node) -> None:
    node.running = 32
    assert {node.look() for _ in range(40)} == {"fine"}
    assert (node.out, node.commands) == ("", [])
    assert node.asked == 0, "a busy engine is not asked for more"


def test_a_lone_long_prefill_is_no_hang(node: Node) -> None:
    node.running, node.step = 1, 0
    node.kv_step = 0.01
    assert {node.look() for _ in range(60)} == {"fine"}
    assert (node.out, node.commands) == ("", [])
    node.kv_step, node.answers = 0.0, False
    assert "hung" in {node.look() for _ in range(12)}


@pytest.mark.parametrize(
    "name",
    [
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:request_success_total",
        "vllm:num_preemptions_total",
    ],
)
def test_one_count_that_moves_now_and_then_is_work(node: Node, name: str) -> None:
    """240 s, six times the time-out, in which nothing else moves: a chunk takes up to 9 s."""
    node.running, node.step, node.answers = 1, 0, False
    begun, seen = node.now, set()
    while node.now - begun < 240:
        node.counts[name] = (node.now - begun) // 9 / 1000
        seen.add(node.look())
    assert seen == {"fine"}
    assert (node.out, node.commands) == ("", [])
    stopped = node.now
    while node.look() != "hung":
        assert node.now - stopped <= 40 + 5, "the time-out, and one look"
    assert node.out


def test_a_server_that_is_late_is_not_silent(node: Node) -> None:
    """Its process has too much to do to answer within 5 s, and answers within 20."""
    node.running = 32
    node.look()
    node.late = 12.0
    assert {node.look() for _ in range(30)} == {"fine"}
    assert (node.out, node.commands) == ("", [])


@pytest.mark.parametrize("late", [12.0, 1e9])
def test_an_engine_that_hangs_behind_a_late_server_is_found(node: Node, late: float) -> None:
    node.running = 1
    node.look()
    node.late, node.step, node.answers = late, 0, False
    hung = node.now
    while node.look() != "hung":
        assert node.now - hung <= 40 + 12, "the patience for its answers does not add up"


def test_an_idle_node_is_asked_for_a_token_and_left_alone(node: Node) -> None:
    node.step = 0
    assert {node.look() for _ in range(40)} == {"fine"}
    assert (node.out, node.commands) == ("", [])
    assert node.watch.canary.answered


@pytest.mark.parametrize("running", [0, 3])
def test_a_hung_node_is_told_recorded_and_restarted(node: Node, running: int) -> None:
    node.running = running
    node.look(3)
    node.step, node.answers = 0, False
    seen = []
    while "hung" not in seen:
        seen.append(node.look())
        if seen[-1] == "suspect":
            assert node.out, "no request is sent there meanwhile"
    assert "suspect" in seen
    assert len(seen) <= 14, "the time-out, and the patience before the canary"
    names = [" ".join(command[:3]) for command in node.commands]
    assert names[0] == "told"
    assert names[1].startswith("journalctl")
    assert names[-2:] == ["signal SIGTERM", "signal SIGKILL"]
    (folder,) = node.watch.settings.incidents.glob("20*")
    assert (folder / "journal.txt").read_text() == "last words\n"
    stacks = {path.name: path.read_text() for path in folder.glob("stack-*")}
    assert set(stacks) == {"stack-41-python.txt", "stack-42-VLLM-EngineCore.txt"}
    assert "stack of 42" in stacks["stack-42-VLLM-EngineCore.txt"]
    node.stopped.set()
    assert node.look(3) == "starting"
    assert node.out == "i1", "the start that is no more"
    node.running, node.step, node.answers, node.serves = 0, 0, True, True
    node.look()
    assert node.look() == "fine"
    assert not node.out


def test_a_start_that_dies_slowly_is_one_incident(node: Node) -> None:
    node.running, node.dies_at_once = 1, False
    node.look(3)
    node.step, node.answers = 0, False
    while node.look() != "hung":
        pass
    known = len(node.commands)
    assert node.look(3) == "hung"
    assert len(node.commands) == known, "it was killed, and is left to die"
    node.active = "deactivating"
    assert node.look(3) == "inactive"
    assert node.out == "i1", "what is being killed can still answer /health"
    node.active = "active"
    node.invocation += 1
    assert node.look() == "starting"


@pytest.mark.parametrize("damage", ["", "{", "7", '["x"]', '{"a": 1}'])
def test_a_damaged_count_of_restarts_is_had_from_the_evidence(node: Node, damage: str) -> None:
    incidents = node.watch.settings.incidents
    incidents.mkdir()
    for ago in (600, 1200, 86400):
        name = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime(time.time() - ago))
        (incidents / name).mkdir()
    (incidents / "restarts.json").write_text(damage)
    node.running, node.answers = 1, False
    node.look()
    node.step = 0
    while node.look() != "hung":
        pass
    assert not [command for command in node.commands if "SIGKILL" in command]
    assert node.out


def test_after_so_many_restarts_a_person_is_needed(node: Node) -> None:
    node.watch.settings.incidents.mkdir()
    node.running, node.answers = 1, False
    for _ in range(3):
        node.serves = True
        node.look()
        node.step = 0
        while node.look() != "hung":
            pass
    kills = [command for command in node.commands if "SIGKILL" in command]
    assert len(kills) == 2
    assert node.out
    before = len(node.commands)
    node.look(20)
    assert len(node.commands) == before, "and the evidence is kept once"
    node.step = 1
    assert node.look() == "fine"
    assert not node.out, "it came back by itself"
