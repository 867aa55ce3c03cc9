# SPDX-License-Identifier: Apache-2.0
"""What is installed in the environment of a release, compared with what was installed.

Each package keeps the list of its files (RECORD: path, SHA-256, size). The note that a build
leaves names the digest of every list, so that a list that is changed or gone is seen too. Sizes
are looked at always; bytes where a file was touched after the build, or all of them when asked.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ..artifact.hashes import Damage
from ..core.decode import Count, read
from ..core.errors import FleetError
from ..core.files import sha256_file, write_atomically
from ..core.format import parse_count

# A folder without this file was not finished: it is removed and built again.
COMPLETE = "glm-fleet-release.json"
# What a thorough look found, so that the next quick one knows.
_FOUND = "glm-fleet-damage.json"
_RECORDS = "lib/python*/site-packages/*.dist-info/RECORD"
# More files than this were not changed by hand: the whole folder was copied or restored.
_MOST_TOUCHED = 500


@dataclass(frozen=True)
class Installed:
    """One file of a package, by its path below the environment; ``size`` None is not known."""

    path: str
    size: int | None
    sha256: str


class Note(TypedDict, total=False):
    """What a build leaves: release, digests of lists of files by package, and when it ended."""

    release: str
    records: Mapping[str, str]
    sealed_ns: Count


def read_note(environment: Path) -> Note:
    """Return the note of the build, {} without one."""
    try:
        return read(Note, environment / COMPLETE)
    except (FileNotFoundError, FleetError):
        return {}


def is_complete(environment: Path, release: str) -> bool:
    """Tell whether the environment was built to its end from this release."""
    return bool(read_note(environment).get("release") == release)


def record_digests(environment: Path) -> dict[str, str]:
    """Return {package folder: SHA-256 of its list of files}."""
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(environment.glob(_RECORDS))
    }


def find_damage(environment: Path, *, deep: bool = False) -> list[Damage]:
    """Return what is missing, changed or leads nowhere; with ``deep`` every byte is read."""
    note = read_note(environment)
    if not note:
        return [Damage(COMPLETE, "missing", "the environment was not built to its end")]
    found = list(_damaged_lists(environment, note))
    python = environment / "bin/python"
    if python.is_symlink() and not python.exists():
        found.append(Damage("bin/python", "dangling", str(python.readlink())))
    sealed_ns = note.get("sealed_ns", 0)
    touched: list[Installed] = []
    for file in _installed(environment):
        try:
            status = (environment / file.path).stat()
        except OSError:
            found.append(Damage(file.path, "missing", "no such file"))
            continue
        if file.size is not None and status.st_size != file.size:
            found.append(Damage(file.path, "changed", f"{status.st_size} of {file.size} bytes"))
        elif file.sha256 and (deep or (sealed_ns and status.st_ctime_ns > sealed_ns)):
            touched.append(file)
    if deep or len(touched) <= _MOST_TOUCHED:
        found += _changed(environment, touched)
    known = {each.path for each in found}
    found += [each for each in _found_before(environment) if each.path not in known]
    return found


def note_damage(environment: Path, damage: list[Damage]) -> None:
    """Leave what a thorough look found for the quick ones; a build removes it with the folder."""
    if damage:
        text = json.dumps([vars(each) for each in damage], indent=1)
        write_atomically(environment / _FOUND, f"{text}\n")
    else:
        (environment / _FOUND).unlink(missing_ok=True)


def seal(environment: Path, note: Mapping[str, Any]) -> None:
    """Write the note of a build that ended: what was installed, and when it was all there."""
    status = environment.stat()
    newest = max(
        ((environment / file.path).stat().st_ctime_ns for file in _existing(environment)),
        default=status.st_ctime_ns,
    )
    sealed = {**note, "records": record_digests(environment), "sealed_ns": newest}
    write_atomically(environment / COMPLETE, json.dumps(sealed, indent=1) + "\n")


def _existing(environment: Path) -> Iterator[Installed]:
    return (file for file in _installed(environment) if (environment / file.path).exists())


def _damaged_lists(environment: Path, note: Note) -> Iterator[Damage]:
    wanted = note.get("records", {})
    known = record_digests(environment) if wanted else {}
    for name, digest in wanted.items():
        if name not in known:
            yield Damage(f"{name}/RECORD", "missing", "no such file")
        elif known[name] != digest:
            yield Damage(f"{name}/RECORD", "changed", f"SHA-256 {known[name][:12]}…")


def _installed(environment: Path) -> Iterator[Installed]:
    """Yield the files of every package, but for what Python compiles by itself."""
    for record in sorted(environment.glob(_RECORDS)):
        site = record.parents[1]
        try:
            rows = list(csv.reader(record.read_text().splitlines()))
        except (OSError, UnicodeDecodeError, csv.Error):
            continue  # its digest says so
        for row in rows:
            if len(row) != 3 or row[0].endswith((".pyc", "/RECORD")):
                continue
            path = os.path.relpath(os.path.normpath(site / row[0]), environment)
            if not path.startswith(".."):
                yield Installed(path, parse_count(row[2]), _hex(row[1]))


def _hex(text: str) -> str:
    """Turn ``sha256=`` and base64 into hex, '' for anything else."""
    kind, _, value = text.partition("=")
    if kind != "sha256":
        return ""
    try:
        return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
    except (ValueError, binascii.Error):
        return ""


def _changed(environment: Path, files: list[Installed]) -> Iterator[Damage]:
    for file in files:
        try:
            digest = sha256_file(environment / file.path)
        except OSError as error:
            yield Damage(file.path, "unreadable", str(error))
            continue
        if digest != file.sha256:
            yield Damage(file.path, "changed", f"SHA-256 {digest[:12]}…")


def _found_before(environment: Path) -> list[Damage]:
    try:
        return read(list[Damage], environment / _FOUND)
    except (FileNotFoundError, FleetError):
        return []
