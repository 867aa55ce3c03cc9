# SPDX-License-Identifier: Apache-2.0
"""What root does for daemons, for whom, and nothing else."""

from __future__ import annotations

import json
import os
import pwd
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.procfs import Process
from glm_fleet.core.runner import RunResult
from glm_fleet.node.helper import READINESS_USER, WATCH_USER, Answer, ask
from glm_fleet.node.root import Helper, name_of_peer, serve

ENGINE = 990


class Root:
    """The helper's surroundings: what it ran, and processes of which two are the engine's."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.stubborn = False
        self.helper = Helper(
            run=self.run,
            processes=lambda: [
                Process(41, ENGINE, "/r/bin/python /r/bin/vllm serve /m"),
                Process(42, ENGINE, "VLLM::EngineCore"),
                Process(43, ENGINE, "sh"),
                Process(44, 0, "VLLM::EngineCore of somebody else"),
            ],
            attest_now=lambda: Answer(done=True, said="attested"),
            uid=ENGINE,
            py_spy="/opt/glm-fleet/bin/py-spy",
        )

    def run(self, argv: Sequence[str], **_: Any) -> RunResult:
        if argv[:2] == ["systemctl", "show"]:
            return RunResult(0, "ActiveState=active\nInvocationID=i1\nMainPID=41\n", "")
        self.commands.append(list(argv))
        failed = self.stubborn and "--nonblocking" not in argv
        return RunResult(int(failed), "a stack", "it cannot be stopped" if failed else "")

    def answer(self, user: str, **question: Any) -> Answer:
        return self.helper.answer(json.dumps(question).encode(), user)


def test_each_user_gets_its_own_and_nothing_else() -> None:
    root = Root()
    assert root.answer(READINESS_USER, do="attest") == {"done": True, "said": "attested"}
    assert root.answer(WATCH_USER, do="signal", signal="SIGKILL", invocation="i1")["done"]
    assert root.answer(WATCH_USER, do="stack", pid=42)["said"] == "a stack"
    assert root.commands == [
        ["systemctl", "kill", "--signal=SIGKILL", "glm-serving.service"],
        ["/opt/glm-fleet/bin/py-spy", "dump", "--pid", "42"],
    ]
    for user, question in (
        (READINESS_USER, {"do": "signal", "signal": "SIGKILL"}),
        (READINESS_USER, {"do": "stack", "pid": 42}),
        (WATCH_USER, {"do": "attest"}),
        ("glm", {"do": "signal", "signal": "SIGTERM"}),
        ("990", {"do": "attest"}),
    ):
        with pytest.raises(FleetError, match="for somebody else"):
            root.answer(user, **question)
    assert len(root.commands) == 2


@pytest.mark.parametrize("pid", [43, 44, 45, 1, 0, -1, "42; reboot", 2**40, None])
def test_stacks_are_those_of_the_engine(pid: Any) -> None:
    root = Root()
    with pytest.raises(FleetError):
        root.answer(WATCH_USER, do="stack", pid=pid)
    with pytest.raises(FleetError):
        root.answer(WATCH_USER, do="stack")
    assert root.commands == []


@pytest.mark.parametrize("name", ["SIGSTOP", "9", "SIGTERM other.service", "", None])
def test_the_engine_is_ended_and_nothing_else(name: Any) -> None:
    root = Root()
    with pytest.raises(FleetError):
        root.answer(WATCH_USER, do="signal", signal=name, invocation="i1")
    with pytest.raises(FleetError):
        root.answer(WATCH_USER, do="signal", signal="SIGTERM", invocation="i1", unit="ssh.service")
    assert root.commands == []


def test_a_question_that_waited_ends_no_later_start() -> None:
    root = Root()
    for question in ({"invocation": "i0"}, {"invocation": ""}, {}):
        with pytest.raises(FleetError, match="Another start of the engine runs"):
            root.answer(WATCH_USER, do="signal", signal="SIGTERM", **question)
    assert root.commands == []


def test_a_process_that_cannot_be_stopped_is_read_as_it_runs() -> None:
    root = Root()
    root.stubborn = True
    assert root.answer(WATCH_USER, do="stack", pid=41) == {"done": True, "said": "a stack"}
    assert root.commands[-1][-1] == "--nonblocking"


def exchange(helper: Helper, said: bytes) -> bytes:
    """Say something to it over a real socket, and return what comes back."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(said)
        ours.shutdown(socket.SHUT_WR)
        serve(theirs, helper)
        theirs.close()
        with ours.makefile("rb") as stream:
            return stream.read()


@pytest.mark.parametrize(
    "said", [b"", b"\n", b"{", b'{"do": "attest"', b"[]\n", b"x" * 4096, b"\xff\xfe\n", b"{}\n"]
)
def test_whatever_is_said_is_answered_with_one_line(said: bytes) -> None:
    root = Root()
    line = exchange(root.helper, said)
    assert line.count(b"\n") == 1
    assert json.loads(line)["done"] is False
    assert root.commands == []


def test_the_kernel_says_who_asks() -> None:
    me = pwd.getpwuid(os.geteuid()).pw_name
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert name_of_peer(theirs) == me
    answered = json.loads(exchange(Root().helper, b'{"do": "attest"}\n'))
    assert answered["done"] is (me == "root")


def test_a_daemon_asks_and_hears(tmp_path: Path) -> None:
    path = tmp_path / "helper"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def once() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.makefile("rb").readline()
                connection.sendall(b'{"done": true, "said": "gone"}\n')

        thread = threading.Thread(target=once)
        thread.start()
        assert ask({"do": "signal", "signal": "SIGTERM"}, path) == {"done": True, "said": "gone"}
        thread.join()
    path.unlink()
    with pytest.raises(FleetError, match=r"start glm-helper\.socket"):
        ask({"do": "attest"}, path)
