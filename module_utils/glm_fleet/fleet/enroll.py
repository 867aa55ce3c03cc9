# SPDX-License-Identifier: Apache-2.0
"""Enrolment: is a host there, is it who it was, does it let us in, and can it do the work?

What talks SSH is injected; who may be trusted, and what is done next, is decided here.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Protocol

from ..core.causes import SUDOERS, why_no_sudo
from ..core.errors import FleetError
from ..core.runner import Runner, RunResult
from ..core.table import Line, render_table
from .fingerprints import stated_for
from .known_hosts import NO_FILE, HostKey, KnownHosts, SshTarget

PYTHON_MIN = (3, 9)
# What the table says of a host key that is new, and that nobody confirmed.
UNCONFIRMED = "unconfirmed"
# Before each answer of the check, so that what a shell or a Python prints by itself does not count.
MARK = "glm-fleet-enrolment"
# A command in the form in which Ansible gives sudo its own: sudoers may allow that form alone.
AS_ANSIBLE = "/bin/sh -c 'echo BECOME-SUCCESS-enrolment ; true'"
# What Ansible looks for where the inventory leaves the choice to it.
DISCOVERED = (*(f"python3.{minor}" for minor in range(14, 8, -1)), "/usr/bin/python3", "python3")


class Session(Protocol):
    """A connection whose key exchange is done. ``latency_s`` is that of TCP's handshake."""

    host_key: HostKey
    latency_s: float

    def login_with_key(self) -> bool:
        """Log in with one of the operator's keys; False if the host takes none."""

    def login_with_password(self, password: str) -> bool:
        """Log in with a password; False if it is wrong."""

    def run(self, command: str, input_text: str = "") -> RunResult:
        """Run a command in the user's shell."""

    def close(self) -> None:
        """Hang up."""


class Connect(Protocol):
    """Reach a host, asking for host keys of the given types first."""

    def __call__(self, target: SshTarget, kinds: Sequence[str]) -> Session: ...


@dataclass(frozen=True)
class Row:
    """What is known of a host after its enrolment; ``problem`` is empty if it can be used."""

    host: str
    address: str
    latency_ms: float | None = None
    fingerprint: str = ""
    host_key: str = ""
    login: str = ""
    sudo: str = ""
    python: str = ""
    changed: bool = False
    problem: str = ""
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_target(
    name: str, address: str, arguments: Sequence[str], runner: Runner, **stated: Any
) -> SshTarget:
    """Return how ssh reaches a host, from its own configuration and ``arguments``.

    ``stated`` are further fields of `SshTarget`; ``identities`` go before those of ssh.
    """
    answer = runner(["ssh", "-G", *arguments, address])
    settings: dict[str, list[str]] = {}
    for line in answer.stdout.splitlines():
        key, _, value = line.partition(" ")
        settings.setdefault(key, []).append(value)

    def first(key: str, default: str = "") -> str:
        value = settings.get(key, [default])[0]
        return "" if value == "none" else value

    files = [Path(each).expanduser() for each in first("userknownhostsfile").split()]
    if not files or str(files[0]) in NO_FILE:
        raise FleetError(
            f"The host key of {name} cannot be kept",
            expected="ssh to use a known_hosts file",
            found=f"UserKnownHostsFile {settings.get('userknownhostsfile', ['none'])[0]}",
            remedy="remove that option from ansible_ssh_common_args or from ~/.ssh/config",
        )
    files += [Path(each) for each in first("globalknownhostsfile").split()]
    hostname, port, user = first("hostname", address), int(first("port", "22")), first("user")
    alias = first("hostkeyalias")
    jump = first("proxyjump")
    proxy = jump_command(jump, arguments) if jump else first("proxycommand")
    signs = {"%": "%", "h": hostname, "p": str(port), "r": user, "n": address}
    proxy = re.sub(r"%([%hprn])", lambda found: signs[found[1]], proxy)
    own = [Path(each) for each in stated.pop("identities", ())]
    theirs = [Path(each).expanduser() for each in settings.get("identityfile", ())]
    return SshTarget(
        name=name,
        address=hostname,
        port=port,
        user=user,
        lookup=alias or (hostname if port == 22 else f"[{hostname}]:{port}"),
        known_hosts=tuple(files),
        identities=tuple(dict.fromkeys([*own, *theirs])),
        use_agent=first("identitiesonly") != "yes",
        proxy=proxy,
        **stated,
    )


