# SPDX-License-Identifier: Apache-2.0
"""How exposed our units are, as systemd itself scores what Ansible renders from the defaults."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from glm_fleet.transfer.control import unit_command

ROOT = Path(__file__).resolve().parents[2]
GOAL = 2.5
PLAYBOOK = """
- hosts: gpu01
  connection: local
  gather_facts: false
  vars:
    health_schedule_user: ops
    role_path: {root}/roles/health
  vars_files:
    - {root}/roles/common/defaults/main.yml
    - {root}/roles/artifact/defaults/main.yml
    - {root}/roles/serving/defaults/main.yml
    - {root}/roles/serving/vars/main.yml
    - {root}/roles/health/defaults/main.yml
    - {root}/roles/health/vars/main.yml
  tasks:
    - ansible.builtin.template:
        src: "{root}/roles/{{{{ item }}}}.j2"
        dest: "{dest}/{{{{ item | basename }}}}"
        mode: "0644"
      loop:
        - serving/templates/glm-serving.service
        - serving/templates/glm-serving.conf
        - serving/templates/glm-prestart@.service
        - serving/templates/glm-sentry.service
        - health/templates/glm-watch.service
        - health/templates/glm-fleet-health.service
      vars:
        __serving_made_release: {{id: vllm-0.23.0-pr38476-0123456789ab}}
"""


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of each unit, with its drop-in."""
    folder = tmp_path_factory.mktemp("rendered")
    (folder / "play.yml").write_text(PLAYBOOK.format(root=ROOT, dest=folder))
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        *("-i", str(ROOT / "inventory/example")),
        *("-e", f"ansible_python_interpreter={sys.executable}"),
        str(folder / "play.yml"),
    ]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "HF_TOKEN": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.name: path.read_text() for path in folder.glob("*.service")}
    found["glm-serving.service"] += (folder / "glm-serving.conf").read_text()
    words = unit_command(Path("/run/x/job.json"), Path("/srv/a"), "/usr/bin/python3", "/lib")
    settings = [word.partition("=")[2] for word in words if word.startswith("--property=")]
    settings.remove("Description=glm-fleet: take and give an artifact while it is distributed")
    found["glm-swarm.service"] = "\n".join(["[Service]", "ExecStart=/bin/true", *settings, ""])
    return found


def exposure(name: str, text: str, folder: Path) -> float:
    """Ask systemd; ``text`` is a unit with drop-ins after it."""
    path = folder / name.replace("@.", "@x.")
    # Alone it is scored for what it allows, not for programs that this machine lacks.
    bare = re.sub(r"(?m)^ExecStart(Pre|Post)?=(.*\\\n)*.*$", "", text)
    path.write_text(f"{bare}\n[Service]\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    return float(found[1])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd scores its units itself")
@pytest.mark.parametrize(
    "name",
    [
        "glm-serving.service",
        "glm-prestart@.service",
        "glm-sentry.service",
        "glm-watch.service",
        "glm-swarm.service",
        "glm-fleet-health.service",
    ],
)
def test_no_unit_is_more_exposed_than_it_needs(
    name: str, units: dict[str, str], tmp_path: Path
) -> None:
    found = exposure(name, units[name], tmp_path)
    sys.stderr.write(f"\n{name}: {found}\n")
    assert found <= GOAL


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd scores its units itself")
def test_the_score_sees_what_a_unit_lacks(units: dict[str, str], tmp_path: Path) -> None:
    open_wide = "[Service]\nExecStart=/bin/true\n"
    assert exposure("open.service", open_wide, tmp_path) > 9


@pytest.mark.parametrize(
    "name", ["glm-prestart@.service", "glm-sentry.service", "glm-watch.service"]
)
def test_what_runs_as_root_takes_nothing_from_others(name: str, units: dict[str, str]) -> None:
    (command,) = re.findall(r"(?m)^ExecStart=(.*)$", units[name])
    assert command.startswith("/usr/bin/python3 -I -B /opt/glm-fleet/lib/glm_fleet ")
    assert "EnvironmentFile" not in units[name]
    assert "PYTHONPATH" not in units[name]
