# SPDX-License-Identifier: Apache-2.0
"""The line of sudoers that docs/enroll.md gives, with the real sudo and Ansible's own commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ansible.plugins.loader import become_loader, get_shell_plugin
from glm_fleet.core.causes import SUDOERS
from glm_fleet.fleet.enroll import MARK, look_script
from glm_fleet.fleet.known_hosts import SshTarget

from tests.container import Machine, booted, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/enroll.md"
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
    assert rule() == SUDOERS.format(user="ops"), "what errors say is what the page says"
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


# From this machine to a port of the container, which has no network.
RELAY = """
import os, socket, threading
link = socket.create_connection(("127.0.0.1", 22))
def up():
    while data := os.read(0, 65536): link.sendall(data)
threading.Thread(target=up, daemon=True).start()
while data := link.recv(65536): os.write(1, data)
"""
# What runs do: a module, an answer of a host without one, and a module with files beside it.
PLAY = """
- hosts: all
  gather_facts: false
  become: true
  tasks:
    - ansible.builtin.command: id -u
      register: who
    - node_info: {paths: [/]}
      register: facts
    - node_library: {dest: /opt/glm-fleet/lib}
    - fleet_lock: {state: info}
    - ansible.builtin.assert:
        that: [who.stdout == "0", facts.record.node.disks | length > 0]
"""


@pytest.fixture(scope="module")
def inventory(host: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inventory")
    key = folder / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    line = key.with_suffix(".pub").read_text()
    host.shell(
        f"""ssh-keygen -A; mkdir -p -m 0700 ~ops/.ssh; echo '{line}' > ~ops/.ssh/authorized_keys
        chown -R ops: ~ops; systemctl reset-failed ssh; systemctl start ssh"""
    )
    known = host.shell("cat /etc/ssh/ssh_host_ed25519_key.pub")
    (folder / "known").write_text(f"container {known}\n")
    (folder / "relay.py").write_text(RELAY)
    (folder / "play.yml").write_text(PLAY)
    way = f"nsenter --target={host.init} --net {sys.executable} {folder}/relay.py"
    options = f'-o UserKnownHostsFile={folder}/known -o ControlPath=none -o ProxyCommand="{way}"'
    (folder / "hosts").write_text(
        f"container ansible_user=ops ansible_ssh_private_key_file={key} "
        f"ansible_python_interpreter=/usr/bin/python3 ansible_ssh_common_args='{options}'\n"
    )
    return folder


@pytest.mark.parametrize("how", ["the line", "a password", "no password"])
def test_runs_become_root(host: Machine, sudoers: Path, inventory: Path, how: str) -> None:
    sudoers.write_text((rule() if how == "the line" else "ops ALL=(root) ALL") + "\n")
    words = json.dumps({"ansible_become_password": PASSWORD} if how == "a password" else {})
    playbook = str(Path(sys.executable).with_name("ansible-playbook"))
    done = subprocess.run(
        [playbook, "-i", str(inventory / "hosts"), "-e", words, str(inventory / "play.yml")],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert PASSWORD not in said
    assert (done.returncode == 0) == (how != "no password"), said
    if how == "no password":
        assert "sudo there asks the user for a password, and none is given" in said


def test_enrolment_leads_through_two_jump_hosts_to_a_host_that_talks_and_asks(
    host: Machine, sudoers: Path, inventory: Path, tmp_path: Path
) -> None:
    """Each hop is the container once more: nothing but its sshd tells them apart."""
    sudoers.write_text("ops ALL=(root) ALL\n")
    talk = host.root / "home/ops/.bashrc"
    talk.write_text("echo Welcome to this host\necho Mind the step >&2\n")
    host.shell("usermod --shell /bin/bash ops")
    assert "Welcome" in host.shell("bash -c '. ~ops/.bashrc'")
    way = f"nsenter --target={host.init} --net {sys.executable} {inventory}/relay.py"
    (tmp_path / "config").write_text(
        f"Host first\n ProxyCommand {way}\n HostKeyAlias container\n"
        "Host second\n HostName 127.0.0.1\n HostKeyAlias container\n"
        f"Host *\n User ops\n IdentityFile {inventory}/id\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {tmp_path}/known\n"
    )
    known = tmp_path / "known"
    known.write_text((inventory / "known").read_text())
    shared = {
        "ansible_user": "ops",
        "ansible_become_password": PASSWORD,
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    jumps = {"gpu01": ("127.0.0.1", "first,second"), "gw01": ("127.0.0.2", "first")}
    hosts = {
        name: {
            **shared,
            "ansible_host": address,
            "ansible_ssh_common_args": f"-F {tmp_path}/config -o ControlPath=none -J {jump}",
        }
        for name, (address, jump) in jumps.items()
    }
    groups = {"gpu_nodes": {"gpu01": hosts["gpu01"]}, "gateways": {"gw01": hosts["gw01"]}}
    children = {name: {"hosts": members} for name, members in groups.items()}
    (tmp_path / "hosts.yml").write_text(json.dumps({"all": {"children": children}}))
    playbook = str(Path(sys.executable).with_name("ansible-playbook"))
    command = [playbook, "-i", str(tmp_path / "hosts.yml"), "playbooks/enroll.yml",
               "-e", "enrolment_accept_new=true", "-e", "enrolment_timeout=60"]  # fmt: skip

    def enroll() -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        return done.stdout

    try:
        assert re.search(r"^gpu01 +ops@127\.0\.0\.1 .*", enroll(), re.MULTILINE)
        assert re.search(r"^127\.0\.0\.1 ssh-ed25519 ", known.read_text(), re.MULTILINE)
        assert " changed=0 " in enroll()
    finally:
        talk.unlink()