@dataclass(frozen=True)
class Enrolment:
    """What all hosts have in common. In check mode nothing is written and no password sent.

    A host whose key nobody confirmed gets no password, and its key is not pinned. ``confirmed``
    is `read_fingerprints` of a file, ``in_dns`` asks the DNS, and ``accept_new`` takes whichever
    key a host shows first.
    """

    connect: Connect
    known: KnownHosts
    password: str = ""
    check: bool = False
    confirmed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    in_dns: Callable[[SshTarget, HostKey], bool] = lambda target, key: False
    accept_new: bool = False

    def enroll(self, target: SshTarget, key_line: str) -> Row:
        """Enroll one host; whatever is wrong with it is in the row."""
        row = Row(host=target.name, address=f"{target.user}@{target.lookup}")
        sessions: list[Session] = []
        try:
            trusted, revoked = self.known.find(target)
            sessions.append(self.connect(target, [key.kind for key in trusted]))
            key = sessions[0].host_key
            latency = round(sessions[0].latency_s * 1000, 1)
            row = replace(row, latency_ms=latency, fingerprint=key.fingerprint)
            row = self._trust(row, target, key, trusted, revoked)
            if row.host_key == UNCONFIRMED:
                return row
            row = self._login(row, target, key, sessions, key_line)
            row = self._look(row, target, sessions[-1])
        except FleetError as error:
            found = f" ({error.found})" if error.found else ""
            row = replace(row, problem=error.message + found, remedy=error.remedy)
        finally:
            for each in sessions:
                each.close()
        return row

    def _trust(
        self,
        row: Row,
        target: SshTarget,
        key: HostKey,
        trusted: Sequence[HostKey],
        revoked: Sequence[HostKey],
    ) -> Row:
        if key in revoked:
            raise FleetError(
                "its host key is revoked", remedy=f"give the host a new key: {key.fingerprint}"
            )
        stated = stated_for(target, self.confirmed)
        if stated and key.fingerprint not in stated:
            raise FleetError(
                "its host key is not the one that was confirmed",
                found=f"expected {' or '.join(sorted(stated))}, found {key.fingerprint}",
                remedy="find out which host answers; correct enrolment_fingerprint or the file of "
                "enrolment_fingerprints if it is right",
            )
        if key in trusted:
            return replace(row, host_key="known")
        if trusted:
            # Also a key of another type than the known ones: those were asked for first.
            known = ", ".join(each.fingerprint for each in trusted)
            raise FleetError(
                "its host key has changed",
                found=f"known {known}, found {key.fingerprint}",
                remedy="find out why; if the host was installed anew, run "
                f"ssh-keygen -R '{target.lookup}' -f {target.known_hosts[0]} and enroll it again",
            )
        if not stated and not self.accept_new and not self.in_dns(target, key):
            if self.check:
                return replace(row, host_key=UNCONFIRMED)
            raise FleetError(
                "nobody confirmed its host key", found=key.fingerprint, remedy=_how_to_confirm(row)
            )
        if self.check:
            return replace(row, host_key="new", changed=True)
        self.known.add(target, key)
        return replace(row, host_key="pinned", changed=True)

    def _login(
        self, row: Row, target: SshTarget, key: HostKey, sessions: list[Session], key_line: str
    ) -> Row:
        if sessions[0].login_with_key():
            return replace(row, login="key")
        if not self.password:
            raise FleetError(
                f"it takes none of your keys for the user {target.user}",
                remedy="run again and give the password, or add your public key there by hand",
            )
        if not key_line:
            raise FleetError(
                "there is no public key to install",
                remedy="make one with ssh-keygen, or name it in enrolment_public_key",
            )
        if self.check:
            return replace(row, login="key to be installed", changed=True)
        # A new connection: servers count the keys that were tried on the first one.
        helper = self._again(target, key)
        try:
            if not helper.login_with_password(self.password):
                raise FleetError(
                    f"the password of {target.user} is wrong there",
                    remedy="enroll this host alone, with its own password",
                )
            _install(helper, key_line)
        finally:
            helper.close()
        sessions.append(self._again(target, key))
        if not sessions[-1].login_with_key():
            raise FleetError(
                "it still takes no key, though yours was installed",
                remedy="look at PubkeyAuthentication and the permissions of the home folder "
                "there, and at the keys that you use here",
            )
        return replace(row, login="key installed", changed=True)

    def _again(self, target: SshTarget, key: HostKey) -> Session:
        session = self.connect(target, [key.kind])
        if session.host_key != key:
            session.close()
            raise FleetError(
                "two connections met two host keys",
                found=f"{key.fingerprint}, then {session.host_key.fingerprint}",
                remedy="find out which hosts share that address",
            )
        return session

    def _look(self, row: Row, target: SshTarget, session: Session) -> Row:
        if row.login == "key to be installed":
            return row
        words = f"{target.become_password}\n" if target.become_password else ""
        answer = session.run(f"/bin/sh -c {shlex.quote(look_script(target))}", words)
        said = answer.stderr.strip()[-200:] or answer.stdout.strip()[-200:]
        sudo_rc, sudo_said = _answer_of("sudo", answer.stdout)
        row = replace(row, sudo="yes" if sudo_rc == "0" else "no")
        if sudo_rc != "0":
            raise _no_sudo(target, sudo_said or said or "no answer")
        python_rc, python_said = _answer_of("python", answer.stdout)
        version = re.search(rf"{MARK} version ([\d.]+)", python_said)
        found = tuple(map(int, version[1].split("."))) if version else ()
        if python_rc != "0" or found < PYTHON_MIN:
            wanted = ".".join(map(str, PYTHON_MIN))
            raise FleetError(
                f"{' '.join(interpreters(target.interpreter)[-1])} is no Python {wanted} or newer",
                found=version[1] if version else python_said or said or "no answer",
                remedy="install python3 there, or correct ansible_python_interpreter",
            )
        return replace(row, python=version[1] if version else "")


