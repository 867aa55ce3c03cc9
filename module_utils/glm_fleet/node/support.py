# SPDX-License-Identifier: Apache-2.0
"""What somebody who helps from afar needs to see of a host, without its secrets.

Texts only, each cut to its last part. Values that are keys are taken out wherever they stand:
those that the host's own files name, and whatever looks like one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FleetError
from ..core.runner import Runner

HIDDEN = "(removed)"
_MOST_BYTES = 1_000_000
_TIMEOUT_S = 60.0
# Files whose values are secrets, so that they are found in the other texts too.
_SECRET_FILES = (
    "/etc/glm-fleet/serving.env",
    "/etc/glm-fleet/health.env",
    "/etc/haproxy/glm-fleet/nodes.map",
    "/etc/haproxy/glm-fleet/own.key",
)
_KINDS = r"(?:api[_-]?key|token|password|passwd|secret|webhook|credential)"
_ASSIGNED = re.compile(
    rf"(?i)([\w.-]*{_KINDS}[\"']?\s*[:=]\s*|--[\w-]*{_KINDS}[ =])"
    r"(\"[^\"]*\"|'[^']*'|[^\s,}\]]+)"
)
_LOOKS_SECRET = re.compile(
    r"(?i:bearer)\s+[\w.~+/=-]{8,}|\b(?:hf|sk|glm)[_-][\w-]{12,}|://[^/\s:@]+:[^/\s@]+@"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",
    re.DOTALL,
)


@dataclass(frozen=True)
class Piece:
    """One text of the archive: its name, and the command or the files that it comes from."""

    name: str
    command: Sequence[str] = ()
    pattern: str = ""


def _journal(unit: str, lines: int = 5000) -> list[str]:
    return ["journalctl", "--no-pager", "--output=short-iso", f"--lines={lines}", f"--unit={unit}"]


PIECES = (
    Piece("journal/glm-serving.txt", _journal("glm-serving.service")),
    Piece("journal/glm-sentry.txt", _journal("glm-sentry.service", 2000)),
    Piece("journal/glm-watch.txt", _journal("glm-watch.service", 2000)),
    Piece("journal/glm-helper.txt", _journal("glm-helper@*.service", 1000)),
    Piece("journal/glm-prestart.txt", _journal("glm-prestart@*.service", 1000)),
    Piece("journal/glm-swarm.txt", _journal("glm-swarm.service", 1000)),
    Piece("journal/haproxy.txt", _journal("haproxy.service", 2000)),
    Piece(
        "journal/kernel.txt",
        ["journalctl", "--no-pager", "--dmesg", "--output=short-iso", "--lines=3000"],
    ),
    Piece("units.txt", ["systemctl", "list-units", "--all", "--no-pager", "glm-*", "haproxy*"]),
    Piece("nvidia-smi.txt", ["nvidia-smi", "-q"]),
    Piece("nvidia-topology.txt", ["nvidia-smi", "topo", "-m"]),
    Piece("disks.txt", ["df", "--human-readable", "--print-type"]),
    Piece("inodes.txt", ["df", "--inodes"]),
    Piece("memory.txt", ["free", "--mebi"]),
    Piece("processes.txt", ["ps", "-eo", "user,pid,ppid,rss,stat,start,args", "--sort=-rss"]),
    Piece("listeners.txt", ["ss", "-ltnp"]),
    Piece("kernel.txt", ["uname", "-a"]),
    Piece("started", pattern="/run/glm-fleet/*.json"),
    Piece("started", pattern="/run/glm-fleet/*/*.json"),
    Piece("settings", pattern="/etc/glm-fleet/*.json"),
    Piece("deployments", pattern="/etc/glm-fleet/deployments/*/*.*"),
    Piece("deployments", pattern="/etc/glm-fleet/deployments/*.json"),
    Piece("units", pattern="/etc/systemd/system/glm-*"),
    Piece("fleet", pattern="/var/lib/glm-fleet/*.json"),
    Piece("incidents", pattern="/var/lib/glm-fleet/incidents/*/*"),
    Piece("releases", pattern="/opt/glm-fleet/releases/*/glm-fleet-*.json"),
    Piece("artifacts", pattern="/srv/glm-fleet/artifacts/release/*/release.json"),
    Piece("gateway", pattern="/etc/haproxy/haproxy.cfg"),
    Piece("gateway", pattern="/var/lib/haproxy/server-state"),
    Piece("os", pattern="/etc/os-release"),
)


def gather(run: Runner, root: Path = Path("/")) -> dict[str, str]:
    """Return {name: text} of a host, without secrets. What is not there is left out."""
    found: dict[str, str] = {}
    for piece in PIECES:
        if piece.command:
            text = _answer(run, piece.command)
            if text:
                found[piece.name] = text
            continue
        for path in sorted(root.glob(piece.pattern.lstrip("/"))):
            if path.is_file() and path.name not in ("serving.env", "clients.json"):
                name = str(path.relative_to(root)).replace("/", "_")
                found[f"{piece.name}/{name}"] = _end_of(path)
    hide = hider(known_secrets(root))
    return {name: hide(text) for name, text in found.items()}


def known_secrets(root: Path = Path("/")) -> set[str]:
    """Return the secret values that a host's own files hold."""
    values: set[str] = set()
    for file in _SECRET_FILES:
        try:
            text = (root / file.lstrip("/")).read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if file.endswith(".env"):
            pairs = (line.partition("=") for line in text.splitlines())
            values |= {
                value.strip("\"'") for name, _, value in pairs if _ASSIGNED.search(f"{name}=x")
            }
        else:
            values |= {word for line in text.splitlines() for word in line.split()[-1:]}
    return {value for value in values if len(value) >= 6}


def hider(secrets: Iterable[str]) -> Callable[[str], str]:
    """Return what takes secrets out of a text."""
    known = sorted(secrets, key=len, reverse=True)

    def hide(text: str) -> str:
        for value in known:
            text = text.replace(value, HIDDEN)
        text = _LOOKS_SECRET.sub(HIDDEN, text)
        return _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)

    return hide


def _answer(run: Runner, command: Sequence[str]) -> str:
    try:
        answer = run(list(command), timeout=_TIMEOUT_S, check=False)
    except FleetError as error:
        return "" if "missing" in error.message else f"{error}\n"
    said = answer.stdout if answer.rc == 0 else f"{answer.stdout}{answer.stderr}"
    return said[-_MOST_BYTES:]


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"{error}\n"
