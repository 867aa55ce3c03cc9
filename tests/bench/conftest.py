# SPDX-License-Identifier: Apache-2.0
"""Where the figures go: reports/bench.json, one entry per name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "reports/bench.json"


class Record(Protocol):
    """Keep one figure."""

    def __call__(
        self,
        name: str,
        value: float,
        *,
        goal: float,
        unit: str,
        context: str,
        better: str = "lower",
    ) -> None: ...


@pytest.fixture
def record() -> Record:
    """Write a figure and print it; misses are for the reader. ``better`` is lower or higher."""

    def write(
        name: str,
        value: float,
        *,
        goal: float,
        unit: str,
        context: str,
        better: str = "lower",
    ) -> None:
        entries = json.loads(REPORT.read_text()) if REPORT.is_file() else []
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
        entry = {
            "name": name,
            "value": round(value, 3),
            "goal": goal,
            "better": better,
            "unit": unit,
            "context": f"{context}; {load}",
        }
        kept = [each for each in entries if each["name"] != name]
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(json.dumps([*kept, entry], indent=1) + "\n")
        print(f"\n{name}: {value:.3f} {unit} (goal {goal:g}; {entry['context']})")

    return write
