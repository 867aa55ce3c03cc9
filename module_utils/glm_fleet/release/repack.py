# SPDX-License-Identifier: Apache-2.0
"""The published wheel with the verified files in place of theirs."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..core.errors import FleetError
from .wheel import BLOCK, WheelFile, canonical, dist_info, requirement_name

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LIMIT = 0xFFFFFFFF
_UTF8 = 0x800
_DESCRIPTOR = 0x8
# 1980-01-01 00:00, the first date that a zip can hold.
_DATE = 0x21
_FILE_MODE = 0o100644 << 16


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
            block = source.read(min(left, BLOCK))
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
        old_info = dist_info(archive)
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
    rows_before = {row[0]: row for row in csv.reader(io.StringIO(record)) if row}
    plan = _Plan(old_info, new_info, new, gone, infos, rows_before)
    try:
        with base.path.open("rb") as source, partial.open("wb") as stream:
            plan.write(source, _Writer(stream))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


@dataclass(frozen=True)
class _Plan:
    """Which members the new wheel has: kept ones, ``new`` contents by path, and none ``gone``."""

    old_info: str
    new_info: str
    new: Mapping[str, bytes]
    gone: Collection[str]
    infos: Sequence[zipfile.ZipInfo]
    rows_before: Mapping[str, list[str]]

    def write(self, source: BinaryIO, writer: _Writer) -> None:
        """Write the members, the dist-info folder last, and RECORD as the very last."""
        of_info = f"{self.old_info}/"
        known = {each.filename for each in self.infos}
        inside = (f"{self.new_info}/", of_info)
        fresh = [path for path in self.new if path not in known and not path.startswith(inside)]
        rows: list[list[str]] = []
        for info in self.infos:
            if not info.filename.startswith(of_info):
                rows += self._copy(source, writer, info, info.filename)
        rows += [_add(writer, path, self.new[path]) for path in sorted(fresh)]
        for info in self.infos:
            if info.filename.startswith(of_info):
                path = self.new_info + info.filename[len(self.old_info) :]
                rows += self._copy(source, writer, info, path)
        rows.append([f"{self.new_info}/RECORD", "", ""])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        writer.add(f"{self.new_info}/RECORD", text.getvalue().encode())
        writer.finish()

    def _copy(
        self, source: BinaryIO, writer: _Writer, info: zipfile.ZipInfo, path: str
    ) -> list[list[str]]:
        """Write one member of the base wheel, or what takes its place; return its RECORD row."""
        if info.filename in self.gone or info.filename == f"{self.old_info}/RECORD":
            return []
        if path in self.new:
            return [_add(writer, path, self.new[path])]
        writer.copy(source, info, path)
        return [] if info.is_dir() else [[path, *_kept_row(self.rows_before, info.filename)]]


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
