# SPDX-License-Identifier: Apache-2.0
"""Which artifacts stay, and removing the others."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ..core.decode import read
from ..core.errors import FleetError
from ..core.runner import Runner, as_user, run_program
from .store import Store

# Names the release and the model that a roll-back returns to: {"release": id, "model": id}.
PREVIOUS = "/etc/glm-fleet/previous.json"


class _Previous(TypedDict, total=False):
    release: str | None
    model: str | None


def retirable(
    published: Mapping[str, float],
    *,
    keep: int,
    protected: Collection[str],
    coming: Collection[str],
) -> list[str]:
    """Return which artifacts of a kind may go, the oldest first.

    ``published`` is {id: time of publication}. ``keep`` stay, among them all that are
    ``protected`` and, also if they are not here yet, those that are ``coming``.
    """
    held = {each for each in protected if each in published} | set(coming)
    others = sorted(
        (each for each in published if each not in held), key=lambda each: (published[each], each)
    )
    return others[: max(0, len(others) - max(0, keep - len(held)))]


@dataclass(frozen=True)
class Retired:
    """What was retired, or would be: artifacts with kind, id and bytes, and whole folders."""

    artifacts: list[dict[str, Any]]
    folders: list[str]

    @property
    def bytes(self) -> int:
        """Size of the artifacts, in bytes."""
        return sum(int(each["bytes"]) for each in self.artifacts)


def retire_old(
    store: Store,
    kinds: Iterable[str],
    *,
    keep: int,
    protected: Collection[str],
    coming: Collection[str] = (),
    companions: Sequence[Path] = (),
    dry: bool,
    now: float | None = None,
    run: Runner = run_program,
) -> Retired:
    """Retire what is above ``keep`` of each kind, and what belonged to it.

    ``companions`` are folders whose subfolders bear the id of a release: environments and
    caches. ``dry`` only tells. What another process is changing or using is left alone.
    """
    if keep < 1:
        raise FleetError(
            "At least one artifact of each kind has to stay",
            expected="artifact_keep of 1 or more",
            found=str(keep),
        )
    artifacts: list[dict[str, Any]] = []
    doomed: list[Path] = []
    for kind in kinds:
        with store.try_lock(kind) as locked:
            if not locked:
                continue
            sizes = {each.id: each.bytes for each in store.published(kind)}
            safe = {*protected, *(each for each in sizes if store.in_use(kind, each))}
            going = retirable(store.ages(kind), keep=keep, protected=safe, coming=coming)
            artifacts += [{"kind": kind, "id": each, "bytes": sizes[each]} for each in going]
            leftovers = store.stale(kind, coming, time.time() if now is None else now)
            if kind == "release":
                leftovers += [
                    path
                    for folder, each in itertools.product(companions, going)
                    if os.path.lexists(path := folder / each)
                ]
            doomed += leftovers
            if dry:
                continue
            # The artifact goes last: killed in between, the next run finds all of it again.
            for path in leftovers:
                remove_as_owner(path, run)
            for each in going:
                store.retire(kind, each)
    return Retired(artifacts, [str(path) for path in doomed])


def remove_as_owner(path: Path, run: Runner) -> None:
    """Remove a file or a folder with the rights of whoever owns the folder that it lies in.

    The caches of the engine lie in a folder of the engine's user, who can put a link to any other
    folder there while root walks down.
    """
    owner = path.parent.stat().st_uid
    if owner != 0:
        run([*as_user(str(owner)), "rm", "--recursive", "--force", "--", str(path)], cwd="/")
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def protected_by(links: Iterable[Path], previous: Path, running: Path | None = None) -> set[str]:
    """Return the ids that are active, that run, or that a roll-back needs.

    ``links`` lead to what is active; ``previous`` is a JSON file {release: id, model: id}, and so
    is ``running``, which the start of what runs wrote: a link can be gone or be a folder.
    """
    found = {link.readlink().name for link in links if link.is_symlink()}
    for path in (running, previous):
        if path is None:
            continue
        try:
            known = read(_Previous, path)
        except FileNotFoundError:
            continue
        except FleetError as error:
            raise _unclear(path, error.found) from error
        if known and not {"release", "model"} & set(known):
            # {} says that there is nothing to go back to; this is of another version.
            raise _unclear(path, ", ".join(sorted(known))[:80])
        found |= {each for each in (known.get("release"), known.get("model")) if each}
    return found


def _unclear(path: Path, found: str) -> FleetError:
    return FleetError(
        "It cannot be told what a roll-back needs, so nothing is retired",
        expected=f"JSON with release and model in {path}",
        found=found,
        remedy="the next turn of this node writes that file anew",
    )
