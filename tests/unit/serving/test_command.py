# SPDX-License-Identifier: Apache-2.0
"""The command line, environment and start gate of a node."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core import procfs
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.node import prestart
from glm_fleet.serving import record as serving_record
from glm_fleet.serving.command import (
    differences,
    environment_file,
    serve_command,
    unit_words,
)

from tests.defaults import defaults

ROOT = Path(__file__).resolve().parents[3]


def settings(**changed: Any) -> dict[str, Any]:
    """The defaults of the role, as its internal variables hand them over."""
    found = defaults("serving")
    given = {
        key.removeprefix("serving_"): value
        for key, value in found.items()
        if key.startswith("serving_")
    }
    given["model_path"] = given["model_link"]
    given["shutdown_timeout"] = found["serve_drain_timeout"]
    return {**given, **changed}


def test_the_command_line_of_a_real_node() -> None:
    assert serve_command(settings()) == [
        "serve",
        "/srv/glm-fleet/model",
        "--host",
        "0.0.0.0",
        "--port",
        "8000",
        "--served-model-name",
        "glm-5.2",
        "--tensor-parallel-size",
        "8",
        "--attention-backend",
        "TRITON_MLA_SPARSE",
        "--dtype",
        "bfloat16",
        "--kv-cache-dtype",
        "bfloat16",
        "--max-model-len",
        "32768",
        "--gpu-memory-utilization",
        "0.9",
        "--max-num-seqs",
        "32",
        "--tool-call-parser",
        "glm47",
        "--reasoning-parser",
        "glm45",
        "--shutdown-timeout",
        "600",
        "--enable-auto-tool-choice",
        "--compilation-config",
        '{"cudagraph_mode":"FULL_AND_PIECEWISE"}',
    ]


def test_eager_has_its_own_flag_and_empty_values_are_left_to_vllm() -> None:
    command = serve_command(settings(cuda_graphs="eager", attention_backend="", dtype=""))
    assert command[-1] == "--enforce-eager"
    assert not {"--attention-backend", "--dtype", "--compilation-config"} & set(command)


def test_tool_calls_are_switched_on_with_their_parser() -> None:
    command = serve_command(settings(tool_call_parser="glm47", extra_arguments=["--seed", 1]))
    assert "--enable-auto-tool-choice" in command
    assert command[-2:] == ["--seed", "1"]


def test_a_fleet_without_tools_leaves_the_choice_to_vllm() -> None:
    plain = settings(tool_call_parser="", reasoning_parser="", max_num_seqs="")
    assert not {word for word in serve_command(plain) if "parser" in word or "seqs" in word}
    command = serve_command(settings(chat_template="/etc/chat.jinja"))
    assert command[command.index("--chat-template") + 1] == "/etc/chat.jinja"


def test_words_of_a_unit_are_quoted_as_systemd_reads_them() -> None:
    assert unit_words(["serve", "/m", "--x", '{"a":1}', "--pay", "5$ 100%", "--end"]) == (
        'serve \\\n  /m \\\n  --x "{\\"a\\":1}" \\\n  --pay "5$$ 100%%" \\\n  --end'
    )


def test_an_environment_file_is_sorted_and_leaves_out_what_is_empty() -> None:
    text = environment_file({"B": "two words", "A": 1, "C": "", "D": None})
    assert text == "A=1\nB='two words'\n"
    with pytest.raises(FleetError, match="line break"):
        environment_file({"A": "1\n2"})


RUNNING = {
    "active": True,
    "invocation": "i1",
    "record": {
        "invocation": "i1",
        "release": "r1",
        "model": "m1",
        "unit_sha256": "u1",
        "environment_sha256": "e1",
    },
}
WANTED = {"release": "r1", "model": "m1", "unit_sha256": "u1", "environment_sha256": "e1"}


@pytest.mark.parametrize(
    ("running", "wanted", "said"),
    [
        (RUNNING, WANTED, []),
        (RUNNING, {**WANTED, "release": "r2"}, ["release r1 -> r2"]),
        (
            RUNNING,
            {**WANTED, "model": "m2", "unit_sha256": "u2"},
            ["model m1 -> m2", "the unit or its command line"],
        ),
        ({**RUNNING, "active": False}, WANTED, ["the service does not run"]),
        ({**RUNNING, "invocation": "i2"}, WANTED, ["nothing proves what runs"]),
        ({**RUNNING, "record": {}}, WANTED, ["nothing proves what runs"]),
    ],
)
def test_what_a_restart_would_change(
    running: Mapping[str, Any], wanted: Mapping[str, str], said: list[str]
) -> None:
    assert differences(running, wanted) == said


class Smi:
    """Answers for nvidia-smi: MiB in use on one GPU, a value for each call."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)

    def __call__(self, argv: Sequence[str], **_: Any) -> RunResult:
        assert argv[0] == "nvidia-smi"
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return RunResult(0, f"0, 4\n1, {value}\n", "")


