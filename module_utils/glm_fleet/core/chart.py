# SPDX-License-Identifier: Apache-2.0
"""What the charts of both pages share: their size, and round numbers for their axes."""

from __future__ import annotations

import math

WIDTH, HEIGHT = 320.0, 96.0


def round_up(value: float) -> float:
    """Return the next round number from 1 to 10 times a power of ten: the top of an axis."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    # Rounding may leave the largest step a hair below the value.
    steps = (step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10))
    return next((step for step in steps if step >= value), value)


def figure(value: float) -> str:
    """Write a number as short as an axis needs it."""
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
