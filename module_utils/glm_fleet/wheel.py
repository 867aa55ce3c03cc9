# SPDX-License-Identifier: Apache-2.0
"""Overlaying changed Python files on a wheel, without unpacking it.

Members that do not change are copied as the compressed bytes they are, through a small
buffer; so memory does not grow with the wheel, and time is that of copying the file.
Members that change are stored without compression: they are few, and the bytes of the
result then do not depend on anybody's zlib.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .artifact import sha256_file
from .errors import FleetError

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_BLOCK = 1024 * 1024
_LIMIT = 0xFFFFFFFF
_UTF8 = 0x800
_DESCRIPTOR = 0x8
# 1980-01-01 00:00, the first date that a zip can hold.
_DATE = 0x21
_FILE_MODE = 0o100644 << 16
# setuptools-scm writes it at every build; some source trees carry the one of their own.
_GENERATED = "vllm/_version.py"
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


def local_version(base: str, variant: str, pulls: Sequence[tuple[int, str]]) -> str:
    """Label a version: ``0.23.0`` -> ``0.23.0+[variant.]pr38476.g3740c02``.

    A local label that the base has stays in front.
    """
    public, _, label = base.partition("+")
    parts = [label] if label else []
    if variant and variant not in label.split("."):
        parts.append(variant)
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
            metadata = archive.read(f"{_dist_info(archive)}/METADATA").decode()
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


def _dist_info(archive: zipfile.ZipFile) -> str:
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


def _edit_metadata(metadata: str, name: str, version: str, drop: Sequence[str]) -> str:
    """Rewrite Name and Version and leave out the requirements named in ``drop``."""
    head, separator, body = metadata.partition("\n\n")
    unwanted = {canonical(each) for each in drop}
    lines = []
    found = set()
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        if key == "Requires-Dist" and requirement_name(value) in unwanted:
            found.add(requirement_name(value))
            continue
        lines.append({"Name": f"Name: {name}", "Version": f"Version: {version}"}.get(key, line))
    if unwanted - found:
        raise FleetError(
            "A requirement to drop is not one of the base wheel",
            expected="names that stand in its Requires-Dist",
            found=", ".join(sorted(unwanted - found)),
            remedy="correct release_drop_requirements",
        )
    return "\n".join(lines) + separator + body


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


def _edit_wheel(text: str, tags: str) -> str:
    """Make the tags in the file WHEEL those of the file name, by which installers choose."""
    interpreters, abis, platforms = (part.split(".") for part in tags.split("-"))
    wanted = {
        f"Tag: {interpreter}-{abi}-{platform}"
        for interpreter in interpreters
        for abi in abis
        for platform in platforms
    }
    lines = text.splitlines()
    if {line for line in lines if line.startswith("Tag: ")} == wanted:
        return text
    kept = [line for line in lines if line.strip() and not line.startswith("Tag: ")]
    return "\n".join([*kept, *sorted(wanted)]) + "\n"


@dataclass(frozen=True)
class _Member:
    """One entry for the central directory of the new wheel."""

    name: bytes
    flags: int
    method: int
    time: int
    date: int
    crc: int
    compressed: int
    size: int
    attributes: int
    system: int
    offset: int


class _Writer:
    """Writes a zip file from front to back, without ZIP64."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._members: list[_Member] = []

    def copy(self, source: BinaryIO, info: zipfile.ZipInfo, name: str) -> None:
        """Copy a member's compressed bytes as they are, under ``name``."""
        source.seek(info.header_offset)
        header = _LOCAL.unpack(source.read(_LOCAL.size))
        source.seek(header[9] + header[10], os.SEEK_CUR)
        year, month, day, hour, minute, second = info.date_time
        self._begin(
            name,
            # Sizes stand in the header here, so no data descriptor follows.
            flags=info.flag_bits & ~_DESCRIPTOR & ~_UTF8,
            method=info.compress_type,
            time=hour << 11 | minute << 5 | second // 2,
            date=(year - 1980) << 9 | month << 5 | day,
            crc=info.CRC,
            compressed=info.compress_size,
            size=info.file_size,
            attributes=info.external_attr,
            system=info.create_system,
        )
        left = info.compress_size
        while left:
            block = source.read(min(left, _BLOCK))
            if not block:
                raise zipfile.BadZipFile(f"{name} ends too early")
            self._stream.write(block)
            left -= len(block)

    def add(self, name: str, content: bytes) -> None:
        """Store a new member, with a fixed date and mode."""
        self._begin(
            name,
            flags=0,
            method=zipfile.ZIP_STORED,
            time=0,
            date=_DATE,
            crc=zlib.crc32(content),
            compressed=len(content),
            size=len(content),
            attributes=_FILE_MODE,
            system=3,
        )
        self._stream.write(content)

    def _begin(
        self,
        name: str,
        *,
        flags: int,
        method: int,
        time: int,
        date: int,
        crc: int,
        compressed: int,
        size: int,
        attributes: int,
        system: int,
    ) -> None:
        encoded = name.encode()
        if len(encoded) != len(name):
            flags |= _UTF8
        offset = self._stream.tell()
        if max(offset, compressed, size) >= _LIMIT:
            raise FleetError(
                "The base wheel is too large to be overlaid",
                expected="less than 4 GiB",
                found=f"{name} at {offset} bytes with {size} bytes",
            )
        member = _Member(
            encoded, flags, method, time, date, crc, compressed, size, attributes, system, offset
        )
        self._members.append(member)
        self._stream.write(
            _LOCAL.pack(
                b"PK\x03\x04",
                20,
                flags,
                method,
                time,
                date,
                crc,
                compressed,
                size,
                len(encoded),
                0,
            )
        )
        self._stream.write(encoded)

    def finish(self) -> None:
        """Write the central directory."""
        start = self._stream.tell()
        for member in self._members:
            self._stream.write(
                _CENTRAL.pack(
                    b"PK\x01\x02",
                    member.system << 8 | 20,
                    20,
                    member.flags,
                    member.method,
                    member.time,
                    member.date,
                    member.crc,
                    member.compressed,
                    member.size,
                    len(member.name),
                    0,
                    0,
                    0,
                    0,
                    member.attributes,
                    member.offset,
                )
            )
            self._stream.write(member.name)
        end = self._stream.tell()
        count = len(self._members)
        self._stream.write(_END.pack(b"PK\x05\x06", 0, 0, count, count, end - start, start, 0))


