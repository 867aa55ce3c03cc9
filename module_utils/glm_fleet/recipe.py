# SPDX-License-Identifier: Apache-2.0
"""What a release is made of: its inputs, their key, and the folder that becomes an artifact.

The key is the digest of every input after it was resolved (commits, hashes), so the same
key means the same release and nothing has to be built. Nothing here knows the time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifact import MANIFEST, Manifest, Store, sha256_file
from .errors import FleetError
from .lock import gather
from .source import without_secret
from .wheel import local_version

# Raise it when the same inputs give another release.
COMPILER = 2
RELEASE_SCHEMA = "glm-fleet/release/1"
DISTRIBUTION = "vllm"


@dataclass(frozen=True)
class Recipe:
    """The resolved inputs of one release."""

    inputs: Mapping[str, Any]
    version: str
    slug: str

    @property
    def key(self) -> str:
        """First 16 hex digits of the digest of the inputs."""
        canonical = json.dumps(self.inputs, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def make_recipe(
    *,
    source: Mapping[str, Any],
    base_wheel: Mapping[str, Any],
    variant: str,
    settings: Mapping[str, Any],
    find_links: Sequence[str],
) -> Recipe:
    """Put the resolved source, the base wheel and the settings together.

    ``source`` has url, ref, sha and pull_requests (number, head, drop); ``base_wheel``
    file, name, version and sha256; ``settings`` everything else that decides the result.
    """
    pulls = [(int(each["number"]), str(each["head"])) for each in source["pull_requests"]]
    version = local_version(str(base_wheel["version"]), variant, pulls)
    inputs = {
        "compiler": COMPILER,
        "source": dict(source),
        "base_wheel": {key: base_wheel[key] for key in ("file", "name", "version", "sha256")},
        "variant": variant,
        **settings,
        "index_url": without_secret(str(settings.get("index_url") or "")),
        "index_urls": [without_secret(str(each)) for each in settings.get("index_urls") or []],
        "find_links": [_describe_place(place) for place in find_links],
    }
    public = str(base_wheel["version"]).partition("+")[0]
    parts = [DISTRIBUTION, public, *([variant] if variant else [])]
    parts += [f"pr{number}" for number, _ in pulls]
    return Recipe(inputs, version, "-".join(parts).lower())


def _describe_place(place: str) -> object:
    """Describe a folder by its wheels and not by its path: another host names it otherwise."""
    folder = Path(place)
    if "://" in place:
        return without_secret(place)
    if not folder.is_dir():
        raise FleetError(
            "A place to look for wheels does not exist",
            expected=f"the folder {place} on the builder",
            found="no such folder",
            remedy="correct release_find_links",
        )
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.whl"))}


def find_published(store: Store, key: str) -> Manifest | None:
    """Return the published release made of the same inputs, if its files are all there."""
    for manifest in store.published("release"):
        if manifest.provenance.get("inputs_key") == key and store.is_published(manifest):
            return manifest
    return None


def retire_releases(root: Path, current: str, keep: int, *, dry: bool) -> list[str]:
    """Retire all but the ``keep`` releases that were published last; return their ids.

    The one that is current counts and is never retired. ``dry`` only tells.
    """
    store = Store(root)
    folders = {
        each.id: store.published_path("release", each.id) for each in store.published("release")
    }
    by_age = sorted(
        (each for each in folders if each != current),
        key=lambda each: ((folders[each] / MANIFEST).stat().st_mtime, each),
        reverse=True,
    )
    doomed = by_age[max(0, keep - 1) :]
    for identifier in [] if dry else doomed:
        store.retire("release", identifier)
    return sorted(doomed)


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

    ``report`` has what the steps gave: source, wheel, against_source and pins. Layout:
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
        "inputs_key": recipe.key,
        "inputs": dict(recipe.inputs),
        "version": recipe.version,
        **report["source"],
        # Where the wheel lay is not where it came from.
        "wheel": {key: value for key, value in report["wheel"].items() if key != "path"},
        "against_source": report["against_source"],
        "pins": report["pins"],
    }
