# SPDX-License-Identifier: Apache-2.0
"""Whom enrolment trusts, and how it names what is wrong."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.vars.manager import VariableManager
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult, run_program
from glm_fleet.fleet.enroll import (
    MARK,
    Enrolment,
    Row,
    interpreters,
    read_target,
    render_enrolment,
    sentence,
)
from glm_fleet.fleet.known_hosts import HostKey, KnownHosts, SshTarget, public_key

_SPEC = importlib.util.spec_from_file_location(
    "enroll_action", Path(__file__).resolve().parents[3] / "plugins/action/enroll.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
plugin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plugin)

CASES = Path(__file__).parents[1] / "fixtures/cases"
LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGVucm9sbWVudHRlc3QgZW5yb2xtZW50dGVzdCAx me@here"
SSH_G = """user ops
hostname 192.0.2.11
port 22
identitiesonly no
identityfile ~/.ssh/id_ed25519
globalknownhostsfile /etc/ssh/ssh_known_hosts
userknownhostsfile ~/.ssh/known_hosts ~/.ssh/known_hosts2
proxyjump none
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[HostKey]:
    """Three host keys: two of one type, one of another."""
    folder = tmp_path_factory.mktemp("keys")
    found = []
    for number, kind in enumerate(("ed25519", "ed25519", "ecdsa")):
        path = folder / str(number)
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", path], check=True)
        found.append(HostKey(*path.with_suffix(".pub").read_text().split()[:2]))
    return found


def answer(sudo: str = "0", python: str = f"0 {MARK} version 3.11.2") -> str:
    """What the check prints."""
    return f"\n{MARK} sudo {sudo}\n\n{MARK} python {python}\n"


class Host:
    """A host that answers as it is told; ``said`` is what the log-in shell was asked."""

    def __init__(self, key: HostKey, **settings: Any) -> None:
        self.key = key
        self.takes_key = settings.get("takes_key", True)
        self.password = settings.get("password", "")
        self.ignores_key = settings.get("ignores_key", False)
        self.answer = settings.get("answer", answer())
        self.asked_for: list[list[str]] = []
        self.passwords: list[str] = []
        self.said: list[tuple[str, str]] = []
        self.open = 0

    def connect(self, target: SshTarget, kinds: Sequence[str]) -> HostSession:
        self.asked_for.append(list(kinds))
        self.open += 1
        return HostSession(self)


class HostSession:
    latency_s = 0.0042

    def __init__(self, host: Host) -> None:
        self.host = host
        self.host_key = host.key

    def login_with_key(self) -> bool:
        return bool(self.host.takes_key)

    def login_with_password(self, password: str) -> bool:
        self.host.passwords.append(password)
        return bool(password == self.host.password)

    def run(self, command: str, input_text: str = "") -> RunResult:
        self.host.said.append((command, input_text))
        if "authorized_keys" in command:
            self.host.takes_key = not self.host.ignores_key
            return RunResult(0, "", "")
        return RunResult(0, self.host.answer, "")

    def close(self) -> None:
        self.host.open -= 1


@pytest.fixture
def target(tmp_path: Path) -> SshTarget:
    return SshTarget(
        name="gpu01",
        address="192.0.2.11",
        port=22,
        user="ops",
        lookup="192.0.2.11",
        known_hosts=(tmp_path / "ssh/known_hosts", tmp_path / "global"),
    )


@pytest.fixture
def go(target: SshTarget) -> Callable[..., Row]:
    def enroll(host: Host, changed: SshTarget = target, **settings: Any) -> Row:
        settings = {"accept_new": True, **settings}
        row = Enrolment(host.connect, KnownHosts(run_program), **settings).enroll(changed, LINE)
        assert host.open == 0, "a connection was left open"
        return row

    return enroll


