# SPDX-License-Identifier: Apache-2.0
"""The types of a host's answer describe what the module says that it returns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from glm_fleet.core.errors import FleetError
from glm_fleet.node.answer import Facts, decode_facts

LIBRARY = Path(__file__).resolve().parents[3] / "library"


def test_every_fact_that_is_documented_has_a_type() -> None:
    text = re.search(r'RETURN = r"""(.*?)"""', (LIBRARY / "node_info.py").read_text(), re.DOTALL)
    assert text
    documented: dict[str, Any] = yaml.safe_load(text[1])["node"]["contains"]

    assert set(documented) - set(Facts.__annotations__) == set()


def test_a_wrong_fact_is_named_with_its_host_and_place() -> None:
    with pytest.raises(FleetError) as error:
        decode_facts("gpu01", {"gpu": {"gpus": [{"index": "0"}]}})

    assert error.value.message == "The answer of gpu01 cannot be used"
    assert "gpu.gpus[0].index to be a whole number" in error.value.expected