ENGINE = procfs.Process(41, 990, "VLLM::EngineCore")
SERVER = procfs.Process(40, 990, "/opt/glm-fleet/current/bin/python /opt/x/bin/vllm serve /srv/m")
OTHERS = [
    procfs.Process(1, 0, "/sbin/init"),
    procfs.Process(42, 1000, "VLLM::EngineCore"),
    procfs.Process(43, 990, "/usr/bin/python3 -B -m glm_fleet.gate --user glm"),
]


def pass_gate(
    smi: Smi, *lists: list[procfs.Process], killed: list[tuple[int, int]] | None = None
) -> float:
    """Run the gate with a clock that moves only when it sleeps; return the seconds waited.

    ``killed`` collects (pid, signal); no signal leaves the test.
    """
    now = [0.0]
    signals: list[tuple[int, int]] = [] if killed is None else killed
    remaining = list(lists)

    def look() -> list[procfs.Process]:
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    prestart.wait_until_clear(
        runner=smi,
        processes=look,
        uid=990,
        limit_mib=1024,
        patience_s=5,
        kill=lambda pid, number: signals.append((pid, number)),
        say=lambda _: None,
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
        clock=lambda: now[0],
    )
    return now[0]


def test_the_gate_opens_on_a_free_node() -> None:
    assert pass_gate(Smi(0), OTHERS) == 0


def test_the_gate_waits_for_memory_that_the_driver_gives_back_late() -> None:
    assert pass_gate(Smi(70_000, 70_000, 12), OTHERS) == 2


@pytest.mark.parametrize("engine", [ENGINE, SERVER])
def test_the_gate_names_orphans_of_the_service(engine: procfs.Process) -> None:
    with pytest.raises(FleetError, match=f"pid {engine.pid}"):
        pass_gate(Smi(0), [*OTHERS, engine])


def test_the_gate_names_the_full_gpu() -> None:
    with pytest.raises(FleetError, match="GPU 1: 70000 MiB"):
        pass_gate(Smi(70_000), OTHERS)


def test_the_record_names_what_the_links_point_at(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("/opt/glm-fleet/releases/r1")
    (tmp_path / "model").symlink_to("/srv/glm-fleet/artifacts/model/m1")
    (tmp_path / "unit").write_text("[Unit]\n")
    record = serving_record.make_record(
        release_link=tmp_path / "current",
        model_link=tmp_path / "model",
        unit=tmp_path / "unit",
        environment=tmp_path / "none",
        invocation="i1",
    )
    assert record["release"] == "r1"
    assert record["model"] == "m1"
    assert len(record["unit_sha256"]) == 64
    assert record["environment_sha256"] == ""
    json.dumps(record)


def test_the_gate_ends_what_is_left_of_the_own_engine_and_nothing_else() -> None:
    killed: list[tuple[int, int]] = []
    assert pass_gate(Smi(0), [*OTHERS, ENGINE], [*OTHERS, ENGINE], OTHERS, killed=killed) == 2
    assert killed == [(ENGINE.pid, signal.SIGTERM)]


def test_what_ignores_sigterm_gets_sigkill_at_half_time() -> None:
    killed: list[tuple[int, int]] = []
    with pytest.raises(FleetError, match="An earlier engine"):
        pass_gate(Smi(0), [SERVER], killed=killed)
    assert killed == [(SERVER.pid, signal.SIGTERM), (SERVER.pid, signal.SIGKILL)]
