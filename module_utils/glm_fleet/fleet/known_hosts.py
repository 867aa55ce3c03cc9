# SPDX-License-Identifier: Apache-2.0
"""Where a host is, its keys, and the known_hosts file that keeps them."""

from __future__ import annotations

import base64
import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.runner import Runner

NO_FILE = ("none", "/dev/null")


@dataclass(frozen=True)
class SshTarget:
    """A host as Ansible's ssh would reach it, and what the inventory says of it."""

    name: str
    address: str
    port: int
    user: str
    lookup: str
    known_hosts: tuple[Path, ...]
    identities: tuple[Path, ...] = ()
    use_agent: bool = True
    proxy: str = ""
    interpreter: str = "/usr/bin/python3"
    become_password: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class HostKey:
    """A public host key: its type as in known_hosts, and its base64."""

    kind: str
    blob: str

    @property
    def fingerprint(self) -> str:
        """The key as OpenSSH shows it."""
        digest = hashlib.sha256(base64.b64decode(self.blob)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def public_key(target: SshTarget, stated: Path | None, runner: Runner) -> str:
    """Return the public key to install, as its line; '' if there is none."""
    if stated:
        try:
            return _public_line(stated.read_text())
        except OSError as error:
            raise FleetError(
                "The public key cannot be read", found=str(error), remedy="correct its path"
            ) from error
    for identity in target.identities:
        public = identity.with_name(identity.name + ".pub")
        if public.is_file():
            return _public_line(public.read_text())
        if identity.is_file():
            answer = runner(["ssh-keygen", "-y", "-P", "", "-f", str(identity)], check=False)
            if answer.rc == 0:
                return _public_line(answer.stdout)
    return ""


def _public_line(text: str) -> str:
    lines = text.split("\n")
    if len(lines[0].split()) < 2 or "PRIVATE" in lines[0]:
        raise FleetError(
            "What should be a public key is none",
            expected="a line such as `ssh-ed25519 AAAA... name`",
            found=lines[0][:40],
            remedy="name the .pub file",
        )
    return lines[0].strip()


class KnownHosts:
    """The host keys that ssh trusts, read as ssh reads them and added to line by line."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lock = threading.Lock()

    def find(self, target: SshTarget) -> tuple[list[HostKey], list[HostKey]]:
        """Return the keys that are trusted for a host, and those that are revoked."""
        trusted: list[HostKey] = []
        revoked: list[HostKey] = []
        for path in target.known_hosts:
            if not path.is_file():
                continue
            # ssh-keygen knows about hashed names, wildcards and ports.
            answer = self._runner(["ssh-keygen", "-F", target.lookup, "-f", str(path)], check=False)
            for line in answer.stdout.splitlines():
                fields = line.split()
                marker = fields.pop(0) if line.startswith("@") else ""
                if line.startswith("#") or len(fields) < 3 or marker == "@cert-authority":
                    continue
                keys = revoked if marker == "@revoked" else trusted
                keys.append(HostKey(fields[1], fields[2]))
        return trusted, revoked

    def add(self, target: SshTarget, key: HostKey) -> None:
        """Trust a key from now on."""
        path = target.known_hosts[0].resolve()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock:
            text, mode = "", 0o600
            if path.exists():
                text, mode = path.read_text(), path.stat().st_mode & 0o777
            if text and not text.endswith("\n"):
                text += "\n"
            write_atomically(path, f"{text}{target.lookup} {key.kind} {key.blob}\n", mode)