def test_a_new_host_is_pinned_once(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    first = go(Host(keys[0]))
    assert (first.host_key, first.login, first.sudo, first.python) == (
        "pinned", "key", "yes", "3.11.2",
    )  # fmt: skip
    assert (first.problem, first.changed, first.latency_ms) == ("", True, 4.2)
    (path, _) = target.known_hosts
    assert path.read_text() == f"192.0.2.11 {keys[0].kind} {keys[0].blob}\n"
    second = go(Host(keys[0]))
    assert (second.host_key, second.changed) == ("known", False)
    assert len(path.read_text().splitlines()) == 1


def test_what_is_in_known_hosts_stays(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    path = target.known_hosts[0]
    path.parent.mkdir()
    path.write_text("# mine\nother ssh-ed25519 AAAA")  # without an end of line
    path.chmod(0o640)
    go(Host(keys[0]))
    assert path.read_text().splitlines()[:2] == ["# mine", "other ssh-ed25519 AAAA"]
    assert len(path.read_text().splitlines()) == 3
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_fingerprint_is_the_one_of_ssh_keygen(keys: list[HostKey], tmp_path: Path) -> None:
    path = tmp_path / "key.pub"
    path.write_text(f"{keys[0].kind} {keys[0].blob}\n")
    shown = run_program(["ssh-keygen", "-lf", str(path)]).stdout
    assert shown.split()[1] == keys[0].fingerprint


@pytest.mark.parametrize("found", [1, 2])
def test_a_changed_key_is_refused_before_a_word_is_said(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey], found: int
) -> None:
    go(Host(keys[0]))
    before = target.known_hosts[0].read_text()
    host = Host(keys[found], takes_key=False, password="secret")
    row = go(host, password="secret")
    assert row.problem.startswith("its host key has changed")
    assert keys[0].fingerprint in row.problem
    assert keys[found].fingerprint in row.problem
    assert (host.passwords, host.said) == ([], [])
    assert host.asked_for == [[keys[0].kind]]
    assert target.known_hosts[0].read_text() == before


def test_hashed_names_ports_and_global_files_are_known(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    own, shared = target.known_hosts
    own.parent.mkdir()
    own.write_text(f"192.0.2.11 {keys[0].kind} {keys[0].blob}\n")
    run_program(["ssh-keygen", "-H", "-f", str(own)])
    assert "192.0.2.11" not in own.read_text()
    assert go(Host(keys[0])).host_key == "known"
    shared.write_text(f"[192.0.2.11]:2222 {keys[1].kind} {keys[1].blob}\n")
    moved = replace(target, port=2222, lookup="[192.0.2.11]:2222")
    assert go(Host(keys[1]), moved).host_key == "known"


def test_a_revoked_key_is_refused(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    target.known_hosts[1].write_text(f"@revoked * {keys[0].kind} {keys[0].blob}\n")
    assert go(Host(keys[0])).problem == "its host key is revoked"


def test_the_fingerprint_of_the_inventory_decides(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    stated = replace(target, fingerprint=keys[1].fingerprint)
    row = go(Host(keys[0]), stated)
    assert f"expected {keys[1].fingerprint}, found {keys[0].fingerprint}" in row.problem
    assert not target.known_hosts[0].exists()
    assert go(Host(keys[1]), stated).problem == ""


def test_check_mode_pins_nothing_and_sends_no_password(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    host = Host(keys[0], takes_key=False, password="secret")
    row = go(host, password="secret", check=True)
    assert (row.host_key, row.login, row.changed, row.problem) == (
        "new", "key to be installed", True, "",
    )  # fmt: skip
    assert (host.passwords, host.said) == ([], [])
    assert not target.known_hosts[0].exists()


def test_no_password_goes_to_a_host_that_nobody_confirmed(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    # It would take the key and ask for the password of sudo, or take the password of the user.
    for takes_key in (True, False):
        host = Host(keys[0], takes_key=takes_key, password="secret")
        asked = replace(target, become_password="secret")
        for check in (True, False):
            row = go(host, asked, password="secret", accept_new=False, check=check)
            assert (host.passwords, host.said) == ([], [])
            assert not target.known_hosts[0].exists()
            assert bool(row.problem) != check
    assert row.problem == f"nobody confirmed its host key ({keys[0].fingerprint})"
    assert f"add the line `gpu01 {keys[0].fingerprint}`" in row.remedy
    assert "-e enrolment_accept_new=true" in row.remedy


def test_check_mode_shows_what_there_is_to_confirm(
    go: Callable[..., Row], keys: list[HostKey]
) -> None:
    row = go(Host(keys[0]), check=True, accept_new=False)
    assert (row.host_key, row.problem, row.changed) == ("unconfirmed", "", False)
    text = " ".join(line.text.strip() for line in render_enrolment([row], 100))
    assert f"would be refused: nobody confirmed its host key. {'What to do'}" in text
    assert f"gpu01 {keys[0].fingerprint}" in text


@pytest.mark.parametrize("name", ["gpu01", "192.0.2.11"])
def test_a_file_or_the_dns_confirms_a_host(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey], name: str
) -> None:
    listed = {name: frozenset({keys[0].fingerprint, keys[2].fingerprint})}
    assert go(Host(keys[0]), confirmed=listed, accept_new=False).host_key == "pinned"
    target.known_hosts[0].unlink()
    # The word that takes any new key is no word against what was confirmed.
    row = go(Host(keys[1]), confirmed=listed, accept_new=True)
    assert row.problem.startswith("its host key is not the one that was confirmed (expected SHA")
    assert not target.known_hosts[0].exists()
    seen: list[tuple[SshTarget, HostKey]] = []

    def in_dns(*asked: Any) -> bool:
        seen.append(asked)
        return len(seen) > 1

    host = Host(keys[0], takes_key=False, password="secret")
    assert "nobody confirmed" in go(host, in_dns=in_dns, accept_new=False).problem
    assert host.passwords == []
    row = go(host, in_dns=in_dns, accept_new=False, password="secret")
    assert (row.host_key, row.login, host.passwords) == ("pinned", "key installed", ["secret"])
    assert seen == [(target, keys[0])] * 2


def test_the_key_is_installed_with_the_password(
    go: Callable[..., Row], keys: list[HostKey]
) -> None:
    host = Host(keys[0], takes_key=False, password="secret")
    row = go(host, password="secret")
    assert (row.login, row.problem) == ("key installed", "")
    assert host.passwords == ["secret"]
    assert not any("secret" in command for command, _ in host.said)


@pytest.mark.parametrize(
    ("settings", "password", "words"),
    [
        ({}, "", "it takes none of your keys for the user ops"),
        ({"password": "right"}, "wrong", "the password of ops is wrong there"),
        ({"password": "right", "ignores_key": True}, "right", "it still takes no key"),
    ],
)
def test_a_host_that_lets_nobody_in_is_named(
    go: Callable[..., Row],
    keys: list[HostKey],
    settings: dict[str, Any],
    password: str,
    words: str,
) -> None:
    row = go(Host(keys[0], takes_key=False, **settings), password=password)
    assert row.problem.startswith(words)
    assert row.remedy


@pytest.mark.parametrize(
    ("said", "words", "remedy"),
    [
        (
            answer("1 sudo: a password is required"),
            "sudo there asks ops for a password, and none is given .sudo: a password is requir",
            "NOPASSWD",
        ),
        (answer("127 sh: sudo: not found"), "there is no sudo there .*not found", "install sudo"),
        (
            answer("1 sudo: sorry, you must have a tty to run sudo"),
            "sudo there wants a terminal",
            "`Defaults:ops !requiretty`",
        ),
        (
            answer("1 Sorry, try again. sudo: no password was provided sudo: 1 incorrect password"),
            "the become password is wrong for ops there",
            "correct ansible_become_password",
        ),
        (answer("1 odd words"), "ops may not use sudo without being asked .odd words", "sudoers.d"),
        (answer(python=f"1 {MARK} version 3.6.9"), r"no Python 3.9 or newer \(3.6.9\)", "install"),
        (answer(python="127 sh: python3: not found"), r"no Python 3.9.*python3: not found", "in"),
        ("", "ops may not use sudo.*no answer", "sudoers.d"),
    ],
)
def test_a_host_that_cannot_do_the_work_is_named(
    go: Callable[..., Row], keys: list[HostKey], said: str, words: str, remedy: str
) -> None:
    row = go(Host(keys[0], answer=said))
    assert re.search(words, row.problem), row.problem
    assert remedy in row.remedy


def test_what_a_shell_or_a_python_says_by_itself_does_not_matter(
    go: Callable[..., Row], keys: list[HostKey]
) -> None:
    greeting = f"hello from .bashrc\n{MARK}? no\n0 \nno end of line"
    python = f"0 /usr/lib/x.py:1: UserWarning: old {MARK} version 3.11.2 goodbye"
    row = go(Host(keys[0], answer=greeting + answer(python=python) + "logout\n"))
    assert (row.problem, row.sudo, row.python) == ("", "yes", "3.11.2")


def test_the_password_of_sudo_goes_in_by_the_input(
    go: Callable[..., Row], target: SshTarget, keys: list[HostKey]
) -> None:
    host = Host(keys[0])
    assert go(host, replace(target, become_password="secret")).problem == ""
    ((command, words),) = host.said
    assert "sudo -k -S" in command
    assert "secret" not in command
    assert words == "secret\n"


class RealHost(Host):
    """A host whose log-in shell is a real one; ``sudo`` is a program of the test."""

    def __init__(self, key: HostKey, folder: Path, sudo: str, shell: Sequence[str]) -> None:
        super().__init__(key)
        self.shell = shell
        program = folder / "bin/sudo"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{sudo}\n")
        program.chmod(0o755)
        # No root, whom the check does not ask for sudo.
        (folder / "bin/id").write_text("#!/bin/sh\necho 1000\n")
        (folder / "bin/id").chmod(0o755)
        # A python3 of a version manager is a script, which reads BASH_ENV too.
        (folder / "bin/python3").symlink_to(sys.executable)
        self.environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        self.environment["BASH_ENV"] = str(CASES / "09-shell-that-talks/bashrc")

    def connect(self, target: SshTarget, kinds: Sequence[str]) -> HostSession:
        session = super().connect(target, kinds)

        def run(command: str, input_text: str = "") -> RunResult:
            done = subprocess.run(
                [*self.shell, command],
                input=input_text,
                capture_output=True,
                text=True,
                check=False,
                env=self.environment,
            )
            return RunResult(done.returncode, done.stdout, done.stderr)

        session.run = run  # type: ignore[method-assign]
        return session


def real(
    keys: list[HostKey], folder: Path, target: SshTarget, sudo: str = "exit 0", **changes: Any
) -> Row:
    host = RealHost(keys[0], folder, sudo, ["bash", "-c"])
    enrolment = Enrolment(host.connect, KnownHosts(run_program), accept_new=True)
    return enrolment.enroll(replace(target, **changes), LINE)


@pytest.mark.parametrize(
    "interpreter",
    [sys.executable, "/usr/bin/env python3", "auto", "auto_silent", "auto_legacy", ""],
)
def test_the_check_runs_in_a_shell_that_talks_with_every_form_of_interpreter(
    keys: list[HostKey], target: SshTarget, tmp_path: Path, interpreter: str
) -> None:
    row = real(keys, tmp_path, target, interpreter=interpreter)
    assert (row.problem, row.sudo) == ("", "yes")
    assert re.fullmatch(r"3\.\d+\.\d+", row.python)


@pytest.mark.parametrize(
    ("sudo", "words", "remedy"),
    [
        (
            "echo We trust you have received the usual lecture >&2; "
            "echo sudo: unable to resolve host gpu01: Name or service not known >&2",
            "",
            "",
        ),
        (
            "echo sudo: sorry, you must have a tty to run sudo >&2; exit 1",
            "requiretty",
            "!requiretty",
        ),
        (
            "cat >/dev/null; echo Sorry, try again. >&2; echo sudo: no password was provided >&2; "
            "echo sudo: 1 incorrect password attempt >&2; exit 1",
            "the become password is wrong",
            "correct ansible_become_password",
        ),
        ("echo sudo: a password is required >&2; exit 1", "asks ops for a password", "NOPASSWD"),
        ("echo ops is not in the sudoers file. >&2; exit 1", "may not use sudo", "sudoers.d"),
    ],
)
def test_the_words_of_sudo_lead_to_their_cause(
    keys: list[HostKey], target: SshTarget, tmp_path: Path, sudo: str, words: str, remedy: str
) -> None:
    row = real(keys, tmp_path, target, sudo, interpreter=sys.executable, become_password="x")
    assert words in row.problem
    assert bool(words) == bool(row.problem)
    assert remedy in row.remedy


@pytest.mark.parametrize("text", ["/no/such/python", "/usr/bin/env no-such-python", "false"])
def test_a_python_that_is_not_there_is_named_as_the_inventory_names_it(
    keys: list[HostKey], target: SshTarget, tmp_path: Path, text: str
) -> None:
    row = real(keys, tmp_path, target, interpreter=text)
    assert row.problem.startswith(f"{text} is no Python 3.9 or newer")


def test_a_key_is_added_once_and_nothing_else_is_lost(
    go: Callable[..., Row], keys: list[HostKey], tmp_path: Path
) -> None:
    host = Host(keys[0], takes_key=False, password="secret")
    go(host, password="secret")
    command = next(command for command, _ in host.said if "authorized_keys" in command)
    home = tmp_path / "home"
    home.mkdir()
    for _ in range(2):
        environment = {**os.environ, "HOME": str(home)}
        subprocess.run(command, shell=True, check=True, env=environment)  # noqa: S602
    path = home / ".ssh/authorized_keys"
    assert path.read_text() == LINE + "\n"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("ssh-rsa BBBB other")  # without an end of line
    subprocess.run(command, shell=True, check=True, env=environment)  # noqa: S602
    assert path.read_text() == f"ssh-rsa BBBB other\n{LINE}\n"


def runner_of(text: str, seen: list[list[str]]) -> Any:
    def run(argv: Sequence[str], **_: Any) -> RunResult:
        seen.append(list(argv))
        return RunResult(0, text, "")

    return run


def test_a_host_is_reached_as_ssh_would_reach_it() -> None:
    seen: list[list[str]] = []
    found = read_target(
        "gpu01", "192.0.2.11", ["-p", "22"], runner_of(SSH_G, seen), identities=[Path("/k")]
    )
    assert seen == [["ssh", "-G", "-p", "22", "192.0.2.11"]]
    assert (found.user, found.lookup, found.proxy) == ("ops", "192.0.2.11", "")
    assert found.known_hosts[0] == Path("~/.ssh/known_hosts").expanduser()
    assert found.known_hosts[2] == Path("/etc/ssh/ssh_known_hosts")
    assert found.identities == (Path("/k"), Path("~/.ssh/id_ed25519").expanduser())


@pytest.mark.parametrize(
    ("was", "is_now", "lookup", "proxy"),
    [
        ("port 22", "port 2222", "[192.0.2.11]:2222", ""),
        ("port 22", "port 2222\nhostkeyalias gpu-one", "gpu-one", ""),
        (
            "proxyjump none",
            "proxyjump me@jump",
            "192.0.2.11",
            "ssh -o BatchMode=yes -l me -W '[192.0.2.11]:22' jump",
        ),
        (
            "proxyjump none",
            "proxycommand nc -X connect %h %p %r 100%%",
            "192.0.2.11",
            "nc -X connect 192.0.2.11 22 ops 100%",
        ),
    ],
)
def test_ports_aliases_and_jump_hosts_are_followed(
    was: str, is_now: str, lookup: str, proxy: str
) -> None:
    found = read_target("gpu01", "192.0.2.11", [], runner_of(SSH_G.replace(was, is_now), []))
    assert (found.lookup, found.proxy) == (lookup, proxy)


@pytest.mark.parametrize(
    "jump",
    [
        "ops@203.0.113.10",
        "kube@localhost:8022",
        "jump1,jump2",
        "ops@jump1:2201,ops@jump2",
        "a@jump1,b@[2001:db8::1]:2222",
        "ssh://ops@jump:2200",
        "jump",
    ],
)
def test_jump_hosts_are_passed_by_ssh_s_own_command(jump: str, tmp_path: Path) -> None:
    configuration = tmp_path / "config"
    configuration.write_text("Host *\n  ConnectTimeout 25\n")
    arguments = ["-F", str(configuration), "-J", jump, "-p", "2022"]
    ours = read_target("gpu01", "10.0.2.9", arguments, run_program).proxy
    # What ssh itself would do: it says so, and does it with a program that only ends.
    folder = tmp_path / "bin"
    folder.mkdir()
    said = tmp_path / "said"
    (folder / "ssh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{said}\n')
    (folder / "ssh").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    def words(program: str, *command: str) -> list[str]:
        subprocess.run(
            command,
            executable=program,
            check=False,
            env=environment,
            capture_output=True,
            timeout=30,
        )
        found = said.read_text().splitlines()
        said.unlink()
        return found

    wanted = words("/usr/bin/ssh", "ssh", *arguments, "10.0.2.9", "true")
    found = words("/bin/sh", "sh", "-c", ours)
    assert [each for each in found if each not in ("-o", "BatchMode=yes")] == wanted


def target_of(inventory: Path, host: str) -> SshTarget:
    """Return how the plugin would reach a host of an inventory file."""
    loader = DataLoader()
    hosts = InventoryManager(loader=loader, sources=[str(inventory)])
    manager = VariableManager(loader=loader, inventory=hosts)
    found: SshTarget = plugin.ssh_target(host, manager.get_vars(host=hosts.get_host(host)), "")
    return found


def test_the_jump_hosts_of_a_real_inventory_are_passed() -> None:
    inventory = CASES / "08-jump-hosts/hosts.yml"
    node = target_of(inventory, "gpu01")
    assert (node.address, node.user) == ("10.0.2.9", "ops")
    assert node.proxy == "ssh -o BatchMode=yes -l ops -W '[10.0.2.9]:22' 203.0.113.10"
    gateway = target_of(inventory, "gw01")
    assert gateway.proxy == (
        "ssh -o BatchMode=yes -l ops -J ops@jump1:2201 -W '[10.0.2.5]:22' jump2"
    )


def test_the_interpreters_of_a_real_inventory_are_tried_as_they_are() -> None:
    inventory = CASES / "10-interpreter-forms/hosts.ini"
    assert interpreters(target_of(inventory, "gpu01").interpreter) == [["/usr/bin/env", "python3"]]
    assert interpreters(target_of(inventory, "gpu02").interpreter)[-1] == ["python3"]
    assert len(interpreters(target_of(inventory, "gpu02").interpreter)) > 5
    assert target_of(inventory, "gw01").interpreter
    legacy = CASES / "11-legacy-host-variable/hosts.ini"
    assert target_of(legacy, "gpu02").address == "10.20.0.12"


def test_a_way_that_ends_at_once_says_why(target: SshTarget) -> None:
    said = "ssh: Could not resolve hostname jump1: Name or service not known"
    proxy = f"sh -c 'echo {said} >&2; exit 255'"
    begun = time.monotonic()
    with pytest.raises(FleetError) as caught:
        plugin.Connection(replace(target, proxy=proxy), [], 30)
    assert time.monotonic() - begun < 10, "it does not wait for an answer that cannot come"
    assert caught.value.message == (
        "the way to it through its jump host is closed: its name cannot be resolved"
    )
    assert caught.value.found == said


def test_a_way_that_is_silent_is_no_better_than_a_silent_host(target: SshTarget) -> None:
    with pytest.raises(FleetError, match=r"does not answer within 0\.5 s"):
        plugin.Connection(replace(target, proxy="sleep 30"), [], 0.5)


def test_a_way_carries_both_ways() -> None:
    way = plugin.Way("cat")
    try:
        way.socket.sendall(b"hello")
        assert way.socket.recv(5) == b"hello"
        assert way.problem() is None
    finally:
        way.close()


def test_ssh_that_keeps_no_host_keys_is_refused() -> None:
    text = SSH_G.replace("~/.ssh/known_hosts ~/.ssh/known_hosts2", "/dev/null")
    with pytest.raises(FleetError, match="host key of gpu01 cannot be kept"):
        read_target("gpu01", "192.0.2.11", [], runner_of(text, []))


def test_the_public_key_is_found_beside_the_private_one(target: SshTarget, tmp_path: Path) -> None:
    private = tmp_path / "id"
    assert public_key(target, None, run_program) == ""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", private], check=True)
    public = private.with_suffix(".pub")
    mine = replace(target, identities=(tmp_path / "none", private))
    expected = public.read_text().strip()
    assert public_key(mine, None, run_program) == expected
    public.unlink()
    assert public_key(mine, None, run_program).split()[:2] == expected.split()[:2]
    with pytest.raises(FleetError, match="is none"):
        public_key(mine, private, run_program)
    with pytest.raises(FleetError, match="cannot be read"):
        public_key(mine, public, run_program)


def test_the_table_says_who_cannot_be_used_and_why() -> None:
    good = Row("gpu01", "ops@192.0.2.11", 1.5, "SHA256:a", "known", "key", "yes", "3.11.2")
    bad = Row("gpu02", "ops@192.0.2.12", problem="it is off", remedy="switch it on")
    lines = render_enrolment([good, bad], 160)
    assert lines[2].text.split() == [
        "gpu01", "ops@192.0.2.11", "1.5", "known", "SHA256:a", "key", "yes", "3.11.2",
    ]  # fmt: skip
    assert [line.tone for line in lines[2:]] == ["good", "bad", "bad"]
    assert lines[-1].text == "gpu02 cannot be used: it is off. What to do: switch it on."
    assert sentence([good, bad]) == "Enrolment: 1 of 2 hosts cannot be used: gpu02."
    assert sentence([good]) == ""


@contextmanager
def listener(words: bytes | None) -> Iterator[int]:
    """Something that is no SSH server: it says ``words`` and hangs up; None says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        held: list[socket.socket] = []

        def serve() -> None:
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            held.append(connection)
            if words is not None:
                connection.sendall(words)
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield sock.getsockname()[1]
    for each in held:
        each.close()


@pytest.mark.parametrize(
    ("words", "timeout", "problem"),
    [
        (None, 0.5, "it does not answer within 0.5 s"),
        (b"220 mail ready\r\n", 60, "SSH with it breaks off"),
    ],
)
def test_what_is_no_ssh_server_is_named(
    target: SshTarget, words: bytes | None, timeout: float, problem: str
) -> None:
    with listener(words) as port, pytest.raises(FleetError) as caught:
        plugin.Connection(replace(target, address="127.0.0.1", port=port), [], timeout)
    assert caught.value.message == problem


def test_a_port_where_nobody_listens_is_named(target: SshTarget) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(FleetError, match=f"refuses connections to port {port}"):
        plugin.Connection(replace(target, address="127.0.0.1", port=port), [], 60)
