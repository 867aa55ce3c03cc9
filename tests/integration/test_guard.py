# SPDX-License-Identifier: Apache-2.0
"""What root runs before the engine takes nothing from what the engine's user can write.

The units are rendered from the defaults, read as systemd reads them, and their commands are run
in a folder and a home in which that user has planted modules.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.rendering import render

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "module_utils"
PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    files = ["glm-serving.service", "glm-serving.conf", "glm-prestart@.service"]
    return render(folder, "serving", files, roles=["common", "artifact"])


def settings(*texts: str) -> dict[str, list[str]]:
    """Read units as systemd does: a setting adds to those before, an empty one takes them away."""
    found: dict[str, list[str]] = {}
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        if line.startswith(("#", "[", ";")) or "=" not in line:
            continue
        name, _, value = line.partition("=")
        found.setdefault(name, []).append(value)
        if not value:
            found[name] = []
    return found


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder and a home of the service's user, with modules that tell when they are run."""
    code = f"open({str(tmp_path / 'taken')!r}, 'a').write(__file__ + chr(10))\n"
    (tmp_path / "argparse.py").write_text(code + "raise SystemExit(3)\n")
    version = subprocess.run(
        [PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    site = tmp_path / f".local/lib/python{version}/site-packages"
    site.mkdir(parents=True)
    (site / "usercustomize.py").write_text(code)
    return tmp_path


def run(
    command: str, folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command of a unit up to its list of options, which needs no rights and no GPU."""
    words = shlex.split(command.lstrip("+").replace("/opt/glm-fleet/lib", str(LIBRARY)))
    return subprocess.run(
        [*words, "--help"],
        cwd=folder,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_deployment_as_it_was_stored_runs_what_the_service_planted(
    rendered: Path, planted: Path
) -> None:
    """The danger that the other tests are about: without it they would prove nothing."""
    unit = settings((rendered / "glm-serving.service").read_text())
    (command,) = unit["ExecStartPre"]
    run(command, planted, {"HOME": str(planted)})
    taken = (planted / "taken").read_text()
    assert "usercustomize.py" in taken
    assert "argparse.py" in taken


def test_the_guard_replaces_the_check_of_every_deployment(rendered: Path) -> None:
    unit = settings(
        (rendered / "glm-serving.service").read_text(),
        (rendered / "glm-serving.conf").read_text(),
    )
    assert unit["ExecStartPre"] == [
        "+/usr/bin/systemctl start glm-prestart@${INVOCATION_ID}.service"
    ]
    # A stop of the engine also stops a check that still waits for memory.
    prestart = settings((rendered / "glm-prestart@.service").read_text())
    assert prestart["PartOf"] == ["glm-serving.service"]


def test_the_engine_opens_no_port_of_its_own_to_others(rendered: Path) -> None:
    unit = settings(
        (rendered / "glm-serving.service").read_text(),
        (rendered / "glm-serving.conf").read_text(),
    )
    words = " ".join(unit["Environment"]).split()
    assert {"VLLM_HOST_IP=127.0.0.1", "NCCL_SOCKET_IFNAME=lo", "GLOO_SOCKET_IFNAME=lo"} <= {*words}
    # What an operator sets is in the file, which systemd reads after it.
    assert unit["EnvironmentFile"] == ["/etc/glm-fleet/serving.env"]


def test_the_check_takes_nothing_of_the_service(rendered: Path, planted: Path) -> None:
    unit = settings((rendered / "glm-prestart@.service").read_text())
    (command,) = unit["ExecStart"]
    assert unit["WorkingDirectory"] == ["/"]
    assert "EnvironmentFile" not in unit
    # Even in the worst folder and environment, which systemd does not give it.
    done = run(command, planted, {"HOME": str(planted), "PYTHONPATH": str(planted)})
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert not (planted / "taken").exists()


@pytest.mark.parametrize("name", ["gate", "helper", "notify", "sentry", "swarm", "watch"])
def test_every_entry_point_is_there_both_ways(name: str, planted: Path) -> None:
    for command in (f"-I -B {LIBRARY}/glm_fleet {name}", f"-B -m glm_fleet.{name}"):
        done = subprocess.run(
            [PYTHON, *command.split(), "--help"],
            cwd="/",
            env={"PYTHONPATH": str(LIBRARY), "HOME": "/nonexistent"},
            input="{}",
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert "usage:" in done.stdout or name == "swarm", done


def test_an_unknown_entry_point_is_refused() -> None:
    done = subprocess.run(
        [PYTHON, "-I", "-B", f"{LIBRARY}/glm_fleet", "artifact"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "expected one of gate, helper, notify" in done.stderr
