# SPDX-License-Identifier: Apache-2.0
"""Enrolment against real SSH servers: who is trusted, who gets the key, who is refused."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.hosts import KEY, KNOWN_HOSTS
from lab.settings import ALL_HOSTS

from .conftest import INVENTORY, ROOT, Fleet, Run, lab, say

pytestmark = pytest.mark.fleet

PASSWORD = "correct {{ horse }} ' battery"  # noqa: S105 - of a user in the lab
PLAYBOOK = [str(ROOT / ".venv/bin/ansible-playbook"), "-i", str(INVENTORY), "playbooks/enroll.yml"]


def enroll(*arguments: str, password: str = "") -> Run:
    """Run the playbook on a terminal of its own, as an operator does, and answer its prompt."""
    begun = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "COLUMNS": "200"}
        os.execve(PLAYBOOK[0], [*PLAYBOOK, *arguments], environment)  # noqa: S606 - no shell
    output, asked = "", False
    while True:
        assert time.monotonic() - begun < 120, output
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            output += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # how Linux says that the other side is gone
            break
        if not asked and "Return if they know your key" in output:
            asked = True
            os.write(terminal, f"{password}\n".encode())
    os.close(terminal)
    rc = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    say(f"enroll.yml {' '.join(arguments)}: rc {rc} after {time.monotonic() - begun:.0f} s")
    assert asked, output
    assert PASSWORD not in output
    return Run(rc, output.replace("\r\n", "\n"))


def row(run: Run, host: str) -> str:
    """Return a host's row of the table."""
    return next(line for line in run.output.splitlines() if re.match(rf"{host} +ops@", line))


def reason(run: Run, host: str) -> str:
    """Return the sentence that says why a host cannot be used, on one line."""
    text = re.sub(r"\n    ", " ", run.output)
    return next((line for line in text.splitlines() if line.startswith(f"{host} cannot")), "")


@pytest.fixture(autouse=True)
def known_hosts() -> Iterator[None]:
    """Give the lab its known hosts back."""
    kept = KNOWN_HOSTS.read_text()
    yield
    KNOWN_HOSTS.write_text(kept)


@pytest.fixture
def gpu03(fleet: Fleet) -> Iterator[str]:
    """A host that takes the password of its user, and no key."""
    script = f"""
        echo 'PasswordAuthentication yes' > /etc/ssh/sshd_config.d/00-password.conf
        chpasswd <<'END'
ops:{PASSWORD}
END
        systemctl reload ssh
        mv ~ops/.ssh/authorized_keys ~ops/.ssh/kept
    """
    assert fleet.shell("gpu03", script).rc == 0
    home = ALL_HOSTS["gpu03"].root / "home/ops/.ssh"
    yield "gpu03"
    (home / "kept").rename(home / "authorized_keys")
    undo = "rm /etc/ssh/sshd_config.d/00-password.conf && passwd -l ops && systemctl reload ssh"
    assert fleet.shell("gpu03", undo).rc == 0


def fingerprint(fleet: Fleet, host: str) -> str:
    """Return the fingerprint as the host itself knows it."""
    shown = fleet.shell(host, "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").output
    return shown.split()[1]


def forget(address: str) -> None:
    command = ["ssh-keygen", "-R", address, "-f", str(KNOWN_HOSTS)]
    subprocess.run(command, check=True, capture_output=True)


def test_hosts_that_are_known_are_not_changed(fleet: Fleet) -> None:
    run = enroll()
    assert run.rc == 0, run.output
    assert run.changed == {}
    for host in [*fleet.nodes, fleet.gateway]:
        assert fingerprint(fleet, host) in row(run, host)
        assert " known " in row(run, host)


def test_a_new_host_is_pinned_once_somebody_confirmed_it(fleet: Fleet, tmp_path: Path) -> None:
    truth = fingerprint(fleet, "gpu01")
    forget(fleet.addresses["gpu01"])
    before = KNOWN_HOSTS.read_text()
    check = enroll("--check")
    assert check.rc == 0, check.output
    assert truth in row(check, "gpu01")
    assert " unconfirmed " in row(check, "gpu01")
    assert KNOWN_HOSTS.read_text() == before
    begun = time.time()
    refused = enroll(password=PASSWORD)
    assert refused.rc != 0
    assert f"nobody confirmed its host key ({truth})" in reason(refused, "gpu01")
    assert KNOWN_HOSTS.read_text() == before
    confirmed = tmp_path / "fingerprints.txt"
    confirmed.write_text(f"gpu01 {truth}\n")
    run = enroll("-e", f"enrolment_fingerprints={confirmed}")
    assert run.rc == 0, run.output
    assert " pinned " in row(run, "gpu01")
    assert len(run.changed) == 1
    added = KNOWN_HOSTS.read_text().removeprefix(before)
    assert len(added.splitlines()) == 1
    # ssh itself takes the key that was pinned.
    log = fleet.shell("gpu01", f"journalctl -t sshd --output=cat --since=@{int(begun)}")
    assert " port " in log.output
    assert "password" not in log.output, "a password was sent to a host that nobody confirmed"
    again = enroll()
    assert (again.rc, again.changed) == (0, {})
    assert KNOWN_HOSTS.read_text() == before + added


