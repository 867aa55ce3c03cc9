# SPDX-License-Identifier: Apache-2.0
"""Taking over a folder of weights that is already there."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from ..artifact.hashes import Damage
from ..artifact.manifest import MANIFEST, FileEntry, Manifest, artifact_id, load_manifest
from ..artifact.store import Store
from ..core.decode import read
from ..core.errors import FleetError, from_os_error
from ..core.files import link_or_copy, sha256_file
from ..core.progress import Meter
from .source import INDEX, KIND, SHA256, Source, describe, git_blob_id, is_commit, model_slug

# What the client leaves beside the files that it downloaded to a folder.
CLIENT_RECORDS = Path(".cache/huggingface/download")


class _Index(TypedDict):
    weight_map: Mapping[str, str]


def folder_manifest(folder: Path, source: Source, given: Path | None, meter: Meter) -> Manifest:
    """Return what a folder should hold, told by what was brought with it.

    ``given`` or ``manifest.json`` in the folder is a manifest of ours, from another fleet;
    else the records that the hub's client leaves beside the files it downloads.
    """
    if given or (folder / MANIFEST).is_file():
        manifest = _given_manifest(given or folder / MANIFEST)
    else:
        manifest = _recorded_manifest(folder, source, meter)
    found = {key: manifest.provenance.get(key) for key in ("repository", "revision")}
    wanted = {"repository": source.repository, "revision": source.revision}
    if not is_commit(source.revision):
        wanted["revision"] = str(found["revision"])
    foreign = [entry.path for entry in manifest.files if not source.selects(entry.path)]
    if found != wanted or foreign:
        raise FleetError(
            "The folder holds another model",
            expected=f"{source.repository} at {source.revision}",
            found=f"{found['repository']} at {found['revision']}"
            + (f", with {', '.join(foreign[:3])}" if foreign else ""),
            remedy="correct model_folder, model_revision, or the patterns",
        )
    provenance = describe(source, wanted["revision"])
    return Manifest(KIND, manifest.id, manifest.files, {**provenance, "endpoint": ""})


def adopt(store: Store, manifest: Manifest, folder: Path, meter: Meter) -> list[Damage]:
    """Take the files of a manifest from a folder, by hard links where that is possible.

    Returns the files that are not there as they should be; the others are staged.
    """
    store.stage(manifest)
    missing = store.missing(manifest)
    work = store.work_path(KIND, manifest.id)
    work.mkdir(parents=True, exist_ok=True)
    meter.what = "verifying the folder"
    meter.total = sum(entry.size for entry in missing)
    meter.start(0)

    def take(entry: FileEntry) -> Damage | None:
        # The client's cache is made of symbolic links to the files.
        path = (folder / entry.path).resolve()
        if not path.is_file():
            return Damage(entry.path, "missing", "no such file")
        size = path.stat().st_size
        if size != entry.size:
            reason = "truncated" if size < entry.size else "changed"
            return Damage(entry.path, reason, f"{size} of {entry.size} bytes")
        part = work / f"{urllib.parse.quote(entry.path, safe='')}.adopted"
        link_or_copy(path, part)
        digest = store.receive(manifest, entry, part, meter.add)
        if digest == entry.sha256:
            return None
        part.unlink()
        return Damage(entry.path, "changed", f"SHA-256 {digest[:12]}…")

    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return [each for each in pool.map(take, missing) if each]
    except OSError as error:
        raise from_os_error(error) from error


def damaged_folder(folder: Path, damage: Sequence[Damage]) -> FleetError:
    """Return the error for a folder that is not what it should be."""
    return FleetError(
        "The folder does not hold the model",
        expected=f"every file in {folder} with its SHA-256",
        found="; ".join(str(each) for each in damage[:10]),
        remedy="bring these files again, then run again: the others are kept",
        details={"damage": [vars(each) for each in damage]},
    )


def _given_manifest(path: Path) -> Manifest:
    try:
        return load_manifest(path.parent, path.name)
    except FleetError as error:
        raise FleetError(
            "The manifest that came with the model cannot be used",
            expected=f"a manifest.json of glm-fleet in {path}",
            found=error.found or error.message,
            remedy="bring the manifest.json of a published model, or remove it",
        ) from error


def _recorded_manifest(folder: Path, source: Source, meter: Meter) -> Manifest:
    """Make a manifest of the client's records: commit and digest of each file, line by line."""
    records = {}
    base = folder / CLIENT_RECORDS
    for path in sorted(base.rglob("*.metadata")):
        name = path.relative_to(base).as_posix()[: -len(".metadata")]
        lines = path.read_text(errors="replace").split()
        if source.selects(name) and len(lines) >= 2:
            records[name] = (lines[0], lines[1])
    commits = {commit for commit, _ in records.values()}
    if len(commits) != 1:
        raise FleetError(
            "Nothing tells what the folder should hold",
            expected=f"an answer of the hub, {MANIFEST}, or the client's records of one commit "
            f"in {base}",
            found=f"records of {len(commits)} commits" if commits else "none of them",
            remedy="bring the folder as `hf download --local-dir` leaves it, with its .cache, or "
            "set model_manifest",
        )
    (commit,) = commits
    meter.what = "reading the records of the folder"
    files = []
    wrong = []
    for name, (_, digest) in records.items():
        path = folder / name
        if not path.is_file():
            wrong.append(Damage(name, "missing", "no such file"))
        elif SHA256.fullmatch(digest):
            files.append(FileEntry(name, path.stat().st_size, digest))
        elif git_blob_id(path) == digest:
            files.append(FileEntry(name, path.stat().st_size, sha256_file(path)))
        else:
            wrong.append(Damage(name, "changed", "another git object id"))
    known = {file.path for file in files}
    index = folder / INDEX
    shards = read(_Index, index)["weight_map"].values() if INDEX in known else ()
    wrong += [
        Damage(name, "missing", f"named by {INDEX}")
        for name in sorted(set(shards) - set(records))
        if source.selects(name)
    ]
    if wrong:
        raise damaged_folder(folder, wrong)
    slug = model_slug(source.repository, commit)
    provenance = describe(source, commit)
    return Manifest(KIND, artifact_id(slug, files), tuple(files), provenance)
