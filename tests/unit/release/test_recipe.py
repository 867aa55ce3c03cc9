# SPDX-License-Identifier: Apache-2.0
"""What makes a release another one: what decides its bytes, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from glm_fleet.artifact.store import Store
from glm_fleet.release.assembly import assemble, published_release
from glm_fleet.release.recipe import Recipe, inputs_key, make_recipe

# The inputs of a release that version 0.1.0 made, and the key that it gave them.
MADE_BEFORE: dict[str, Any] = {
    "backend": "TRITON_MLA_SPARSE",
    "base_wheel": {"file": "v-1.whl", "name": "vllm", "sha256": "ad44", "version": "0.32.0"},
    "base_wheel_exceptions": ["vllm/platforms/__init__.py"],
    "compiler": 2,
    "constraints": [],
    "drop_requirements": [],
    "exclude_newer": "2026-10-25",
    "expected": {"torch": "2.13.0+cpu", "triton": ""},
    "find_links": [],
    "index_url": "",
    "index_urls": [],
    "installer": "uv==0.13.9",
    "platform": "x86_64-manylinux_2_36",
    "python_version": "3.11",
    "source": {
        "pull_requests": [{"drop": [], "head": "f6d0", "number": 38476, "squash": False}],
        "ref": "v0.32.0",
        "resolutions": {},
        "sha": "dbda",
        "url": "git://hub/vllm.git",
    },
    "variant": "cpu",
}
KEY_BEFORE = "74dcc80eff383d71"
PROVEN: dict[str, Any] = {
    "proofs": True,
    "proof_packages": ["triton==3.6.0"],
    "compute_capabilities": ["8.0"],
    "model_shapes": {},
}


def recipe(source: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    """Return the recipe of today with the inputs from before, and what came since."""
    given = ("compiler", "source", "base_wheel", "variant", "find_links")
    return make_recipe(
        source={
            "corrections": {},
            "accepted_faults": [],
            **MADE_BEFORE["source"],
            **(source or {}),
        },
        base_wheel=MADE_BEFORE["base_wheel"],
        variant=MADE_BEFORE["variant"],
        settings={
            **{name: value for name, value in MADE_BEFORE.items() if name not in given},
            **PROVEN,
            **settings,
        },
        find_links=[],
    )


def publish(store: Store, folder: Path, made: Recipe) -> str:
    """Publish a release of this recipe and return its id."""
    report = {"source": {}, "wheel": {}, "against_source": {}, "pins": {}, "proofs": {}}
    provenance = assemble(folder, recipe=made, lock="", wheels=[], tools=[], report=report)
    return store.adopt(folder, kind="release", slug=made.slug, provenance=provenance).id


def test_the_same_inputs_are_the_same_release_as_before_there_were_proofs() -> None:
    assert inputs_key(MADE_BEFORE) == KEY_BEFORE
    assert recipe().key == KEY_BEFORE


@pytest.mark.parametrize(
    "settings",
    [{"proofs": False}, {"compute_capabilities": ["8.0", "9.0"]}, {"proof_packages": []}],
)
def test_how_a_release_is_proven_makes_it_no_other(settings: dict[str, Any]) -> None:
    assert recipe(**settings).key == recipe().key


@pytest.mark.parametrize("part", [{"corrections": {"a": "1"}}, {"accepted_faults": ["a"]}])
def test_what_is_corrected_or_accepted_makes_it_another(part: dict[str, Any]) -> None:
    assert recipe(part).key != recipe().key
    assert recipe(exclude_newer="2026-11-01").key != recipe().key


def test_a_release_that_was_not_proven_as_asked_is_made_again_under_its_name(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "store")
    unproven = recipe(proofs=False)
    first = publish(store, tmp_path / "first", unproven)
    found = published_release(store, unproven)
    assert found is not None
    assert found.id == first
    assert published_release(store, recipe()) is None
    assert publish(store, tmp_path / "again", recipe()) == first
    for each in (recipe(), unproven):
        found = published_release(store, each)
        assert found is not None
        assert found.provenance["inputs"]["proofs"] is True
    assert published_release(store, recipe(compute_capabilities=["9.0"])) is None
