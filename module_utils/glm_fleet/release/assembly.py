# SPDX-License-Identifier: Apache-2.0
"""A release as an artifact: wheel, lock and recipe in one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact.manifest import Manifest
from ..artifact.store import Store
from .recipe import DISTRIBUTION, RELEASE_SCHEMA, Recipe, inputs_key
from .wheel_lock import gather


def published_release(store: Store, recipe: Recipe) -> Manifest | None:
    """Return the published release of a recipe, if its files are all there.

    One that was not proven as the recipe asks for is made again: that gives the same release, and
    a proof.
    """
    for manifest in store.published("release"):
        inputs = manifest.provenance.get("inputs")
        if (
            isinstance(inputs, Mapping)
            and inputs_key(inputs) == recipe.key
            and recipe.proven_by(inputs)
            and store.is_published(manifest)
        ):
            return manifest
    return None


def assemble(
    folder: Path,
    *,
    recipe: Recipe,
    lock: str,
    wheels: Sequence[Path],
    tools: Sequence[Path],
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """Fill the folder that becomes the artifact; return its provenance.

    ``report`` has what the steps gave: source, wheel, against_source, pins and proofs. Layout:
    ``lock.txt``, ``wheels/``, ``tools/`` (the installer's wheel), ``release.json``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gather(wheels, folder / "wheels")
    gather(tools, folder / "tools")
    (folder / "lock.txt").write_text(lock)
    release = {
        "schema": RELEASE_SCHEMA,
        "inputs_key": recipe.key,
        "distribution": DISTRIBUTION,
        "version": recipe.version,
        "python_version": recipe.inputs["python_version"],
        "platform": recipe.inputs["platform"],
        "lock": "lock.txt",
        "wheels": "wheels",
        "tools": [path.name for path in tools],
        "entry_point": "vllm",
        "expected_imports": ["vllm"],
        "attention_backend": recipe.inputs["backend"],
        "pins": report["pins"],
    }
    (folder / "release.json").write_text(json.dumps(release, indent=1, sort_keys=True) + "\n")
    return {
        "made_by": f"glm-fleet {__version__}",
        "inputs_key": recipe.key,
        "inputs": dict(recipe.inputs),
        "version": recipe.version,
        **report["source"],
        # Where the wheel lay is not where it came from.
        "wheel": {key: value for key, value in report["wheel"].items() if key != "path"},
        "against_source": report["against_source"],
        "pins": report["pins"],
        "proofs": dict(report["proofs"]),
    }
