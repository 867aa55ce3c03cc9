# SPDX-License-Identifier: Apache-2.0
"""Running programs: what their failure is made of."""

from __future__ import annotations

import errno
import os

import pytest
from glm_fleet.core.errors import FleetError, from_os_error
from glm_fleet.core.runner import run_program


@pytest.mark.parametrize(
    "said", ["fatal: write error: No space left on device", "error: unable to write file a/b.py"]
)
def test_a_full_disk_is_told_as_such(said: str) -> None:
    with pytest.raises(FleetError, match="The disk is full"):
        run_program(["sh", "-c", f"echo '{said}' >&2; exit 1"], check=False)


def test_a_program_that_ends_well_may_say_anything() -> None:
    assert run_program(["sh", "-c", "echo 'No space left on device' >&2"]).rc == 0


def test_errors_of_the_system() -> None:
    full = from_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"))
    assert full.message == "The disk is full"
    assert "/x" in full.found
    assert "permissions" in from_os_error(PermissionError(errno.EACCES, "no", "/x")).remedy