def _record_row(name: str, content: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(content))]


def overlay(
    base: WheelFile,
    patch: Path,
    changed: Sequence[str],
    dest: Path,
    *,
    name: str,
    version: str,
    drop_requirements: Sequence[str] = (),
) -> Path:
    """Write ``base`` with the changed files of ``patch`` as a new wheel into ``dest``.

    ``changed`` are paths of the source tree; those outside the wheel's packages (tests,
    documentation) are not part of a wheel. A path that ``patch`` lacks is removed. The
    wheel appears under its name only when it is complete.
    """
    target = dest / f"{name}-{version}-{base.tags}.whl"
    partial = target.with_name(f".{target.name}.part")
    dest.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(base.path) as archive:
        old_info = _dist_info(archive)
        infos = archive.infolist()
        metadata = archive.read(f"{old_info}/METADATA").decode()
        record = archive.read(f"{old_info}/RECORD").decode()
        wheel = archive.read(f"{old_info}/WHEEL").decode()
    new_info = f"{name}-{version}.dist-info"
    packages = {each.filename.split("/", 1)[0] for each in infos} - {old_info}
    packaged = [path for path in changed if path.split("/", 1)[0] in packages]
    new = {path: (patch / path).read_bytes() for path in packaged if (patch / path).is_file()}
    gone = set(packaged) - set(new)
    new[f"{new_info}/METADATA"] = _edit_metadata(
        metadata, name, version, drop_requirements
    ).encode()
    new_wheel = _edit_wheel(wheel, base.tags)
    if new_wheel != wheel:
        new[f"{new_info}/WHEEL"] = new_wheel.encode()
    old_rows = {row[0]: row for row in csv.reader(io.StringIO(record)) if row}
    order = [each for each in infos if not each.filename.startswith(f"{old_info}/")]
    order += [each for each in infos if each.filename.startswith(f"{old_info}/")]
    known = {each.filename for each in infos}
    added = sorted(path for path in packaged if path in new and path not in known)
    rows: list[list[str]] = []
    try:
        with base.path.open("rb") as source, partial.open("wb") as stream:
            writer = _Writer(stream)
            for info in order:
                path = info.filename
                if path in gone or path == f"{old_info}/RECORD":
                    continue
                if path.startswith(f"{old_info}/"):
                    # New files stand before the dist-info folder, which comes last.
                    while added:
                        rows.append(_add(writer, added[0], new[added.pop(0)]))
                    path = new_info + path[len(old_info) :]
                if path in new:
                    rows.append(_add(writer, path, new[path]))
                else:
                    writer.copy(source, info, path)
                    if not info.is_dir():
                        rows.append([path, *_kept_row(old_rows, info.filename)])
            rows.append([f"{new_info}/RECORD", "", ""])
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            writer.add(f"{new_info}/RECORD", text.getvalue().encode())
            writer.finish()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _add(writer: _Writer, path: str, content: bytes) -> list[str]:
    writer.add(path, content)
    return _record_row(path, content)


def _kept_row(rows: Mapping[str, list[str]], name: str) -> list[str]:
    row = rows.get(name, [])
    if len(row) != 3 or not row[1].startswith("sha256="):
        raise FleetError(
            "The RECORD of the base wheel is not complete",
            expected=f"a sha256 of {name}",
            found=",".join(row) or "no line",
            remedy="use the wheel as it was published",
        )
    return row[1:]