def _how_to_confirm(row: Row) -> str:
    return (
        "compare it with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` shows on the "
        f"host's console; if it is the same, add the line `{row.host} {row.fingerprint}` to the "
        "file of enrolment_fingerprints. On a network that you trust, -e "
        "enrolment_accept_new=true takes whichever key a host shows first"
    )


def jump_command(jump: str, arguments: Sequence[str]) -> str:
    """Return the command by which ssh itself goes through jump hosts, its last one last.

    ``jump`` is ProxyJump as ``ssh -G`` prints it, with %h and %p for the host behind. Of the
    arguments ssh passes on its configuration file alone: keys and options of a jump host belong
    there.
    """
    *before, last = jump.split(",")
    user, _, place = last.rpartition("@")
    host, port = place, ""
    found = re.fullmatch(r"\[([^\]]*)\](?::(\d+))?|([^:]+)(?::(\d+))?", place)
    if found:
        host, port = found[1] or found[3], found[2] or found[4] or ""
    words = ["ssh", "-o", "BatchMode=yes"]
    words += ["-l", user] if user else []
    words += ["-p", port] if port else []
    words += ["-J", ",".join(before)] if before else []
    words += _configuration(arguments)
    quoted = " ".join(map(shlex.quote, words)).replace("%", "%%")
    return f"{quoted} -W '[%h]:%p' {shlex.quote(host)}"


def _configuration(arguments: Sequence[str]) -> list[str]:
    for place, word in enumerate(arguments):
        if word == "-F" and place + 1 < len(arguments):
            return ["-F", arguments[place + 1]]
        if word.startswith("-F") and len(word) > 2:
            return ["-F", word[2:]]
    return []


def interpreters(stated: str) -> list[list[str]]:
    """Return the commands of Python to try, in order, for a value of ansible_python_interpreter.

    A path, a command with words such as ``/usr/bin/env python3``, or ``auto`` and its kin, which
    leave the choice to Ansible.
    """
    if re.fullmatch(r"auto(?:_legacy)?(?:_silent)?|", stated.strip()):
        return [[each] for each in DISCOVERED]
    return [shlex.split(stated)]


