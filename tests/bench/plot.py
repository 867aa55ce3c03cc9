# SPDX-License-Identifier: Apache-2.0
"""A plot of a few lines as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 400, 60, 50, 30, 50


@dataclass(frozen=True)
class Line:
    """A line: what it is, its colour, and its points."""

    name: str
    color: str
    points: Mapping[int, float]


def svg(title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> str:
    """Draw lines from the origin of both axes; every point carries its value."""
    x_most = max(x for line in lines for x in line.points)
    y_most = max(y for line in lines for y in line.points.values()) * 1.1

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / x_most * (_WIDTH - _LEFT - _RIGHT)
        down = _HEIGHT - _BOTTOM - y / y_most * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    left, bottom = place(0, 0)
    right, top = place(x_most, y_most)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_WIDTH / 2}" y="24" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(left + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">'
        f"{escape(x_name)}</text>",
        f'<text transform="translate(18 {(top + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_name)}</text>',
    ]
    for x in sorted({x for line in lines for x in line.points}):
        across, _ = place(x, 0)
        parts.append(f'<text x="{across}" y="{bottom + 18}" text-anchor="middle">{x}</text>')
    for number, line in enumerate(lines):
        spots = [(place(x, y), y) for x, y in sorted(line.points.items())]
        path = " ".join(f"{across},{down}" for (across, down), _ in spots)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="2"/>'
        )
        for (across, down), value in spots:
            parts.append(f'<circle cx="{across}" cy="{down}" r="3.5" fill="{line.color}"/>')
            parts.append(
                f'<text x="{across}" y="{down - 8}" text-anchor="end" fill="{line.color}">'
                f"{value:.2f}</text>"
            )
        parts.append(
            f'<text x="{left + 16}" y="{top + 18 + 18 * number}" fill="{line.color}">'
            f"{escape(line.name)}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])
