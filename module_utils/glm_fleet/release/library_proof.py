# SPDX-License-Identifier: Apache-2.0
"""Do the compiled libraries of a wheel hold code for the fleet's GPUs? Read, not run.

A CUDA library carries machine code and PTX in ELF sections of its own. Machine code runs on GPUs of
the same major capability and the same or a higher minor one; PTX is compiled for any GPU that is
not older. (NVIDIA: "CUDA binary utilities", and `fatbinary_section.h` of the toolkit.)
"""

from __future__ import annotations

import mmap
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from ..core.errors import FleetError

_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
_FATBIN_MAGIC = 0xBA55ED50
_KINDS = {1: "ptx", 2: "sass"}
# Parts of a library's path -> why the fleet does not need it where it has no code for its GPUs.
OTHER_GPUS = {
    "_flashmla": "FlashMLA is for capability 9.0 and above; TRITON_MLA_SPARSE does its work",
    "_vllm_fa3_C": "FlashAttention 3 is for capability 9.0; older GPUs take FlashAttention 2",
    "deep_gemm": "DeepGEMM is for capability 9.0 and above; the Triton fallback does its work",
    "_flashkda_C": "FlashKDA is for capability 9.0 and above, and for models with delta attention",
    "_deepselect_C": "DeepSelect is for capability 10.0; other GPUs take other kernels of top-k",
    "_qutlass_C": "the NVFP4 kernels are for capability 10.0 and above",
}
_Bytes = Union[bytes, mmap.mmap]


@dataclass(frozen=True)
class Code:
    """One piece of GPU code: ``kind`` is ptx or sass, ``arch`` the capability times ten."""

    kind: str
    arch: int

    def runs_on(self, capability: str) -> bool:
        major, minor = (int(part) for part in capability.split("."))
        if self.kind == "ptx":
            return self.arch <= major * 10 + minor
        return self.arch // 10 == major and self.arch % 10 <= minor


def read_library(data: _Bytes) -> Counter[Code]:
    """Count the pieces of GPU code in an ELF library; empty when it has none.

    Raises ValueError for what is no 64-bit little-endian ELF file or is cut short.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    found: Counter[Code] = Counter()
    try:
        for name, offset, size in _sections(data):
            if name in _SECTIONS:
                found.update(_fatbins(data, offset, offset + size))
    except struct.error as error:
        raise ValueError(f"the file is cut short: {error}") from error
    return found


def _sections(data: _Bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of every section."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    places = range(table, table + entry * count, entry or 1)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, place) for place in places]
    if not rows:
        return
    base = rows[names][4]
    for row in rows:
        end = data.find(b"\0", base + row[0])
        yield data[base + row[0] : end].decode(errors="replace"), row[4], row[5]


def _fatbins(data: _Bytes, start: int, end: int) -> Iterator[Code]:
    """Yield every piece of code of the fat binaries between two offsets."""
    while start < end:
        (magic,) = struct.unpack_from("<I", data, start)
        if magic != _FATBIN_MAGIC:
            start += 8
            continue
        (header,) = struct.unpack_from("<H", data, start + 6)
        (size,) = struct.unpack_from("<Q", data, start + 8)
        piece, stop = start + header, start + header + size
        while piece < stop:
            kind, _, head, length = struct.unpack_from("<HHIQ", data, piece)
            (arch,) = struct.unpack_from("<I", data, piece + 28)
            yield Code(_KINDS.get(kind, str(kind)), arch)
            if head + length == 0:
                raise ValueError("a piece of GPU code has no length")
            piece += head + length
        start = (stop + 7) // 8 * 8


def prove_libraries(wheel: Path, capabilities: Sequence[str]) -> dict[str, Any]:
    """Read every library of a wheel; return the figures for the manifest.

    Raises `FleetError` when one has GPU code, and none for a capability of the fleet, and is not
    one that the fleet can do without.
    """
    libraries = dict(_read_wheel(wheel))
    problems, rows = judge(libraries, capabilities)
    if problems:
        raise FleetError(
            f"{len(problems)} librar{'y' if len(problems) == 1 else 'ies'} of {wheel.name} cannot "
            "run on the fleet's GPUs",
            expected=f"machine code or PTX for capability {', '.join(capabilities)}",
            found="; ".join(problems),
            remedy="name a base wheel that was built for these GPUs: another CUDA variant, or "
            "another release",
            details={"libraries": rows},
        )
    return {"read": len(libraries), "libraries": rows}


def judge(
    libraries: Mapping[str, Counter[Code]], capabilities: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return what is wrong, and a row for every library with GPU code."""
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    for path, pieces in sorted(libraries.items()):
        if not pieces:
            continue
        held = sorted({f"{code.kind} {code.arch / 10:.1f}" for code in pieces})
        lacking = [each for each in capabilities if not any(code.runs_on(each) for code in pieces)]
        reason = next((why for part, why in OTHER_GPUS.items() if part in path), "")
        if lacking and not reason:
            problems.append(f"{path} holds {', '.join(held)}, nothing for {', '.join(lacking)}")
        row: dict[str, Any] = {"library": path, "code": held}
        rows.append({**row, "not_needed": reason} if lacking and reason else row)
    return problems, rows


def _read_wheel(wheel: Path) -> Iterator[tuple[str, Counter[Code]]]:
    with zipfile.ZipFile(wheel) as packed, tempfile.TemporaryDirectory() as folder:
        for member in packed.infolist():
            if not member.filename.endswith(".so"):
                continue
            # On disk, so that a library of 600 MB is not held in memory.
            file = Path(packed.extract(member, folder))
            try:
                with (
                    file.open("rb") as handle,
                    mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data,
                ):
                    yield member.filename, read_library(data)
            except ValueError as error:
                raise FleetError(
                    f"The library {member.filename} of {wheel.name} cannot be read",
                    expected="an ELF library",
                    found=str(error),
                    remedy="fetch the base wheel again",
                ) from error
            file.unlink()
