# SPDX-License-Identifier: Apache-2.0
"""The units of schedule and watch, rendered by Ansible from the defaults, as systemd reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("glm-fleet-health.service", "glm-fleet-health.timer", "glm-watch.service")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    role = ROOT / "roles/health"
    play = [
        {
            "hosts": "gpu01",
            "connection": "local",
            "gather_facts": False,
            "vars": {"role_path": str(role), "health_schedule_user": "root"},
            "vars_files": [
                str(role / "../common/defaults/main.yml"),
                str(role / "defaults/main.yml"),
                str(role / "vars/main.yml"),
            ],
            "tasks": [
                {
                    "ansible.builtin.template": {
                        "src": f"{role}/templates/{{{{ item }}}}.j2",
                        "dest": f"{folder}/{{{{ item }}}}",
                        "mode": "0644",
                    },
                    "loop": list(UNITS),
                }
            ],
        }
    ]
    (folder / "play.yml").write_text(json.dumps(play))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            "-i",
            str(ROOT / "inventory/example"),
            "-e",
            f"ansible_python_interpreter={sys.executable}",
            str(folder / "play.yml"),
        ],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "HF_TOKEN": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


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
