# SPDX-License-Identifier: Apache-2.0
"""The units of schedule and watch, rendered by Ansible from the defaults, as systemd reads them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.rendering import render

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("glm-fleet-health.service", "glm-fleet-health.timer", "glm-watch.service")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    user = {"health_schedule_user": "root"}
    return render(folder, "health", UNITS, roles=["common"], variables=user)


def test_systemd_understands_them(rendered: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(rendered / unit) for unit in UNITS)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{rendered}:"},
    )
    complaints = [line for line in done.stderr.splitlines() if str(rendered) in line]
    assert complaints == []


def test_the_timer_runs_the_playbook_of_this_checkout(rendered: Path) -> None:
    text = " ".join((rendered / UNITS[0]).read_text().replace("\\\n", " ").split())
    assert f"--project-dir {ROOT} --playbook playbooks/health.yml --rotate-artifacts 50" in text
    assert f"-i {ROOT}/inventory/example -e health_fail_on=never" in text
    assert "Environment=ANSIBLE_HOST_KEY_CHECKING=True" in text
    assert "OnCalendar=*:0/5" in (rendered / UNITS[1]).read_text()


def test_the_watch_has_its_limits(rendered: Path) -> None:
    text = (rendered / UNITS[2]).read_text()
    assert "--stall-timeout 180 --restarts-per-hour 3" in text
