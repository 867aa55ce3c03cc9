# SPDX-License-Identifier: Apache-2.0
"""Enrolment: is a host there, is it who it was, does it let us in, and can it do the work?

What talks SSH is injected; who may be trusted, and what is done next, is decided here.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import FleetError
from ..core.runner import Runner, RunResult
from ..core.table import Line, render_table
from .known_hosts import NO_FILE, HostKey, KnownHosts, Target

PYTHON_MIN = (3, 9)


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

    def __call__(self, target: Target, kinds: Sequence[str]) -> Session: ...


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
) -> Target:
    """Return how ssh reaches a host, from its own configuration and ``arguments``.

    ``stated`` are further fields of `Target`; ``identities`` go before those of ssh.
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
    proxy = f"ssh -W [{hostname}]:{port} {jump}" if jump else first("proxycommand")
    for sign, value in (("%h", hostname), ("%p", str(port)), ("%r", user)):
        proxy = proxy.replace(sign, value)
    own = [Path(each) for each in stated.pop("identities", ())]
    theirs = [Path(each).expanduser() for each in settings.get("identityfile", ())]
    return Target(
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
    """What all hosts have in common. In check mode nothing is written and no password sent."""

    connect: Connect
    known: KnownHosts
    password: str = ""
    check: bool = False

    def enroll(self, target: Target, key_line: str) -> Row:
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
        target: Target,
        key: HostKey,
        trusted: Sequence[HostKey],
        revoked: Sequence[HostKey],
    ) -> Row:
        if key in revoked:
            raise FleetError(
                "its host key is revoked", remedy=f"give the host a new key: {key.fingerprint}"
            )
        if target.fingerprint and target.fingerprint != key.fingerprint:
            raise FleetError(
                "its host key is not the one of the inventory",
                found=f"expected {target.fingerprint}, found {key.fingerprint}",
                remedy="find out which host answers; correct enrolment_fingerprint if it is right",
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
        if self.check:
            return replace(row, host_key="new", changed=True)
        self.known.add(target, key)
        return replace(row, host_key="pinned", changed=True)

    def _login(
        self, row: Row, target: Target, key: HostKey, sessions: list[Session], key_line: str
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

    def _again(self, target: Target, key: HostKey) -> Session:
        session = self.connect(target, [key.kind])
        if session.host_key != key:
            session.close()
            raise FleetError(
                "two connections met two host keys",
                found=f"{key.fingerprint}, then {session.host_key.fingerprint}",
                remedy="find out which hosts share that address",
            )
        return session

    def _look(self, row: Row, target: Target, session: Session) -> Row:
        if row.login == "key to be installed":
            return row
        sudo = "sudo -k -S -p ''" if target.become_password else "sudo -n"
        version = 'import sys; print("%d.%d.%d" % sys.version_info[:3])'
        python = f"{shlex.quote(target.interpreter)} -c {shlex.quote(version)}"
        script = (
            f'out=$(if [ "$(id -u)" = 0 ]; then :; else {sudo} true; fi 2>&1); '
            'echo "$? $out" | head -n 1; '
            f'out=$({python} 2>&1 </dev/null); echo "$? $out" | tail -n 1'
        )
        words = f"{target.become_password}\n" if target.become_password else ""
        answer = session.run(f"/bin/sh -c {shlex.quote(script)}", words)
        lines = [line.partition(" ") for line in [*answer.stdout.splitlines(), "", ""]]
        (sudo_rc, _, sudo_said), (python_rc, _, python_said) = lines[:2]
        row = replace(row, sudo="yes" if sudo_rc == "0" else "no")
        if sudo_rc != "0":
            raise FleetError(
                f"{target.user} may not use sudo without being asked",
                found=sudo_said or answer.stderr.strip()[-200:] or "no answer",
                remedy=f"allow it there, such as by `{target.user} ALL=(ALL) NOPASSWD: ALL` in "
                "/etc/sudoers.d, or set ansible_become_password from a vault",
            )
        found = _version(python_said) if python_rc == "0" else None
        if found is None or found < PYTHON_MIN:
            wanted = ".".join(map(str, PYTHON_MIN))
            raise FleetError(
                f"{target.interpreter} is no Python {wanted} or newer",
                found=python_said or "no answer",
                remedy="install python3 there, or correct ansible_python_interpreter",
            )
        return replace(row, python=python_said)


def _version(text: str) -> tuple[int, ...] | None:
    parts = text.strip().split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else None


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
    tones = ["bad" if row.problem else "good" for row in rows]
    lines = render_table(heading, cells, max(width, 120), tones)
    for row in rows:
        if row.problem:
            text = f"{row.host} cannot be used: {row.problem}. What to do: {row.remedy}."
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
