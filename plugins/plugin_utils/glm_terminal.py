# SPDX-License-Identifier: Apache-2.0
"""What the action plugins that print tables share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ansible.utils.color import ANSIBLE_COLOR
from ansible.utils.display import Display
from glm_fleet.core.table import Line

_COLORS = {"good": "green", "warning": "yellow", "bad": "red", "": None}


def width(untold: int = 120) -> int:
    """Return the columns to use: a worker has no terminal, but inherits what was measured."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit():
        return int(told)
    return int(Display().columns) if ANSIBLE_COLOR else untold


def show(lines: Iterable[Line]) -> None:
    """Print a table below an empty line."""
    Display().display("")
    print_lines(lines)


def print_lines(lines: Iterable[Line]) -> None:
    """Print each line in the color of its tone."""
    display = Display()
    for line in lines:
        display.display(line.text, color=_COLORS[line.tone])


def plain(value: Any) -> Any:
    """Copy Ansible's lazy containers, which resolve their values only when iterated."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, str) else value
