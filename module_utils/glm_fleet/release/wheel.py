# SPDX-License-Identifier: Apache-2.0
"""Overlaying changed Python files on a wheel, without unpacking it.

Members that do not change are copied as the compressed bytes they are, through a small
buffer; so memory does not grow with the wheel, and time is that of copying the file.
Members that change are stored without compression: they are few, and the bytes of the
result then do not depend on anybody's zlib.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from ..core.files import sha256_file
from ..core.paths import relative_path

BLOCK = 1024 * 1024
# setuptools-scm writes it at every build; some source trees carry the one of their own.
_GENERATED = "vllm/_version.py"
# Bytes of a file that is read whole.
_LARGEST_TEXT = 64 * 1024 * 1024
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]{0,127}")
_FILE_NAME = re.compile(
    r"(?P<name>[^-]+)-(?P<version>[^-]+)(?P<build>-\d[^-]*)?"
    r"-(?P<tags>[^-]+-[^-]+-[^-]+)\.whl"
)


@dataclass(frozen=True)
class WheelFile:
    """A wheel on this host; ``requires`` are its Requires-Dist lines."""

    path: Path
    name: str
    version: str
    tags: str
    sha256: str
    requires: tuple[str, ...]

    def __post_init__(self) -> None:
        # They become parts of file names.
        for what, text in (("name", self.name), ("version", self.version)):
            if not _PLAIN.fullmatch(text):
                raise FleetError(
                    f"The {what} in {self.path.name} cannot be used",
                    expected="letters, digits and . _ + ! -",
                    found=ascii(text[:80]),
                    remedy="correct release_base_wheel",
                )

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "name": self.name,
            "version": self.version,
            "sha256": self.sha256,
        }


def canonical(name: str) -> str:
    """Normalize the name of a distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """Return the canonical name at the beginning of a requirement."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    return canonical(match.group(1)) if match else ""


def local_version(
    base: str, variant: str, pulls: Sequence[tuple[int, str]], *, at: str = ""
) -> str:
    """Label a version: ``0.23.0`` -> ``0.23.0+[variant.]pr38476.g3740c02``.

    A local label that the base has stays in front. ``at`` is the commit of the source where the
    version does not name it.
    """
    public, _, label = base.partition("+")
    parts = [label] if label else []
    if variant and variant not in label.split("."):
        parts.append(variant)
    parts += [f"at.g{at[:7]}"] if at else []
    parts += [f"pr{number}.g{head[:7]}" for number, head in pulls]
    return f"{public}+{'.'.join(parts)}"


def read_wheel(path: Path, sha256: str = "") -> WheelFile:
    """Hash a wheel, unless its hash is known, and read its metadata.

    Raises `FleetError` when it is not a wheel.
    """
    match = _FILE_NAME.fullmatch(path.name)
    try:
        sha256 = sha256 or sha256_file(path)
        with zipfile.ZipFile(path) as archive:
            check_members(archive)
            metadata = archive.read(f"{dist_info(archive)}/METADATA").decode()
    except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise FleetError(
            f"The base wheel {path} cannot be read",
            expected="a complete wheel",
            found=f"{type(error).__name__}: {error}",
            remedy="correct release_base_wheel, or remove the file so that it comes again",
        ) from error
    if match is None:
        raise FleetError(
            f"{path.name} is not the name of a wheel",
            expected="name-version-python-abi-platform.whl",
            found=path.name,
            remedy="keep the name that the wheel was published with",
        )
    headers = _headers(metadata)
    values = {key: value for key, value in headers if key in ("Name", "Version")}
    return WheelFile(
        path=path,
        name=values.get("Name", ""),
        version=values.get("Version", ""),
        tags=match["tags"],
        sha256=sha256,
        requires=tuple(value for key, value in headers if key == "Requires-Dist"),
    )


def check_members(archive: zipfile.ZipFile) -> None:
    """Refuse a wheel with a member outside its folder, or with text that nobody could read."""
    for info in archive.infolist():
        relative_path(info.filename.rstrip("/"), f"The wheel {archive.filename}")
        text = info.filename.endswith((".py", "/METADATA", "/RECORD", "/WHEEL"))
        if text and info.file_size > _LARGEST_TEXT:
            raise FleetError(
                f"A file of the wheel {archive.filename} is too large",
                expected=f"at most {_LARGEST_TEXT} bytes of text",
                found=f"{info.filename}: {info.file_size} bytes",
                remedy="correct release_base_wheel",
            )


def dist_info(archive: zipfile.ZipFile) -> str:
    folders = {
        name.split("/", 1)[0]
        for name in archive.namelist()
        if name.split("/", 1)[0].endswith(".dist-info")
    }
    if len(folders) != 1:
        raise zipfile.BadZipFile(f"{len(folders)} dist-info folders")
    return folders.pop()


def _headers(metadata: str) -> list[tuple[str, str]]:
    rows = (line.partition(": ") for line in metadata.split("\n\n", 1)[0].splitlines())
    return [(key, value) for key, _, value in rows]


def check_against_tree(
    wheel: Path,
    tree: Mapping[str, str],
    *,
    exceptions: Sequence[str] = (),
    changed: Sequence[str] = (),
) -> dict[str, int]:
    """Prove that a wheel was made of a source tree.

    ``tree`` maps path -> git blob id at the ref. Every Python file of the wheel that the
    tree has must be byte-equal to it, and every Python file of the tree below the wheel's
    packages must be in the wheel. ``exceptions`` are paths that the wheel's packager
    changed; ``changed`` are the pull request's. Returns the counts ``equal``,
    ``only_in_wheel`` and ``excepted``.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        packages = {name.split("/", 1)[0] for name in names if "/" in name}
        differing = []
        counts = {"equal": 0, "only_in_wheel": 0, "excepted": 0}
        for name in names:
            blob = tree.get(name)
            if blob is None or name == _GENERATED:
                counts["only_in_wheel"] += 1
            elif _blob_id(archive.read(name), len(blob)) == blob:
                counts["equal"] += 1
            elif name in exceptions:
                counts["excepted"] += 1
            else:
                differing.append(name)
    have = set(names)
    missing = sorted(
        path
        for path in tree
        if path.endswith(".py")
        and path.split("/", 1)[0] in packages
        and path not in have
        and path not in exceptions
    )
    if differing or missing:
        raise FleetError(
            f"The base wheel {wheel.name} was not made of this source",
            expected="every Python file byte-equal to the ref",
            found=f"{len(differing)} differ ({_some(differing)}), "
            f"{len(missing)} are missing in the wheel ({_some(missing)})",
            remedy="name the wheel of this very ref; if its packager changed single files on "
            "purpose, list them in release_base_wheel_exceptions",
            details={"differing": differing, "missing": missing},
        )
    touched = sorted(set(exceptions) & set(changed))
    if touched:
        raise FleetError(
            "The pull request changes files that the wheel's packager changed too",
            expected="no file with two changes",
            found=_some(touched),
            remedy="use a wheel whose files are those of the ref",
        )
    return counts


def _blob_id(content: bytes, length: int) -> str:
    algorithm = hashlib.sha256 if length == 64 else hashlib.sha1
    return algorithm(b"blob %d\0" % len(content) + content).hexdigest()


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"