def look_script(target: SshTarget) -> str:
    """Return the script that tries sudo and Python: of one line, for any log-in shell.

    It prints ``MARK sudo STATUS WORDS`` and ``MARK python STATUS WORDS``.
    """
    sudo = "sudo -k -S -p ''" if target.become_password else "sudo -n"
    code = (
        f'import sys; print("{MARK} version %d.%d.%d" % sys.version_info[:3]); '
        f"sys.exit(sys.version_info[:2] < {PYTHON_MIN})"
    )
    tries = [
        f"{' '.join(map(shlex.quote, each))} -c {shlex.quote(code)}"
        for each in interpreters(target.interpreter)
    ]
    # The words of all that were tried, the status of the last one.
    python = " || ".join(f"{{ {each}; }}" for each in tries)
    parts = (
        ("sudo", f'if [ "$(id -u)" = 0 ]; then :; else {sudo} {AS_ANSIBLE}; fi', ""),
        ("python", python, " </dev/null"),
    )
    # Its words are read: not in the language of whoever logs in.
    return "LC_ALL=C; export LC_ALL; " + "; ".join(
        f"out=$({{ {command}; }} 2>&1{source}); status=$?; "
        # On a line of its own, whatever was printed before it without an end.
        f"echo; echo \"{MARK} {name} $status $(echo \"$out\" | tr '\\n' ' ')\""
        for name, command, source in parts
    )


def _answer_of(name: str, stdout: str) -> tuple[str, str]:
    """Return (exit status, words) of one part of the script's answer, ('', '') without one."""
    found = re.findall(rf"^{MARK} {name} (\d+) ?(.*)$", stdout, re.MULTILINE)
    return (found[-1][0], found[-1][1].strip()) if found else ("", "")


def _no_sudo(target: SshTarget, said: str) -> FleetError:
    known = why_no_sudo(said, user=target.user)
    if known:
        return FleetError(known.cause, found=said[-200:], remedy=known.remedy)
    return FleetError(
        f"{target.user} may not use sudo without being asked",
        found=said[-200:],
        remedy=f"allow it there, by `{SUDOERS.format(user=target.user)}` in /etc/sudoers.d, or "
        "set ansible_become_password from a vault",
    )


def _install(session: Session, line: str) -> None:
    """Add a public key to the user's authorized_keys, once."""
    kind, blob = line.split()[:2]
    script = (
        "umask 077; mkdir -p ~/.ssh && cd ~/.ssh && touch authorized_keys && "
        f"{{ grep -qF {shlex.quote(f'{kind} {blob}')} authorized_keys || {{ "
        '[ -z "$(tail -c 1 authorized_keys)" ] || echo >> authorized_keys; '
        f"echo {shlex.quote(line)} >> authorized_keys; }}; }} && "
        "{ ! command -v restorecon >/dev/null || restorecon -R ~/.ssh; }"
    )
    answer = session.run(f"/bin/sh -c {shlex.quote(script)}")
    if answer.rc != 0:
        raise FleetError(
            "the key could not be installed",
            found=answer.stderr.strip()[-200:] or f"exit status {answer.rc}",
            remedy="look at ~/.ssh there",
        )


def render_enrolment(rows: Sequence[Row], width: int) -> list[Line]:
    """Return the table of all hosts, then why those cannot be used that cannot."""
    heading = ("host", "reached as", "ms", "host key", "fingerprint", "login", "sudo", "python")
    cells = [
        (
            row.host,
            row.address,
            "-" if row.latency_ms is None else f"{row.latency_ms:g}",
            row.host_key or "-",
            row.fingerprint or "-",
            row.login or "-",
            row.sudo or "-",
            row.python or "-",
        )
        for row in rows
    ]
    tones = ["bad" if row.problem or row.host_key == UNCONFIRMED else "good" for row in rows]
    lines = render_table(heading, cells, max(width, 120), tones)
    for row in rows:
        text = ""
        if row.problem:
            text = f"{row.host} cannot be used: {row.problem}. What to do: {row.remedy}."
        elif row.host_key == UNCONFIRMED:
            text = (
                f"{row.host} would be refused: nobody confirmed its host key. What to do: "
                f"{_how_to_confirm(row)}."
            )
        if text:
            parts = textwrap.wrap(
                text,
                max(width, 40),
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            lines += [Line(part, "bad") for part in parts]
    return lines


def sentence(rows: Iterable[Row]) -> str:
    """Sum up who cannot be used; '' if everybody can."""
    listed = list(rows)
    bad = [row.host for row in listed if row.problem]
    if not bad:
        return ""
    return f"Enrolment: {len(bad)} of {len(listed)} hosts cannot be used: {', '.join(bad)}."
