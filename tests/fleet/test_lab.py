# SPDX-License-Identifier: Apache-2.0
"""The lab leaves nothing on the machine. Runs last: it takes the fleet down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from .conftest import ROOT, Fleet, lab, lab_remains, wait_until

pytestmark = pytest.mark.fleet


def test_down_leaves_nothing_also_after_an_up_that_was_killed(fleet: Fleet) -> None:
    lab("down")
    assert lab_remains() == []
    process = subprocess.Popen(
        [sys.executable, "-m", "lab", "up", "--nodes", "3"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: any("nspawn" in each for each in lab_remains()), "no host started")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert lab_remains() != []
    lab("down")
    assert lab_remains() == []
