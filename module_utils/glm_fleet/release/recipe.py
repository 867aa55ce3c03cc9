# SPDX-License-Identifier: Apache-2.0
"""What makes a release what it is: its inputs, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from ..core.files import sha256_file
from .git import without_secret
from .wheel import local_version

# Raise it when the same inputs give another release.
COMPILER = 2
RELEASE_SCHEMA = "glm-fleet/release/1"
DISTRIBUTION = "vllm"
# How a release is proven changes none of its bytes.
PROVING = ("proofs", "proof_packages", "compute_capabilities", "model_shapes")
# Parts of the source that 0.1.0 did not know: while they are empty, its release is the same.
_LATER = ("corrections", "accepted_faults")


@dataclass(frozen=True)
class Recipe:
    """The resolved inputs of one release."""

    inputs: Mapping[str, Any]
    version: str
    slug: str

    @property
    def key(self) -> str:
        """First 16 hex digits of the digest of the inputs that decide what a node gets."""
        return inputs_key(self.inputs)

    def proven_by(self, inputs: Mapping[str, Any]) -> bool:
        """Tell whether a release made of these inputs was proven as this recipe asks for."""
        return not self.inputs.get("proofs") or all(
            inputs.get(name) == self.inputs.get(name) for name in PROVING
        )


def inputs_key(inputs: Mapping[str, Any]) -> str:
    """Return the key of resolved inputs, as a recipe or the manifest of a release has them.

    The key stands in the release, so another key is another release and restarts every engine.
    """
    source = inputs.get("source")
    if isinstance(source, Mapping):
        source = {name: value for name, value in source.items() if value or name not in _LATER}
    decisive = {name: value for name, value in inputs.items() if name not in PROVING}
    canonical = json.dumps({**decisive, "source": source}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def make_recipe(
    *,
    source: Mapping[str, Any],
    base_wheel: Mapping[str, Any],
    variant: str,
    settings: Mapping[str, Any],
    find_links: Sequence[str],
    made_of: str = "",
) -> Recipe:
    """Put the resolved source, the base wheel and the settings together.

    ``source`` has url, ref, sha and pull_requests (number, head, drop); ``base_wheel``
    file, name, version and sha256; ``settings`` everything else that decides the result.
    ``made_of`` is the commit of the base wheel where that is an ancestor of the ref.
    """
    pulls = [(int(each["number"]), str(each["head"])) for each in source["pull_requests"]]
    # The version of a release says what it is made of; that of an ancestor's wheel does not.
    sha = str(source["sha"])
    at = "" if pulls and made_of in ("", sha) else sha
    version = local_version(str(base_wheel["version"]), variant, pulls, at=at)
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
