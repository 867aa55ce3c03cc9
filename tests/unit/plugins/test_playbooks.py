# SPDX-License-Identifier: Apache-2.0
"""The playbooks as a whole: what imports what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
PLAYBOOKS = [ROOT / "site.yml", *sorted((ROOT / "playbooks").glob("[!_]*.yml"))]
IMPORT = "ansible.builtin.import_playbook"


def imported(playbook: Path) -> Iterator[str]:
    """Return the names of all playbooks that one runs, in order."""
    for entry in yaml.safe_load(playbook.read_text()):
        if IMPORT in entry:
            inner = playbook.parent / entry[IMPORT]
            yield inner.name
            yield from imported(inner)


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.name)
def test_the_inventory_is_checked_once_and_first(playbook: Path) -> None:
    first = yaml.safe_load(playbook.read_text())[0]
    assert Path(first[IMPORT]).name == "_inventory.yml"
    assert list(imported(playbook)).count("_inventory.yml") == 1


def test_every_phase_can_be_run_alone_as_site_runs_it() -> None:
    phases = [name for name in imported(ROOT / "site.yml") if name.startswith("_")]
    helpers = {
        "_inventory.yml", "_limit.yml", "_lock.yml", "_roll.yml", "_find_model.yml", "_repair.yml",
    }  # fmt: skip
    for phase in set(phases) - helpers:
        assert phase in imported(ROOT / "playbooks" / phase.removeprefix("_"))
