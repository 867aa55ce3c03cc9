# SPDX-License-Identifier: Apache-2.0
"""The line of sudoers that docs/enroll.md gives, with the real sudo and Ansible's own commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ansible.plugins.loader import become_loader, get_shell_plugin
from glm_fleet.fleet.enroll import MARK, look_script
from glm_fleet.fleet.known_hosts import SshTarget

from tests.container import Machine, booted, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

DOCS = Path(__file__).resolve().parents[2] / "docs/enroll.md"
TARGET = SshTarget("gpu01", "192.0.2.11", 22, "ops", "192.0.2.11", ())
PASSWORD = "of ops"  # noqa: S105 - in a container


def rule() -> str:
    (line,) = re.findall(r"^ +(ops ALL=\(root\) NOPASSWD: .*)$", DOCS.read_text(), re.MULTILINE)
    return str(line)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with booted(tmp_path_factory.mktemp("machine")) as machine:
        machine.shell(f"echo 'ops:{PASSWORD}' | chpasswd")
        yield machine


@pytest.fixture
def sudoers(host: Machine) -> Path:
    return host.root / "etc/sudoers.d/ops"


def as_ansible(command: str) -> str:
    """Return what Ansible has a host's shell run to become root."""
    become = become_loader.get("sudo")
    become.set_options(direct={"become_user": "root", "become_flags": "-H -S -n"})
    built: str = become.build_become_command(command, get_shell_plugin(executable="/bin/sh"))
    return built


def run(host: Machine, command: str, words: str = "") -> str:
    return host.shell(
        f"printf %s {shlex.quote(words)} | ( {command} ) 2>&1", user="ops", check=False
    )


def test_the_line_lets_ansible_work_and_nothing_that_slips(host: Machine, sudoers: Path) -> None:
    sudoers.write_text(rule() + "\n")
    assert "parsed OK" in host.shell("visudo -c -f /etc/sudoers.d/ops")
    for command in (
        "/usr/bin/python3",
        "PYTHONPATH=/opt/glm-fleet/lib /usr/bin/python3 -B -m this",
        "{ id -u; } 2>/dev/null || true",
    ):
        said = run(host, as_ansible(command), "import os; print(os.geteuid())")
        assert "BECOME-SUCCESS-" in said, said
        assert "password is required" not in said
    assert run(host, as_ansible("/usr/bin/python3"), "import os; print(os.geteuid())")[-1] == "0"
    for slip in ("reboot", "rm -r /", "-s", "/bin/sh", "/bin/sh -c id", "-u nobody id"):
        assert "a password is required" in run(host, f"sudo -n {slip}"), slip
    looked = run(host, f"/bin/sh -c {shlex.quote(look_script(TARGET))}")
    assert f"{MARK} sudo 0 " in looked, looked


def test_a_password_is_enough(host: Machine, sudoers: Path) -> None:
    sudoers.write_text("ops ALL=(root) ALL\n")
    looked = run(host, f"/bin/sh -c {shlex.quote(look_script(TARGET))}")
    assert "a password is required" in looked
    target = replace(TARGET, become_password=PASSWORD)
    looked = run(host, f"/bin/sh -c {shlex.quote(look_script(target))}", f"{PASSWORD}\n")
    assert f"{MARK} sudo 0 " in looked, looked
