# SPDX-License-Identifier: Apache-2.0
"""vLLM's metrics as numbers."""

from __future__ import annotations

import math

from ..core.http import Http


def parse_metrics(text: str) -> dict[str, float]:
    """Sum the samples of each metric over its labels.

    Buckets are left out, and what is no finite number: nobody can count with it.
    """
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or "_bucket" in line:
            continue
        name, _, rest = line.partition("{")
        value = rest.rpartition("}")[2] if rest else line.partition(" ")[2]
        name = name.partition(" ")[0]
        try:
            total = totals.get(name, 0.0) + float(value.split()[0])
        except (ValueError, IndexError):
            continue
        if math.isfinite(total):
            totals[name] = total
    return totals


def read_metrics(http: Http) -> dict[str, float]:
    """Return the server's metrics, {} when it does not answer."""
    status, lines = http("/metrics")
    return parse_metrics("\n".join(lines)) if status == 200 else {}
