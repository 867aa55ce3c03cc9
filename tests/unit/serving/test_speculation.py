# SPDX-License-Identifier: Apache-2.0
"""Speculation is off, and refused with a release that answers wrongly with it."""

from __future__ import annotations

from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.serving.speculation import speculative_config

from tests.defaults import defaults

WANTED = {"method": "mtp", "num_speculative_tokens": 1}


def manifest(head: str, *mends: str) -> dict[str, Any]:
    return {
        "provenance": {
            "inputs": {"source": {"pull_requests": [{"number": 38476, "head": head}]}},
            "corrections": [{"name": "a.patch", "mends": list(mends)}],
        }
    }


def pinned() -> str:
    return str(defaults("release")["release_pull_requests"][0]["head"])


def test_it_is_off_by_default() -> None:
    assert defaults("serving")["serving_speculative"] == {}
    assert speculative_config({}, manifest(pinned())) == ""


def test_the_pinned_head_is_refused_with_the_reason_until_all_of_it_is_mended() -> None:
    with pytest.raises(FleetError, match="wrong with this release") as caught:
        speculative_config(WANTED, manifest(pinned()))
    assert "lengths-of-two-dimensions: a request selects" in caught.value.found
    with pytest.raises(FleetError) as caught:
        speculative_config(WANTED, manifest(pinned(), "lengths-of-two-dimensions"))
    assert "lengths-of-two-dimensions" not in caught.value.found
    assert "float8 e4m3" in caught.value.found
    assert "serving_speculative: {}" in caught.value.remedy
    mended = manifest(pinned(), "lengths-of-two-dimensions", "packing-of-float8-queries")
    assert speculative_config(WANTED, mended) == '{"method":"mtp","num_speculative_tokens":1}'


def test_another_head_or_none_is_not_judged() -> None:
    assert speculative_config(WANTED, manifest("1" * 40))
    assert speculative_config(WANTED, {})


@pytest.mark.parametrize(
    "wanted",
    [{"method": "mtp"}, {"num_speculative_tokens": 1}, {**WANTED, "num_speculative_tokens": True}],
)
def test_what_is_no_setting_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(FleetError, match="serving_speculative cannot be used"):
        speculative_config(wanted, {})
