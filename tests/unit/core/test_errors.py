# SPDX-License-Identifier: Apache-2.0
"""An error's advice is given once."""

from __future__ import annotations

import pytest
from glm_fleet.core.errors import FleetError, split_remedy


def test_an_error_is_divided_into_cause_and_advice() -> None:
    error = FleetError("It is off", expected="on", found="off", remedy="switch it on.")
    assert split_remedy(str(error), "look") == (
        "It is off. Expected: on. Found: off",
        "switch it on",
    )


@pytest.mark.parametrize("text", ["a plain word", "a plain\n word."])
def test_without_advice_there_is_the_other_one(text: str) -> None:
    assert split_remedy(text, "look") == ("a plain word", "look")
