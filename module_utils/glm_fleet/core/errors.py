# SPDX-License-Identifier: Apache-2.0
"""The one error type: what was expected, what was found, what to do next."""

from __future__ import annotations

import errno
from typing import Any


class FleetError(Exception):
    """A failure that an operator can act on.

    ``message`` says what went wrong in one sentence; ``expected``, ``found`` and
    ``remedy`` are added to it when given. ``details`` goes into the module's result as
    it is.
    """

    def __init__(
        self,
        message: str,
        *,
        expected: str = "",
        found: str = "",
        remedy: str = "",
        details: dict[str, Any] | None = None,
    ) -> None:
        self.message = message
        self.expected = expected
        self.found = found
        self.remedy = remedy
        self.details = details or {}
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.message.rstrip(".") + "."]
        if self.expected:
            parts.append(f"Expected: {self.expected.rstrip('.')}.")
        if self.found:
            parts.append(f"Found: {self.found.rstrip('.')}.")
        if self.remedy:
            parts.append(f"{_REMEDY.strip()} {self.remedy.rstrip('.')}.")
        return " ".join(parts)

    def as_fail(self) -> dict[str, Any]:
        """Return the keyword arguments for ``AnsibleModule.fail_json``."""
        return {
            **self.details,
            "msg": str(self),
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
        }


_REMEDY = " What to do: "


def split_remedy(text: str, otherwise: str) -> tuple[str, str]:
    """Divide the words of an error into what went wrong and what to do, without the last stop.

    A report has a place for each: beside an error's own advice it must not give another.
    """
    cause, _, remedy = " ".join(text.split()).partition(_REMEDY)
    return cause.rstrip("."), remedy.rstrip(".") or otherwise


def disk_full(found: str) -> FleetError:
    """Say that there was no room."""
    return FleetError(
        "The disk is full",
        expected="room for what is being written",
        found=found,
        remedy="free some room or choose another folder, then run again: what is complete is kept",
    )


def from_os_error(error: OSError) -> FleetError:
    """Say what a failed read or write on this host means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(str(error))
    return FleetError(
        "A file cannot be read or written",
        found=str(error),
        remedy="check the folder and its permissions, then run again",
    )
