# SPDX-License-Identifier: Apache-2.0
"""The CUDA build is chosen by the oldest driver of the fleet."""

from __future__ import annotations

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.release.variant import choose_variant

VARIANTS = [
    {"name": "cu129", "min_driver": "550", "base_wheel": "b"},
    {"name": "cu130", "min_driver": "580", "base_wheel": "a"},
]


@pytest.mark.parametrize(
    ("drivers", "stated", "name", "why"),
    [
        ({"a": "580.159.04", "b": "590.1"}, "", "cu130", "580.159.04"),
        ({"a": "580.159.04", "b": "570.86.10"}, "", "cu129", "570.86.10"),
        ({"a": "550"}, "580", "cu129", "550"),
        ({"a": ""}, "575.51", "cu129", "575.51"),
        ({}, "", "cu130", "preflight did not run"),
    ],
)
def test_the_oldest_driver_decides(
    drivers: dict[str, str], stated: str, name: str, why: str
) -> None:
    chosen = choose_variant(VARIANTS, drivers, stated)
    assert chosen["variant"]["name"] == name
    assert why in chosen["reason"]


def test_too_old_a_driver_is_refused_with_its_host() -> None:
    with pytest.raises(FleetError, match="too old") as caught:
        choose_variant(VARIANTS, {"gpu01": "580.1", "gpu02": "535.183"})
    assert caught.value.found == "gpu02 has 535.183"
    assert "550" in caught.value.expected


def test_without_variants_a_wheel_is_needed() -> None:
    with pytest.raises(FleetError, match="no CUDA build"):
        choose_variant([], {})
