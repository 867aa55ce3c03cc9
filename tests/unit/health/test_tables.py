# SPDX-License-Identifier: Apache-2.0
"""Tables fit, verdicts hold, JSON keeps its schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from glm_fleet.core.table import Line, render_table
from glm_fleet.health import history
from glm_fleet.health.hardware import WARNING, Problem
from glm_fleet.health.tables import (
    health_json,
    preflight_json,
    render_health,
    render_preflight,
    write_json,
    write_text,
)
from test_judge import fleet_records, judge

TIME = "2026-11-22T10:00:00+00:00"


def test_table_is_aligned_and_wrapped_to_the_width() -> None:
    rows = [("gpu01", "GPU count", "8", "7: one of them fell off the bus during the night")]
    lines = [line.text for line in render_table(("host", "check", "want", "found"), rows, 44)]
    assert max(len(line) for line in lines) <= 44
    assert lines[0].split() == ["host", "check", "want", "found"]
    assert lines[1].startswith("-----  ---------  ----  ---")
    assert "7: one of them" in lines[2]
    assert " ".join(line[24:].strip() for line in lines[2:]) == rows[0][3]


def test_preflight_table_names_all_and_sums_up() -> None:
    problems = [
        Problem("gpu02", "ECC history", "none", "2", "watch it", WARNING),
        Problem("gpu02", "GPU count", "8", "7", "power-cycle"),
        Problem("gpu01", "MIG", "off", "on", "nvidia-smi -mig 0"),
    ]
    lines = render_preflight(["gpu01", "gpu02", "gw01"], problems, 100)
    assert [line.text.split()[0] for line in lines[2:5]] == ["gpu01", "gpu02", "gpu02"]
    assert [line.tone for line in lines[2:5]] == ["bad", "bad", "warning"]
    assert lines[-1].text == (
        "Preflight: 2 problems on 2 of 3 hosts, 1 warning. Nothing was changed."
    )
    data = preflight_json(["gpu01", "gpu02", "gw01"], problems, TIME)
    assert data["summary"] == {"errors": 2, "warnings": 1}
    assert render_preflight(["gpu01"], [], 100)[0].tone == "good"


def test_health_table_and_json(tmp_path: Path) -> None:
    records = fleet_records(3)
    records["gpu02"] = {"message": "timed out", "groups": ["gpu_nodes"], "node": {}, "expect": []}
    before, _ = judge(fleet_records(3))
    nodes, gateways = judge(records)
    data = health_json(nodes, gateways, TIME, health_json(before, gateways, "earlier"))
    lines = render_health(nodes, gateways, 160, data["changes"], data["previous"])
    text = "\n".join(line.text for line in lines)
    assert "8/8 A100-SXM4-80GB" in text
    assert "56.0" in text
    assert "2 run, 1 wait, KV 30%" in text
    assert "gpu02 is unknown: no answer: timed out." in text
    assert "gateway gw01 (HAProxy 2.6): healthy, 3 UP; sent: gpu01 40" in text
    assert "Since earlier:\n  gpu02: verdict healthy -> unknown" in text
    assert lines[-1].text == "Health: 2 of 3 nodes and 1 of 1 gateway healthy."
    assert lines[-1].tone == "bad"
    assert data["schema"] == "glm-fleet/health/1"
    assert data["summary"]["nodes"] == {"healthy": 2, "degraded": 0, "broken": 0, "unknown": 1}
    path = tmp_path / "reports" / "fleet.json"
    write_json(path, data)
    write_json(path, data)
    assert json.loads(path.read_text())["nodes"][0]["tokens_per_second"] == 56.04
    assert [each.name for each in path.parent.iterdir()] == ["fleet.json"]


def test_the_history_rotates_and_survives_a_damaged_file(tmp_path: Path) -> None:
    nodes, gateways = judge(fleet_records(3))
    for second in range(5):
        report = health_json(nodes, gateways, f"2026-11-22T10:00:0{second}+00:00")
        history.save(tmp_path, report, 3)
    assert [path.name[17:19] for path in sorted(tmp_path.iterdir())] == ["02", "03", "04"]
    kept = history.load(tmp_path, 10)
    assert [each["time"][17:19] for each in kept] == ["02", "03", "04"]
    assert "facts" not in kept[0]["nodes"][0]
    assert kept[0]["nodes"][0]["baseline"]["n_restarts"] == 0
    (tmp_path / "2026-11-22T10-00-04Z.json").write_text("{")
    (tmp_path / "notes.txt").write_text("kept")
    assert [each["time"][17:19] for each in history.load(tmp_path, 10)] == ["02", "03"]
    assert history.load(tmp_path / "none", 10) == []


def test_changes_tell_each_fault_that_came_or_went_once() -> None:
    nodes, gateways = judge(fleet_records(3))
    healthy = health_json(nodes, gateways, TIME)
    records = fleet_records(3)
    records["gpu01"]["node"]["gpu"]["gpus"].pop()
    broken = health_json(*judge(records), TIME)
    came = history.changes(healthy, broken)
    assert [each["what"] for each in came] == ["verdict", "GPUs", "fault"]
    assert {each["host"] for each in came} == {"gpu01"}
    assert came[0]["before"] == "healthy"
    assert came[0]["after"] == "degraded"
    assert history.sentence(came[2]).startswith("gpu01: new: GPU count: 7")
    went = history.changes(broken, healthy)
    assert history.sentence(went[2]).startswith("gpu01: no longer: GPU count: 7")
    assert history.changes(broken, broken) == []
    assert history.changes({}, broken) == []


def test_a_run_with_a_limit_makes_nobody_forgotten(tmp_path: Path) -> None:
    full = health_json(*judge(fleet_records(3)), TIME)
    records = {name: each for name, each in fleet_records(3).items() if name != "gpu02"}
    limited = health_json(*judge(records), TIME, full)
    assert limited["changes"] == []
    merged = history.latest([full, limited])
    assert sorted(each["name"] for each in merged["nodes"]) == ["gpu01", "gpu02", "gpu03"]
    assert history.latest([]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "\x1b]52;c;aGVsbG8=\x07",
        "\x1b[2J\x1b[H",
        "broken\r3 of 3 healthy",
        "a\n\x1b[1A3 of 3 healthy",
        "\x9b2J",
        "\u202eyhtlaeh",
        "\ud800",
    ],
)
def test_what_a_host_says_commands_no_terminal(text: str) -> None:
    shown = Line(f"gpu01: {text}").text
    assert shown.isprintable()
    assert shown.startswith("gpu01: ")
    rows = render_table(("host", "says"), [("gpu01", text)], 80)
    assert all(line.text.isprintable() for line in rows)


def test_plain_text_is_shown_as_it_is() -> None:
    assert Line("größer → 5 °C\tx").text == "größer → 5 °C x"


def test_reports_are_for_the_user_who_asked(tmp_path: Path) -> None:
    write_json(tmp_path / "a/fleet.json", {})
    write_text(tmp_path / "a/fleet.prom", "", 0o644)
    assert (tmp_path / "a/fleet.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a/fleet.prom").stat().st_mode & 0o777 == 0o644
    history.save(tmp_path / "history", {"time": "2026-11-27T12:00:00Z", "nodes": []}, 3)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "history").iterdir()} == {0o600}
