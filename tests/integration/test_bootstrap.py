# SPDX-License-Identifier: Apache-2.0
"""bootstrap refuses in one sentence, and changes nothing when it does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = "ID=debian\nVERSION_ID=12\n"


class Machine:
    """A copy of the checkout's parts, and programs that answer as another machine would."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        self.programs = folder / "bin"
        self.calls = folder / "calls"
        (self.checkout / "lab").mkdir(parents=True)
        self.programs.mkdir()
        for name in ("bootstrap", "requirements.txt", "requirements-dev.txt", "lab/packages.txt"):
            shutil.copy(ROOT / name, self.checkout / name)
        self.os_release = folder / "os-release"
        self.os_release.write_text(DEBIAN)
        self.answer("uname", "echo x86_64")
        self.answer("id", "echo 0")
        self.free(500)
        self.answer("dpkg-query", 'for p in "$@"; do echo "installed $p"; done')
        self.answer(
            "apt-get",
            f'echo "apt-get $*" >>{self.calls}\n'
            'case "$*" in *download*) : >prometheus_1_amd64.deb ;; esac',
        )
        self.answer(
            "dpkg-deb",
            'cd "$(dirname "$2")" && mkdir -p usr/bin && printf "#!/bin/sh\\n" >usr/bin/promtool\n'
            "chmod +x usr/bin/promtool && tar -c ./usr/bin/promtool",
        )
        # Stands for every python3: makes an environment whose pip notes what it is asked for.
        self.answer(
            "python3",
            'case "$*" in\n'
            "*ensurepip*) exit 0 ;;\n"
            f'"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; '
            f"echo venv >>{self.calls} ;;\n"
            f'*install*) echo "pip $*" >>{self.calls} ;;\n'
            "esac",
        )
        text = (self.checkout / "bootstrap").read_text()
        (self.checkout / "bootstrap").write_text(text.replace("/usr/bin/python3 ", ""))

    def answer(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def free(self, gigabytes: int) -> None:
        self.answer("df", f'printf "head\\nfs 0 0 {gigabytes * 10**9 // 1024 + 1} 0 /\\n"')

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.checkout / "bootstrap"), *arguments],
            env={
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "OS_RELEASE": str(self.os_release),
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def noted(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refused(machine: Machine, mode: str) -> str:
    """Run it, expect a refusal with nothing changed, and return the sentence."""
    before = sorted(machine.checkout.rglob("*"))
    done = machine.run(mode)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith("Nothing was changed.\n")
    assert len(done.stderr.splitlines()) == 1
    assert machine.noted() == []
    assert sorted(machine.checkout.rglob("*")) == before
    return done.stderr


def test_not_root(machine: Machine) -> None:
    machine.answer("id", "echo 1000")
    assert "run this as root" in refused(machine, "lab")
    assert "run this as root" in refused(machine, "test")


def test_a_controller_needs_root_only_to_install(machine: Machine) -> None:
    machine.answer("id", "echo 1000")
    packages = (machine.programs / "dpkg-query").read_text()
    machine.answer("dpkg-query", "true")
    assert "only root can install" in refused(machine, "controller")
    (machine.programs / "dpkg-query").write_text(packages)
    assert machine.run("controller").returncode == 0


@pytest.mark.parametrize(
    "release", ["ID=debian\nVERSION_ID=11\n", "ID=ubuntu\nVERSION_ID=22.04\n", "ID=fedora\n", ""]
)
def test_unsupported_system(machine: Machine, release: str) -> None:
    machine.os_release.write_text(release)
    assert "this needs Debian 12" in refused(machine, "test")


def test_ubuntu_is_supported(machine: Machine) -> None:
    machine.os_release.write_text("ID=ubuntu\nVERSION_ID=24.04\n")
    assert machine.run("lab").returncode == 0


def test_architecture(machine: Machine) -> None:
    machine.answer("uname", "echo aarch64")
    assert "x86_64" in refused(machine, "controller")


def test_no_space(machine: Machine) -> None:
    machine.free(3)
    assert "3 GB are free" in refused(machine, "lab")


def test_it_installs_what_is_missing_and_only_once(machine: Machine) -> None:
    machine.answer("dpkg-query", "echo installed git; echo installed python3")
    done = machine.run("test")
    assert done.returncode == 0, done.stderr
    update, install, *rest = machine.noted()
    assert update.endswith("update")
    assert "python3-venv" in install
    assert "haproxy" in install
    assert "mmdebstrap" in install
    assert " git" not in install
    assert "chromium-headless-shell" in install
    assert rest[0] == "venv"
    assert "requirements-dev.txt" in rest[1]
    assert rest[3].endswith("download prometheus")
    assert (machine.checkout / ".venv/bin/promtool").is_file()
    machine.answer("dpkg-query", 'for p in "$@"; do echo "installed $p"; done')
    machine.calls.unlink()
    assert machine.run("test").returncode == 0
    assert machine.noted() == []
    requirements = machine.checkout / "requirements-dev.txt"
    requirements.write_text(requirements.read_text() + "another==1\n")
    assert machine.run("test").returncode == 0
    assert len(machine.noted()) == 1


def test_an_unknown_word_prints_the_usage(machine: Machine) -> None:
    done = machine.run("everything")
    assert done.returncode == 2
    assert "Usage: ./bootstrap controller|lab|test" in done.stderr
