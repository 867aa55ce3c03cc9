# SPDX-License-Identifier: Apache-2.0
"""How exposed our units are, as systemd itself scores what Ansible renders from the defaults."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from glm_fleet.transfer.control import unit_command

from tests.rendering import render

ROOT = Path(__file__).resolve().parents[2]
GOAL = 2.5


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of each unit, with its drop-in."""
    folder = tmp_path_factory.mktemp("rendered")
    served = [
        "glm-serving.service",
        "glm-serving.conf",
        "glm-prestart@.service",
        "glm-sentry.service",
    ]
    render(folder, "serving", served, roles=["common", "artifact"])
    helper = ["glm-helper.socket", "glm-helper@.service"]
    render(folder, "common", helper)
    watched = ["glm-watch.service", "glm-fleet-health.service"]
    user = {"health_schedule_user": "ops"}
    render(folder, "health", watched, roles=["common", "artifact", "serving"], variables=user)
    found = {path.name: path.read_text() for path in folder.glob("*.service")}
    found["glm-serving.service"] += (folder / "glm-serving.conf").read_text()
    words = unit_command(
        Path("/run/x/job.json"), Path("/srv/a"), "/usr/bin/python3", "/lib", ["::1"]
    )
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
        "glm-helper@.service",
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
    ("name", "user"), [("glm-sentry.service", "glm-sentry"), ("glm-watch.service", "glm-watch")]
)
def test_a_daemon_is_a_user_of_its_own_without_rights(
    name: str, user: str, units: dict[str, str]
) -> None:
    lines = units[name].splitlines()
    assert f"User={user}" in lines
    assert "CapabilityBoundingSet=" in lines
    assert not any(line.startswith(("ReadWritePaths", "AmbientCapabilities=C")) for line in lines)


def test_the_helper_is_for_the_daemons_alone(units: dict[str, str], tmp_path: Path) -> None:
    render(tmp_path, "common", ["glm-helper.socket"])
    lines = (tmp_path / "glm-helper.socket").read_text().splitlines()
    for line in ("SocketUser=root", "SocketGroup=glm-helper", "SocketMode=0660", "Accept=yes"):
        assert line in lines
    for daemon in ("glm-sentry.service", "glm-watch.service"):
        assert "SupplementaryGroups=glm-helper" in units[daemon]


@pytest.mark.parametrize(
    "name",
    ["glm-prestart@.service", "glm-helper@.service", "glm-sentry.service", "glm-watch.service"],
)
def test_what_runs_as_root_takes_nothing_from_others(name: str, units: dict[str, str]) -> None:
    (command,) = re.findall(r"(?m)^ExecStart=(.*)$", units[name])
    assert command.startswith("/usr/bin/python3 -I -B /opt/glm-fleet/lib/glm_fleet ")
    assert "EnvironmentFile" not in units[name]
    assert "PYTHONPATH" not in units[name]
