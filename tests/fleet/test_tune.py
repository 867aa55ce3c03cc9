# SPDX-License-Identifier: Apache-2.0
"""A node is tuned: killed halfway it goes on, and what it ends with is faster, measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import Fleet, say
from .test_upgrade import ready

pytestmark = [pytest.mark.fleet, pytest.mark.long]

# The start is slow on purpose: most of eight requests wait.
SLOW = ["-e", "serving_max_num_seqs=2"]
LOAD = [
    *("-e", "benchmark_prompt_tokens=64", "-e", "benchmark_output_tokens=32"),
    *("-e", "benchmark_warmup_tokens=8", "-e", "benchmark_rounds=1", "-e", "benchmark_clients=0"),
]
SETTINGS = {"serving_max_num_seqs": [2, 16], "OMP_NUM_THREADS": [None, 1]}
HELD = "cat /var/lib/glm-fleet/held.json"
RUNS = "readlink /etc/glm-fleet/deployments/current"


def benchmark(fleet: Fleet, node: str, folder: Path, *arguments: str) -> float:
    """Return the tokens a second of eight requests at once."""
    run = fleet.playbook(
        *("playbooks/benchmark.yml", "--limit", node, *LOAD, *arguments),
        *("-e", "benchmark_streams=[8]", "-e", f"benchmark_report_dir={folder}"),
    )
    assert run.rc == 0, run.output[-4000:]
    report = json.loads((folder / "benchmark.json").read_text())
    (target,) = (each for each in report["targets"] if each["name"] == node)
    return float(target["levels"][0]["output_rate"])


def test_a_tune_ends_with_something_faster(fleet: Fleet, tmp_path: Path) -> None:
    slow = fleet.playbook("site.yml", *SLOW)
    assert slow.rc == 0, slow.output[-4000:]
    node = fleet.nodes[-1]
    before, ran = benchmark(fleet, node, tmp_path, *SLOW), fleet.shell(node, RUNS).output
    asked = [
        *("playbooks/tune.yml", "--limit", node, *SLOW, *LOAD),
        *("-e", json.dumps({"tune_settings": SETTINGS, "tune_streams": [8], "tune_starts": 3})),
        *("-e", f"benchmark_report_dir={tmp_path}"),
    ]
    path = tmp_path / f"tune-{node}.json"
    fleet.kill_playbook_at(f"{node}: try 3:", *asked)
    halfway = json.loads(path.read_text())
    assert halfway["state"] == "running"
    assert len(halfway["tries"]) == 2
    assert node in fleet.shell(fleet.gateway, HELD).output
    assert node not in ready(fleet)

    run = fleet.playbook(*asked)
    assert run.rc == 0, run.output[-6000:]
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["state"] == "done"
    assert record["tries"][:2] == halfway["tries"], "what was measured stays measured"
    best = record["best"]
    assert best["better"], run.output[-3000:]
    assert best["settings"]["serving_max_num_seqs"] == 16
    assert fleet.shell(node, RUNS).output == ran, "it is back to what it ran"
    assert ready(fleet) == fleet.nodes
    assert node not in fleet.shell(fleet.gateway, HELD).output

    file = tmp_path / f"tune-{node}.yml"
    assert yaml.safe_load(file.read_text())["serving_max_num_seqs"] == 16
    # As an operator does it, and measured by another run.
    roll = fleet.playbook("site.yml", *SLOW, "-e", f"@{file}")
    assert roll.rc == 0, roll.output[-4000:]
    after = benchmark(fleet, node, tmp_path, *SLOW, "-e", f"@{file}")
    say(f"tuned: {before:.0f} -> {after:.0f} tok/s; the tune said {best['gain']:.2f} times")
    assert after > 1.1 * before
