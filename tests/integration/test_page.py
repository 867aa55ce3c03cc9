# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: a healthy fleet and a broken one, wide and narrow."""

from __future__ import annotations

import copy
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.health import html
from glm_fleet.health.tables import health_json
from test_judge import FAULTS, fleet_records, judge

from tests.browser import browse, too_wide

TEMPLATE = Path(__file__).resolve().parents[2] / "roles/health/templates/fleet.html.j2"


def kept_runs(count: int) -> list[dict[str, Any]]:
    """Return reports of checks five minutes apart, some of them with a fault."""
    runs: list[dict[str, Any]] = []
    for number in range(count):
        records = fleet_records()
        for place, record in enumerate(records.values()):
            facts = record["node"]
            for gpu in facts.get("gpu", {}).get("gpus", ()):
                gpu.update(
                    bus_id=f"00000000:{gpu['index']:02X}:00.0",
                    temperature_c=44 + gpu["index"] + place,
                    power_draw_w=310.0,
                    memory_used_mib=73000,
                )
            if "attestation" in facts:
                probe = facts["attestation"]
                probe["canary"]["tokens_per_second"] = 54.0 + (number * 7 + place * 3) % 5
                probe["engine"]["after"]["time_s"] += number * 300
                load = number * 400 + 900 * math.sin(number / 3 + place / 5)
                for key in ("steps", "generated_tokens", "requests"):
                    probe["engine"]["after"][key] += load * 300
                for key, bound in (("first_token", 0.8), ("between_tokens", 0.04)):
                    count = 5000.0 * number
                    late = 90 * number + 150 * math.sin(number / 2 + place)
                    probe["engine"]["after"][key] = {
                        "count": count,
                        "sum": count * bound / 2,
                        "buckets": [
                            [bound / 4, count / 2],
                            [bound, count - late],
                            [bound * 2, count],
                        ],
                    }
            facts["clock"]["epoch_s"] = 1_795_000_000.0 + number * 300
        if number in (3, 4):
            FAULTS["ECC"][0](records["gpu03"]["node"])
        time = f"2026-11-22T{10 + number // 12:02}:{number % 12 * 5:02}:00+00:00"
        previous = runs[-1] if runs else {}
        runs.append(health_json(*judge(records, previous), time, previous))
    return runs


def broken_report(before: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a fleet where several things went wrong at once."""
    records = copy.deepcopy(fleet_records())
    for name, faults in {"gpu01": ["GPU lost", "Xid", "ECC", "disk"], "gpu02": ["hung"]}.items():
        facts = records[name]["node"]
        for gpu in facts["gpu"]["gpus"]:
            gpu["bus_id"] = f"00000000:{gpu['index']:02X}:00.0"
        for fault in faults:
            FAULTS[fault][0](facts)
    records["gpu01"]["node"]["xids"][0]["time_s"] += 10**6
    records["gpu03"] = {"message": "Connection timed out", "groups": ["gpu_nodes"]}
    records["gw01"]["node"]["gateway"]["servers"][2]["status"] = "DOWN"
    return health_json(*judge(records, before), "2026-11-22T12:00:00+00:00", before)


USED = {"name": "batch", "requests": 70, "refused": 3, "failed": 1, "at_once": 2,
        "bytes_in": 5000, "bytes_out": 70_000, "tokens_in": 40, "tokens_out": 9}  # fmt: skip
RUNS = kept_runs(20)
PAGES = {
    "healthy": html.render_page(RUNS[-1], RUNS[:-1], TEMPLATE),
    "broken": html.render_page(broken_report(RUNS[-1]), RUNS, TEMPLATE),
    "first": html.render_page({**RUNS[0], "previous": None, "changes": []}, [], TEMPLATE),
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_window(name: str, width: int, tmp_path: Path) -> None:
    assert not too_wide(tmp_path, PAGES[name], width)


def test_the_pages_say_what_there_is_to_say(tmp_path: Path) -> None:
    healthy = browse(tmp_path, PAGES["healthy"], "--dump-dom")
    assert "All is well" in healthy
    assert "What needs attention" not in healthy
    assert healthy.count('class="board healthy"') == 24
    broken = browse(tmp_path, PAGES["broken"], "--dump-dom")
    assert "gpu01, gpu02, gpu03 need attention" in broken
    for words in (
        "GPU count: 7",
        "Xid 79",
        "uncorrectable on GPU 1",
        "nearly full",
        "the engine hangs",
        "(Connection timed out)",
        "gpu03: verdict healthy -&gt; unknown",
        'class="board lost"',
        'class="board broken"',
    ):
        assert words in broken, words


def test_a_picture_of_each_is_not_blank(tmp_path: Path) -> None:
    for name in ("healthy", "broken"):
        picture = tmp_path / f"{name}.png"
        browse(tmp_path, PAGES[name], "--window-size=1280,1600", f"--screenshot={picture}")
        content = picture.read_bytes()
        assert struct.unpack(">II", content[16:24]) == (1280, 1600)
        assert len(content) > 60_000, "a blank page compresses to next to nothing"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for text in PAGES.values():
        for word in ("<script", "http://", "https://", "url(", "@import", "src="):
            assert word not in text


def test_what_hosts_say_is_text_and_never_markup() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    records = fleet_records(2)
    facts = records["gpu02"]["node"]
    facts["gpu"]["gpus"][0].update(name=evil, throttle_reasons=[evil])
    facts["os"]["kernel"] = evil
    facts["errors"].append(evil)
    records["gw01"]["node"]["gateway"]["servers"][0].update(status=evil, check=evil)
    records["gw01"]["node"]["gateway"]["version"] = evil
    records["gw01"]["node"]["gateway"]["clients"] = [{**USED, "name": evil}]
    nodes, gateways = judge(records)
    report = health_json(nodes, gateways, "2026-11-22T12:00:00+00:00")
    text = html.render_page(report, [], TEMPLATE)
    assert "<img" not in text
    assert text.count("&lt;img src=x") >= 5
    assert evil.partition(">")[2] not in text


def test_the_page_says_what_each_client_did() -> None:
    records = fleet_records(1)
    # A gateway from before it counted tokens has none.
    early = {key: value for key, value in USED.items() if not key.startswith("tokens")}
    records["gw01"]["node"]["gateway"]["clients"] = [USED, {**early, "name": "night"}]
    report = health_json(*judge(records), "2026-11-22T12:00:00+00:00")
    text = html.render_page(report, [], TEMPLATE)
    for cells in (("batch", "70", "3"), ("night", "70", "3")):
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert ">40 + 9</td>" in text
    assert ">0 + 0</td>" in text


def test_a_gap_in_the_runs_is_a_gap_in_the_line() -> None:
    runs = copy.deepcopy(RUNS[:6])
    for node in runs[3]["nodes"]:
        node["tokens_per_second"] = None
    chart = html.view(runs[-1], runs[:-1])["charts"][1]
    assert chart["line"].count("M") == 2
    assert len(chart["ranges"]) == 2
    runs[4] = runs[3]
    chart = html.view(runs[-1], runs[:-1])["charts"][1]
    assert len(chart["dots"]) == 1
    assert chart["top"] == "60"
