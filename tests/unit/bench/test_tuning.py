# SPDX-License-Identifier: Apache-2.0
"""The search for the fastest settings, against engines that are simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from glm_fleet.bench import tuned
from glm_fleet.bench.tuning import (
    Budget,
    Setting,
    Settings,
    Try,
    check_settings,
    most_left,
    next_step,
    verdict,
    wants_more,
)
from glm_fleet.core.errors import FleetError
from glm_fleet.serving.command import parser_options

from tests.simulated import Engine, full_grid, tune

BASE = tuned.Base(
    {"serving_cuda_graphs": "piecewise", "serving_max_num_seqs": "32"},
    ["--seed", "1", "--max-num-batched-tokens=2048"],
    {"NCCL_DEBUG": "WARN", "NCCL_ALGO": "Ring"},
)


def test_a_third_of_the_starts_finds_nearly_the_best_of_a_full_grid() -> None:
    shares = []
    for seed in range(60):
        engine = Engine(seed, noise=0.02)
        found = tune(engine, Budget(starts=5, limit_s=1e9))
        assert engine.starts <= 16 / 3
        shares.append(engine.rate(found) / max(map(engine.rate, full_grid(engine.settings))))
    within = sum(each >= 0.95 for each in shares) / len(shares)
    assert within >= 0.95, sorted(shares)[:6]


def test_noise_alone_hardly_ever_changes_anything() -> None:
    engines = [Engine(seed, noise=0.03, flat=True) for seed in range(100)]
    changed = sum(bool(tune(engine, Budget(starts=5, limit_s=1e9))) for engine in engines)
    # Two standard deviations, on one side.
    assert changed <= 4


def rated(settings: Settings, *rates: float, **more: Any) -> Try:
    return Try(settings, tuple({"1": each} for each in rates), **more)


def test_a_try_that_crashed_lost_and_is_not_tried_in_other_company() -> None:
    settings = [
        Setting("serving_cuda_graphs", ("piecewise", "full"), "piecewise"),
        Setting("serving_max_num_seqs", (32, 64), 32),
    ]
    tries: list[Try] = []
    while (step := next_step(settings, tries, Budget(9, 1e9), 0)).kind != "end":
        crash = "out of memory" if step.settings.get("serving_cuda_graphs") == "full" else ""
        rate = 150.0 if step.settings else 100.0
        rates = [] if crash else [rate, rate]
        more: dict[str, Any] = {"problem": crash, "confirms": step.kind == "confirm"}
        tries.append(rated(step.settings, *rates, **more))
    assert [each.settings for each in tries] == [
        {},
        {"serving_cuda_graphs": "full"},
        {"serving_max_num_seqs": 64},
        {"serving_max_num_seqs": 64},
    ]
    found = verdict(tries, 0.02)
    assert found
    assert (found.settings, found.better) == ({"serving_max_num_seqs": 64}, True)
    assert found.gain == pytest.approx(1.5)


def test_a_step_of_a_number_that_gave_less_drops_what_lies_behind_it() -> None:
    settings = [Setting("n", (1, 2, 4, 8, 16), 4)]
    rates = {4: 100.0, 8: 90.0, 2: 120.0, 1: 110.0}
    tries: list[Try] = []
    while (step := next_step(settings, tries, Budget(9, 1e9), 0)).kind == "try":
        value = int(str(step.settings.get("n", 4)))
        tries.append(rated(step.settings, rates[value], rates[value]))
    assert [each.settings.get("n", 4) for each in tries] == [4, 8, 2, 1]
    assert step.settings == {"n": 2}


def test_time_out_of_service_has_a_limit_with_the_way_back() -> None:
    settings = [Setting("n", ("a", "b", "c"), "a")]
    budget = Budget(starts=9, limit_s=1000, start_s=200, measure_s=50)
    tries = [rated({}, 100, 100, started=False, measure_s=50)]
    assert next_step(settings, tries, budget, 50).kind == "try"
    # One start, its measurement, the second start of the best and the way back do not fit.
    step = next_step(settings, tries, budget, 400)
    assert (step.kind, step.why) == ("end", "no time is left")
    slower = [*tries, rated({"n": "b"}, 130, 130, start_s=300, measure_s=60)]
    assert next_step(settings, slower, budget, 300).kind == "confirm"
    assert next_step(settings, slower, budget, 500).kind == "end"


def test_the_second_start_decides() -> None:
    tries = [
        rated({}, 100, 101),
        rated({"n": "b"}, 130, 131),
        rated({"n": "b"}, 99, 100, confirms=True),
    ]
    found = verdict(tries, 0.02)
    assert found
    assert not found.better
    unconfirmed = verdict(tries[:2], 0.02)
    assert unconfirmed
    assert not unconfirmed.better, "it was chosen because it was high"


def test_what_runs_now_has_to_be_measured() -> None:
    step = next_step(
        [Setting("n", ("a", "b"), "a")], [Try({}, problem="it hangs")], Budget(9, 1e9), 0
    )
    assert (step.kind, "it hangs" in step.why) == ("end", True)
    assert verdict([Try({}, problem="it hangs")], 0.02) is None


def test_a_close_call_is_measured_again() -> None:
    rival = [rated({}, 100, 104)]
    assert wants_more(rival, [{"1": 101.0}], least=2, most=4)
    assert wants_more(rival, [{"1": 101.0}, {"1": 103.0}], least=2, most=4)
    assert not wants_more(rival, [{"1": 101.0}, {"1": 103.0}], least=2, most=2)
    assert not wants_more(rival, [{"1": 201.0}, {"1": 203.0}], least=2, most=4)


def test_nothing_to_try_is_refused() -> None:
    for settings in ([], [Setting("n", ())], [Setting("n", (1, 1))]):
        with pytest.raises(FleetError, match="nothing to tune"):
            check_settings(settings)


def test_the_estimate_counts_each_value_once() -> None:
    settings = [Setting("n", ("a", "b", "c"), "a"), Setting("m", (1, 2), None)]
    assert most_left(settings, [], Budget(9, 1e9)) == 5
    assert most_left(settings, [rated({"n": "b"}, 1)], Budget(3, 1e9)) == 2


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        ({"serving_max_num_seqs": 64}, {"serving_max_num_seqs": 64}),
        (
            {"--max-num-batched-tokens": 4096, "--async-scheduling": False},
            {
                "serving_extra_arguments": [
                    "--seed", "1", "--max-num-batched-tokens", "4096", "--no-async-scheduling",
                ]
            },
        ),
        ({"--max-num-batched-tokens": None}, {"serving_extra_arguments": ["--seed", "1"]}),
        ({"--max-num-batched-tokens": 2048}, {
            "serving_extra_arguments": ["--seed", "1", "--max-num-batched-tokens", "2048"]}),
        ({"NCCL_ALGO": None}, {"serving_environment": {"NCCL_DEBUG": "WARN"}}),
        ({"NCCL_PROTO": "LL"}, {"serving_environment": {**BASE.environment, "NCCL_PROTO": "LL"}}),
        ({}, {}),
    ],
)  # fmt: skip
def test_settings_become_variables_of_an_inventory(
    settings: Settings, variables: dict[str, Any]
) -> None:
    assert tuned.variables_for(settings, BASE) == variables


def test_values_of_the_inventory_are_found() -> None:
    names = (
        "serving_max_num_seqs",
        "--max-num-batched-tokens",
        "--seed",
        "--x",
        "NCCL_ALGO",
        "A_B",
    )
    assert [tuned.value_now(name, BASE) for name in names] == [32, 2048, 1, None, "Ring", None]


def test_only_what_the_release_has_is_tried() -> None:
    wanted = {
        "serving_cuda_graphs": ["full_decode_only", "piecewise", "eager"],
        "--async-scheduling": [True, False],
        "--new-in-the-next-one": [1, 2],
        "serving_max_num_seqs": [32],
    }
    settings, left_out = tuned.candidates(
        wanted, BASE, options=["--async-scheduling"], faults=["logits-past-the-row"]
    )
    assert [(each.name, each.values) for each in settings] == [
        ("serving_cuda_graphs", ("piecewise", "eager")),
        ("--async-scheduling", (True, False)),
    ]
    assert set(left_out) == {"serving_cuda_graphs", "--new-in-the-next-one"}


@pytest.mark.parametrize("name", ["--port", "--max-num-seqs", "serving_port", "PATH", "-x", "foo"])
def test_what_decides_what_is_served_is_not_tuned(name: str) -> None:
    with pytest.raises(FleetError, match="cannot change"):
        tuned.candidates({name: [1, 2]}, BASE, options=[], faults=[])


def record(*tries: Try) -> tuned.Record:
    return tuned.Record(
        "glm-fleet/tune/1", "gpu01", "running", "before", "tried", "2026-01-01T00:00:00+00:00",
        {}, {"serving_max_num_seqs": [32, 64]}, list(tries),
    )  # fmt: skip


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    lost = Try({"--x": True}, problem="no", start_s=3.0)
    wanted = record(rated({}, 100, 101), rated({"serving_max_num_seqs": 64}, 150, 151), lost)
    path = tmp_path / "tune.json"
    assert tuned.read_record(path) is None
    path.write_text(json.dumps(tuned.report(wanted, 0.02, BASE)))
    assert tuned.read_record(path) == wanted
    assert tuned.goes_on(wanted, "tried")
    assert not tuned.goes_on(wanted, "somebody switched it")


def test_the_inventory_file_has_what_was_better_and_nothing_else() -> None:
    better = {"serving_max_num_seqs": 64, "NCCL_ALGO": None}
    tries = [rated({}, 100, 101), rated(better, 150, 151), rated(better, 149, 150, confirms=True)]
    found = verdict(tries, 0.02)
    text = tuned.inventory_file(record(*tries), found, BASE)
    assert yaml.safe_load(text) == {
        "serving_max_num_seqs": 64,
        "serving_environment": {"NCCL_DEBUG": "WARN"},
    }
    nothing = tuned.inventory_file(record(tries[0]), verdict(tries[:1], 0.02), BASE)
    assert yaml.safe_load(nothing) == {}
    lines = [line.text for line in tuned.render(record(*tries), 0.02, 160)]
    assert any("1.48" in line and "3 again" in line for line in lines), lines


def test_a_node_that_is_held_by_an_unknown_tune_is_refused() -> None:
    with pytest.raises(FleetError, match="knows nothing of"):
        tuned.check_node("gpu01", current="x", active=True, lost=True, record="r")
    with pytest.raises(FleetError, match="cannot be tuned"):
        tuned.check_node("gpu01", current="", active=True, lost=False, record="r")


def test_figures_of_a_benchmark_are_rates_by_load() -> None:
    result = {"levels": [{"streams": 8, "output_rate": 3}], "clients": {"output_rate": 5}}
    assert tuned.rates_of(result) == {"8": 3.0, "clients": 5.0}
    with pytest.raises(FleetError, match="no figures"):
        tuned.rates_of({"levels": []})


def test_options_of_a_release_are_those_of_its_parser(tmp_path: Path) -> None:
    package = tmp_path / "lib/python3.12/site-packages/vllm/engine"
    package.mkdir(parents=True)
    source = 'group.add_argument("--async-scheduling", **x)\nraise ValueError("use --not this")\n'
    (package / "arg_utils.py").write_text(source)
    assert parser_options(tmp_path) == ["--async-scheduling"]
    assert parser_options(tmp_path / "gone") == []
