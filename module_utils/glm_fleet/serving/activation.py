# SPDX-License-Identifier: Apache-2.0
"""Putting a deployment in place: what differs, and the files and links that it takes."""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

from ..artifact.link import point_link
from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.runner import Runner
from .command import differences
from .deployment import ENVIRONMENT, POLICY, UNIT, Deployment, Deployments, Places
from .record import digest


def compare(running: Mapping[str, Any], wanted: Deployment, before: Deployment | None) -> list[str]:
    """Say what a restart would change, in words: [] when the node runs what it should.

    ``running`` is what `attest.read_running` gives; ``before`` is the current deployment,
    by which a change of the command line can be named flag by flag.
    """
    words = differences(running, wanted.digests)
    record = running.get("record") or {}
    known = (
        before
        if before and before.digests == {key: record.get(key) for key in before.digests}
        else None
    )
    if known is None:
        return words
    replaced = []
    for text in words:
        if text == "the unit or its command line":
            replaced += unit_changes(known.unit, wanted.unit)
        elif text == "the environment":
            replaced.append(environment_changes(known.environment, wanted.environment))
        else:
            replaced.append(text)
    return replaced


def _options(unit: str) -> tuple[dict[str, str], str]:
    """Return the options of ``ExecStart=`` with their values, and the unit without them."""
    joined = unit.replace("\\\n", " ")
    options: dict[str, str] = {}
    rest = []
    for line in joined.splitlines():
        if not line.startswith("ExecStart="):
            rest.append(line)
            continue
        name = ""
        for word in shlex.split(line.partition("=")[2]):
            if word.startswith("--"):
                name, _, value = word.partition("=")
                options[name] = value
            elif name:
                options[name] = f"{options[name]} {word}".strip()
    return options, "\n".join(rest)


def unit_changes(old: str, new: str) -> list[str]:
    """Name the flags of the command line that differ, and the rest of the unit if it does."""
    (flags_before, rest_before), (flags_after, rest_after) = _options(old), _options(new)
    changes = []
    for flag in sorted({*flags_before, *flags_after}):
        before, after = flags_before.get(flag), flags_after.get(flag)
        if before == after:
            continue
        if before is None:
            changes.append(f"{flag} {after}".strip() + " added")
        elif after is None:
            changes.append(f"{flag} removed")
        else:
            changes.append(f"{flag} {before or 'on'} -> {after or 'on'}")
    if rest_before != rest_after:
        changes.append("the unit")
    return changes or ["the unit or its command line"]


def environment_changes(old: str, new: str) -> str:
    """Name the variables that differ, never their values: one of them may be a key."""

    def variables(text: str) -> dict[str, str]:
        pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
        return {name: value for name, sign, value in pairs if sign}

    before, after = variables(old), variables(new)
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return f"environment: {', '.join(names)}" if names else "the environment"


def activate(
    runner: Runner,
    deployments: Deployments,
    identifier: str,
    *,
    attested_now: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Stop what runs, switch everything to the deployment, and start it.

    The node must be drained. ``attested_now`` says whether the very start that runs was
    attested, so that it may still answer requests. Returns {stop_s, switch_s} in seconds; the
    start goes on when this returns. Raises `FleetError` with nothing changed when a part is
    not on the node. A run that was cut off is repeated as a whole.
    """
    places = deployments.places
    wanted = deployments.read(identifier)
    missing = deployments.obstacles(identifier)
    if missing:
        raise FleetError(
            "The deployment cannot be activated",
            expected=f"release {wanted.release} and model {wanted.model} on this node",
            found="; ".join(missing),
            remedy="run site.yml, which brings what is missing",
        )
    begun = clock()
    stop_engine(runner, attested_now=attested_now)
    stopped = clock()
    mend_links(wanted, places)
    install(wanted, places)
    deployments.note_previous()
    runner(["systemctl", "daemon-reload"])
    runner(["systemctl", "reset-failed", UNIT], check=False)
    runner(["systemctl", "enable", UNIT])
    # Not waited for: the attestation watches the start, and says what became of it.
    runner(["systemctl", "start", "--no-block", UNIT])
    return {"stop_s": round(stopped - begun, 2), "switch_s": round(clock() - stopped, 2)}


def stop_engine(runner: Runner, *, attested_now: bool) -> None:
    """Stop what runs; the node must be drained. See `activate` for ``attested_now``."""
    if not attested_now:
        # A start that is still under way serves nobody, and its server does not answer SIGTERM
        # before its engine is up: the stop would last as long as a drain may.
        runner(["systemctl", "kill", "--signal=SIGTERM", UNIT], check=False)
    runner(["systemctl", "stop", UNIT], check=False)


def wrong_links(wanted: Deployment, places: Places) -> dict[Path, Path]:
    """Return {link: where it should lead} of the links that do not lead to a deployment."""
    targets = {
        places.deployments / "current": places.deployments / wanted.id,
        places.release_link: places.releases / wanted.release,
        places.model_link: places.models / wanted.model,
    }
    return {
        link: target
        for link, target in targets.items()
        if not link.is_symlink() or link.readlink() != target
    }


def mend_links(wanted: Deployment, places: Places, *, check_mode: bool = False) -> list[str]:
    """Point the links at the deployment that runs; say which were wrong, and how.

    A folder in the place of a link is moved aside: it may be somebody's. Nothing restarts: what
    runs has its files open, and the next start goes by the links.
    """
    said = []
    for link, target in wrong_links(wanted, places).items():
        if link.is_symlink():
            said.append(f"{link} led to {link.readlink()}")
        elif link.exists():
            said.append(f"{link} was no link; what is there is moved to {_aside(link)}")
        else:
            said.append(f"{link} was missing")
        if check_mode:
            continue
        if link.exists() and not link.is_symlink():
            link.rename(_aside(link))
        point_link(link, target)
    return said


def _aside(path: Path) -> Path:
    numbers = (path.with_name(f"{path.name}.aside-{each}") for each in itertools.count(1))
    return next(each for each in numbers if not each.exists())


def install(wanted: Deployment, places: Places) -> None:
    """Write the files of a deployment to where systemd, vLLM and the attestation read them."""
    places.etc.mkdir(parents=True, exist_ok=True)
    write_atomically(places.units / UNIT, wanted.unit)
    write_atomically(places.etc / ENVIRONMENT, wanted.environment, 0o640)
    if os.geteuid() == 0:
        shutil.chown(places.etc / ENVIRONMENT, "root", places.group)
    install_policy(wanted, places)


def install_policy(wanted: Deployment, places: Places, *, check_mode: bool = False) -> bool:
    """Write what the attestation expects; tell whether that changed."""
    path = places.etc / POLICY
    if path.is_file() and digest(path) == hashlib.sha256(wanted.policy.encode()).hexdigest():
        return False
    if not check_mode:
        write_atomically(path, wanted.policy)
    return True
