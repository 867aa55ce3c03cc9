# SPDX-License-Identifier: Apache-2.0
"""One point that was checked: of an engine that runs, or of a source that was put together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A point by its name, its outcome, and the value that decided."""

    name: str
    passed: bool
    detail: str

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "passed": self.passed, "detail": self.detail}
