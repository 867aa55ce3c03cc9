# SPDX-License-Identifier: Apache-2.0
"""The commit that a branch was pinned to when the model was first fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from ..artifact.store import Store
from ..core.decode import Matching, read
from ..core.files import write_atomically
from .source import Source, is_commit

_Commit = Annotated[str, Matching(r"[0-9a-f]{40}", "a commit")]


def pinned(store: Store, source: Source) -> str:
    """Return the commit that a revision stands for on this host; empty if it was never asked.

    A branch is resolved once: the weights of a fleet never change because somebody pushed.
    """
    if is_commit(source.revision):
        return source.revision
    return str(_pins(store).get(f"{source.repository}@{source.revision}", ""))


def pin(store: Store, source: Source, commit: str) -> None:
    """Record the commit of a branch."""
    pins = _pins(store)
    name = f"{source.repository}@{source.revision}"
    if not is_commit(source.revision) and pins.get(name) != commit:
        store.root.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**pins, name: commit}, indent=1, sort_keys=True)
        write_atomically(_pins_path(store), text + "\n")


def _pins_path(store: Store) -> Path:
    return store.root / ".pins.json"


def _pins(store: Store) -> dict[str, str]:
    # Asking the hub again could move a fleet to other weights.
    remedy = "name a commit as model_revision, and remove that file"
    try:
        what = f"The list of which commits the branches stand for, {_pins_path(store)},"
        pins = read(dict[str, _Commit], _pins_path(store), what=what, remedy=remedy)
    except FileNotFoundError:
        return {}
    return dict(pins)
