# SPDX-License-Identifier: Apache-2.0
"""Which CUDA graphs a node starts with, and what a person is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.serving.command import serve_command
from glm_fleet.serving.graphs import (
    AUTO,
    LOGITS_PAST_THE_ROW,
    MODES,
    open_faults,
    price_of,
    remark,
    resolve,
    rungs,
)

from tests.defaults import defaults

ROOT = Path(__file__).resolve().parents[3]
PULL = {"number": 38476, "head": "3740c02bb1223d37823593664ae3eafa397b9937"}


def command(graphs: str) -> list[str]:
    """The command line of a node with the role's defaults and a mode of CUDA graphs."""
    settings = {name.removeprefix("serving_"): value for name, value in defaults("serving").items()}
    return serve_command(
        {**settings, "model_path": "/m", "shutdown_timeout": 600, "cuda_graphs": graphs}
    )


def manifest(**source: Any) -> dict[str, Any]:
    """A release's manifest, as far as its faults go."""
    return {"kind": "release", "provenance": {"inputs": {"source": source}}}


CORRECTED = manifest(pull_requests=[PULL], corrections={"c.patch": "0" * 64}, accepted_faults=[])
ACCEPTED = manifest(pull_requests=[PULL], accepted_faults=[LOGITS_PAST_THE_ROW, "another"])
# What the version before glm-fleet knew of faults wrote.
OLD = manifest(pull_requests=[PULL])


@pytest.mark.parametrize(
    ("release", "mode"),
    [
        (CORRECTED, "full_and_piecewise"),
        (ACCEPTED, "piecewise"),
        (OLD, "piecewise"),
        (manifest(pull_requests=[]), "full_and_piecewise"),
        ({}, "full_and_piecewise"),
    ],
)
def test_the_default_is_the_best_that_the_release_can_be_trusted_with(
    release: dict[str, Any], mode: str
) -> None:
    assert resolve(AUTO, open_faults(release)) == mode


def test_an_old_release_keeps_the_command_line_that_it_was_started_with() -> None:
    graphs = resolve(AUTO, open_faults(OLD))
    assert command(graphs)[-1] == '{"cudagraph_mode":"PIECEWISE"}'


@pytest.mark.parametrize("mode", MODES)
def test_what_an_operator_chose_is_taken_on_any_release(mode: str) -> None:
    assert resolve(mode, [LOGITS_PAST_THE_ROW]) == mode


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(FleetError, match="auto, full_and_piecewise, full_decode_only, piecewise"):
        resolve("full", [])
    with pytest.raises(FleetError, match="serving_cuda_graphs"):
        command("full")


@pytest.mark.parametrize(
    ("mode", "ladder"),
    [
        ("full_and_piecewise", ["full_and_piecewise", "piecewise", "eager"]),
        ("full_decode_only", ["full_decode_only", "piecewise", "eager"]),
        ("piecewise", ["piecewise", "eager"]),
        ("eager", ["eager"]),
    ],
)
def test_a_node_may_step_down_only_when_that_is_allowed(mode: str, ladder: list[str]) -> None:
    assert rungs(mode, fallback=True) == ladder
    assert rungs(mode) == [mode]
    # Every step is a command line of its own.
    assert len({tuple(command(each)) for each in ladder}) == len(ladder)


def test_no_step_leads_to_full_graphs() -> None:
    for mode in MODES:
        for lower in rungs(mode, fallback=True)[1:]:
            assert not MODES[lower].vllm.startswith("FULL")


def test_a_person_is_told_what_a_faulty_release_costs_and_risks() -> None:
    faults = open_faults(ACCEPTED)
    told = remark(AUTO, "piecewise", faults)
    assert "logits-past-the-row" in told
    assert "a fifth of the speed" in told
    assert "crash" in remark("full_decode_only", "full_decode_only", faults)
    assert remark("piecewise", "piecewise", faults) == ""
    assert remark(AUTO, "full_and_piecewise", open_faults(CORRECTED)) == ""


def test_every_mode_below_the_best_has_a_price() -> None:
    assert [mode for mode in MODES if not price_of(mode)] == ["full_and_piecewise"]
    assert price_of("from a later version") == ""
