# SPDX-License-Identifier: Apache-2.0
"""Where a cold start's time went, on journals of real starts."""

from __future__ import annotations

from pathlib import Path

from glm_fleet.serving.phases import phases_in_words, start_phases

LOGS = Path(__file__).parents[1] / "fixtures/vllm-logs"
COLD = (LOGS / "h100-0.23.0-pr38476-corrected-full-decode-only-78-layers-cold.log").read_text()
SINCE = "Fri 2026-11-27 13:20:33 UTC"


def test_the_phases_of_a_real_start_add_up() -> None:
    phases = start_phases(COLD.splitlines(), SINCE)
    assert phases == {
        "imports": 29.0,
        "configuration": 50.0,
        "processes": 2.0,
        "repack": 62.0,
        "compile": 102.0,
        "first run": 60.0,
        "memory": 21.0,
        "graphs": 25.0,
        "engine": 1.0,
        "server": 1.0,
    }
    # What was measured from outside, to the second of the stamps.
    assert abs(sum(phases.values()) - 353) <= 1
    assert phases_in_words(phases).startswith("353 s: imports 29, configuration 50")


def test_the_slowest_rank_ends_a_phase() -> None:
    line = "(Worker_TP{} pid=4{}) INFO 11-27 13:21:{:02} [x.py:1] Model loading took 56 GiB memory"
    lines = [
        "(APIServer pid=1) INFO 11-27 13:20:40 [x.py:1] non-default args: {}",
        line.format(0, 0, 30),
        line.format(1, 1, 50),
        line.format(2, 2, 10),
    ]
    assert start_phases(lines, SINCE) == {"imports": 7.0, "repack": 70.0}


def test_a_start_over_new_year() -> None:
    lines = [
        "(APIServer pid=1) INFO 12-31 23:59:50 [x.py:1] non-default args: {}",
        "(APIServer pid=1) INFO 01-01 00:04:50 [x.py:1] Starting vLLM server on http://x",
    ]
    phases = start_phases(lines, "Thu 2026-12-31 23:59:30 UTC")
    assert phases == {"imports": 20.0, "server": 300.0}


def test_nothing_is_made_up() -> None:
    assert start_phases(COLD.splitlines(), "") == {}
    assert start_phases(["no stamps here"], SINCE) == {}
    assert phases_in_words({}) == ""
