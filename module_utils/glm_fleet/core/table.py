# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal: columns as wide as their words, cut to the width there is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from .format import printable

_GAP = "  "
_NARROWEST = 6


@dataclass(frozen=True)
class Line:
    """One line of text; ``tone`` is "good", "warning", "bad" or empty.

    Whatever it was made of, it is shown on one line and commands nothing.
    """

    text: str
    tone: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", printable(self.text))


def render_table(
    heading: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    tones: Sequence[str] = (),
) -> list[Line]:
    """Return an aligned table no wider than ``width`` columns, long cells wrapped.

    ``tones`` are one per row. A table of many columns may still exceed a tiny width.
    """
    widths = _fit(heading, rows, width)
    lines = [*_render_row(heading, widths, ""), Line(_GAP.join("-" * size for size in widths))]
    for place, row in enumerate(rows):
        lines += _render_row(row, widths, tones[place] if place < len(tones) else "")
    return lines


def wrap(text: str, width: int, tone: str) -> list[Line]:
    return [
        Line(part, tone) for part in textwrap.wrap(text, max(width, 40), subsequent_indent="    ")
    ]


def _fit(heading: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Give each column its natural width, then take from the widest until the table fits."""
    widths = [max(len(row[place]) for row in (heading, *rows)) for place in range(len(heading))]
    room = width - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda place: widths[place])
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _render_row(row: Sequence[str], widths: Sequence[int], tone: str) -> list[Line]:
    cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths)]
    return [
        Line(
            _GAP.join(
                (cell[place] if place < len(cell) else "").ljust(width)
                for cell, width in zip(cells, widths)
            ).rstrip(),
            tone,
        )
        for place in range(max(len(cell) for cell in cells))
    ]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
