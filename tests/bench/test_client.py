# SPDX-License-Identifier: Apache-2.0
"""Is the benchmark's client the limit? Its ceiling, and its figures beside vLLM's own client."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from glm_fleet.bench import client
from glm_fleet.bench.stream import Server, send_wave

from lab.hosts import ssh_command
from lab.settings import ALL_HOSTS, INVENTORY

from ..fleet.conftest import ROOT
from .conftest import Record

REFERENCE = 625.0  # tokens per second of the fastest node we know of, with 32 streams
TOKENS = 3000
ROUNDS = 3
# Of each stream: 24 requests in 8 streams would be over after 3 s.
REQUESTS = 24
NODE = ALL_HOSTS["gpu01"]
PROMPT, OUTPUT = 64, 64
Figures = dict[str, float]
VLLM = (
    "/opt/glm-fleet/current/bin/vllm bench serve --backend openai --endpoint /v1/completions "
    "--base-url http://127.0.0.1:8000 --model glm-5.2 --tokenizer /srv/glm-fleet/model "
    f"--dataset-name random --random-input-len {PROMPT} --random-output-len {OUTPUT} "
    "--ignore-eos --percentile-metrics ttft,tpot,itl --disable-tqdm --save-result "
    "--result-filename /tmp/bench-serve.json"
)


@pytest.fixture
def stub() -> Iterator[int]:
    """The port of a server, in a process of its own, that emits tokens as fast as it can."""
    command = [sys.executable, "-m", "tests.stub"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("streams", [1, 32])
def test_the_ceiling_is_far_above_a_node(streams: int, stub: int, record: Record) -> None:
    server = Server("127.0.0.1", stub, "glm-5.2")
    bodies = [
        client.request_body("glm-5.2", client.Load(), number, tokens=TOKENS, salt="bench")
        for number in range(streams)
    ]
    # The client is one thread: what it does in a second of its processor is its ceiling,
    # however busy this machine is.
    begun = time.process_time()
    answers = send_wave(server, bodies, 300)
    ceiling = sum(answer.tokens for answer in answers) / (time.process_time() - begun)
    assert [answer.problem for answer in answers] == [""] * streams
    record(
        f"benchmark_client_ceiling_{streams}",
        REFERENCE / ceiling,
        goal=0.05,
        unit="of the ceiling is what a node needs",
        context=f"{ceiling:.0f} tok/s in {streams} streams, one event a token",
    )


# Client and node share this machine: on the same processors, each figure would be that of
# whichever client takes less of them.
ALONE = """
set -e
mkdir -p /run/systemd/system/glm-serving.service.d
echo '[Service]
CPUAffinity=0' > /run/systemd/system/glm-serving.service.d/bench.conf
systemctl daemon-reload
systemctl restart glm-serving
"""
TOGETHER = """
rm -r /run/systemd/system/glm-serving.service.d
systemctl daemon-reload
systemctl restart glm-serving
"""


@pytest.fixture(scope="module")
def serving() -> Iterator[None]:
    """A node of the lab that serves, on one processor; these figures need vLLM."""
    if not INVENTORY.exists():
        pytest.skip("the lab is down: make lab-up, then site.yml")
    if not answers():
        pytest.skip(f"{NODE.name} of the lab does not serve")
    on_node(f"sudo sh -c {shlex.quote(ALONE)}")
    try:
        end = time.monotonic() + 300
        while not answers():
            assert time.monotonic() < end, f"{NODE.name} did not start on one processor"
            time.sleep(1)
        yield
    finally:
        on_node(f"sudo sh -c {shlex.quote(TOGETHER)}")


def answers() -> bool:
    """Tell whether the node's server knows its model."""
    try:
        urllib.request.urlopen(f"http://{NODE.address}:8000/v1/models", timeout=5).close()
    except OSError:
        return False
    return True


def on_node(script: str) -> str:
    command = [*ssh_command(NODE), script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def told_by_node() -> tuple[float, float]:
    """Return the seconds and the number of all gaps between tokens, as the node counts them."""
    with urllib.request.urlopen(f"http://{NODE.address}:8000/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    name = "vllm:inter_token_latency_seconds_"
    seconds, gaps = (
        next(float(line.split()[-1]) for line in lines if line.startswith(name + what))
        for what in ("sum{", "count{")
    )
    return seconds, gaps


def beside_the_node(measure: Callable[[int, int], Figures], streams: int, seed: int) -> Figures:
    """Return what a client measures in units of what the node itself counted meanwhile.

    The speed of this machine, and so of the node, changes by half from one minute to the next:
    two clients, one after the other, do not see the same node.
    """
    before = told_by_node()
    found = measure(streams, seed)
    seconds, gaps = (now - then for now, then in zip(told_by_node(), before))
    pace = 1000 * seconds / gaps
    return {
        "output_rate": found["output_rate"] * pace / 1000 / streams,
        "time_per_token": found["time_per_token"] / pace,
        "itl": found["itl"] / pace,
    }


def ours(streams: int, seed: int) -> Figures:
    """Measure the node by the playbook."""
    extra = {
        "benchmark_streams": [streams],
        "benchmark_rounds": REQUESTS,
        "benchmark_prompt_tokens": PROMPT,
        "benchmark_output_tokens": OUTPUT,
        "benchmark_seed": seed,
        "benchmark_min_ratio": 0,
    }
    command = [
        str(ROOT / ".venv/bin/ansible-playbook"),
        *("-i", str(INVENTORY.parent), "playbooks/benchmark.yml", "--limit", NODE.name),
        *("-e", json.dumps(extra)),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    report: dict[str, Any] = json.loads((ROOT / "reports/benchmark.json").read_text())
    target = next(each for each in report["targets"] if each["name"] == NODE.name)
    assert not target["error"], done.stdout[-2000:]
    (level,) = target["levels"]
    return {
        "output_rate": level["output_rate"],
        "time_per_token": 1000 / level["decode_per_stream"],
        "itl": level["itl_ms"]["median"],
    }


def theirs(streams: int, seed: int) -> Figures:
    """Measure the node by the client of its own vLLM, under the same load."""
    count = (
        f"--num-prompts {REQUESTS * streams} --max-concurrency {streams} --num-warmups {streams}"
    )
    on_node(f"cd /tmp && {VLLM} {count} --seed {seed} >/dev/null 2>/tmp/bench-serve.log")
    found = json.loads(on_node("cat /tmp/bench-serve.json"))
    return {
        "output_rate": found["output_throughput"],
        "time_per_token": found["median_tpot_ms"],
        "itl": found["median_itl_ms"],
    }


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("streams", [1, 8])
def test_the_figures_are_those_of_vllm_bench_serve(streams: int, record: Record) -> None:
    rounds = [
        (beside_the_node(ours, streams, seed), beside_the_node(theirs, streams, seed))
        for seed in range(1, ROUNDS + 1)
    ]
    for name in ("output_rate", "time_per_token", "itl"):
        ratio = statistics.median(mine[name] / other[name] for mine, other in rounds)
        record(
            f"benchmark_client_{name}_{streams}",
            abs(ratio - 1),
            goal=0.05,
            unit="away from vllm bench serve",
            context=f"ratio {ratio:.3f}, median of {ROUNDS} pairs, {streams} streams, "
            "each client's figures in units of the gap between tokens that the node counted",
        )