def test_a_changed_key_is_refused_with_both_fingerprints(fleet: Fleet) -> None:
    known, found = fingerprint(fleet, "gpu01"), fingerprint(fleet, "gpu02")
    original = KNOWN_HOSTS.read_text()
    # The host is known by another's key.
    forget(fleet.addresses["gpu02"])
    shown = fleet.shell("gpu01", "cat /etc/ssh/ssh_host_ed25519_key.pub").output
    with KNOWN_HOSTS.open("a") as stream:
        stream.write(f"{fleet.addresses['gpu02']} {shown}")
    before = KNOWN_HOSTS.read_text()
    begun = time.time()
    run = enroll(password=PASSWORD)
    assert run.rc != 0
    assert f"known {known}, found {found}" in reason(run, "gpu02")
    assert "ssh-keygen -R" in reason(run, "gpu02")
    assert not reason(run, "gpu01")
    assert KNOWN_HOSTS.read_text() == before
    KNOWN_HOSTS.write_text(original)
    # Of sshd alone: modules that ran over SSH log the names of their options there too.
    log = fleet.shell("gpu02", f"journalctl -t sshd --output=cat --since=@{int(begun)}")
    assert log.rc == 0
    assert " port " in log.output, "sshd says nothing of the connection that was refused"
    assert "password" not in log.output, "the password was sent to a host that is not trusted"
    assert "Enrolment: 1 of 4 hosts cannot be used: gpu02" in run.output


def test_a_fingerprint_of_the_inventory_is_insisted_on(fleet: Fleet) -> None:
    forget(fleet.addresses["gpu01"])
    before = KNOWN_HOSTS.read_text()
    run = enroll("-e", "enrolment_fingerprint=SHA256:other")
    assert run.rc != 0
    assert "expected SHA256:other, found SHA256:" in reason(run, "gpu01")
    assert KNOWN_HOSTS.read_text() == before


def test_the_key_is_installed_with_the_password_once(fleet: Fleet, gpu03: str) -> None:
    home = ALL_HOSTS[gpu03].root / "home/ops/.ssh"
    nobody = enroll()
    assert nobody.rc != 0
    assert "takes none of your keys for the user ops" in reason(nobody, gpu03)
    wrong = enroll(password="wrong")
    assert wrong.rc != 0
    assert "the password of ops is wrong there" in reason(wrong, gpu03)
    check = enroll("--check", password=PASSWORD)
    assert check.rc == 0, check.output
    assert "key to be installed" in row(check, gpu03)
    assert not (home / "authorized_keys").exists()
    run = enroll(password=PASSWORD)
    assert run.rc == 0, run.output
    assert "key installed" in row(run, gpu03)
    line = (home / "authorized_keys").read_text()
    assert line.split()[:2] == Path(f"{KEY}.pub").read_text().split()[:2]
    assert (home / "authorized_keys").stat().st_mode & 0o777 == 0o600
    again = enroll(password=PASSWORD)
    assert (again.rc, again.changed) == (0, {})
    assert (home / "authorized_keys").read_text() == line


def test_a_host_without_sudo_or_python_is_named(fleet: Fleet) -> None:
    fleet.shell("gpu01", "chmod a-x /usr/bin/python3.11")
    fleet.shell("gpu02", "echo 'ops ALL=(ALL) ALL' > /etc/sudoers.d/zz-ops")
    try:
        run = enroll()
    finally:
        fleet.shell("gpu01", "chmod a+x /usr/bin/python3.11")
        (ALL_HOSTS["gpu02"].root / "etc/sudoers.d/zz-ops").unlink()
    assert run.rc != 0
    assert "/usr/bin/python3 is no Python" in reason(run, "gpu01")
    assert "sudo there asks ops for a password" in reason(run, "gpu02")
    assert "password is required" in reason(run, "gpu02")
    assert not reason(run, "gpu03")


def test_dead_hosts_are_waited_for_at_the_same_time(fleet: Fleet) -> None:
    dead = ["gpu01", "gpu02", fleet.gateway]
    for host in dead:
        lab("power", host, "cut")
    begun = time.monotonic()
    try:
        run = enroll("-e", "enrolment_timeout=10")
    finally:
        for host in dead:
            lab("power", host, "join")
    assert time.monotonic() - begun < 25, "three hosts in a row take 30 s"
    assert run.rc != 0
    for host in dead:
        assert re.search("does not answer within 10 s|cannot be reached", reason(run, host))
    assert not reason(run, "gpu03")
    assert "3 of 4 hosts cannot be used" in run.output
