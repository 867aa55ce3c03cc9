# SPDX-License-Identifier: Apache-2.0
"""Which GPUs a library has code for, read from libraries made here byte by byte."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.release.library_proof import Code, judge, prove_libraries, read_library


def fatbin(*codes: tuple[int, int]) -> bytes:
    """A fat binary with (kind, arch) pieces, each with 24 bytes of code."""
    pieces = b""
    for kind, arch in codes:
        head = struct.pack("<HHIQ", kind, 0x101, 64, 24).ljust(28, b"\0") + struct.pack("<I", arch)
        pieces += head.ljust(64, b"\0") + b"c" * 24
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(pieces)) + pieces


def library(*sections: tuple[str, bytes]) -> bytes:
    """A 64-bit ELF file with these sections."""
    names, body, rows = b"\0", b"", [(0, 0, 0)]
    for name, content in (*sections, (".shstrtab", b"")):
        body += b"\0" * (-len(body) % 8)
        rows.append((len(names), 64 + len(body), len(content)))
        names += name.encode() + b"\0"
        body += content
    rows[-1] = (rows[-1][0], 64 + len(body), len(names))
    body += names
    table = 64 + len(body)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, len(rows), len(rows) - 1)
    packed = [struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 8, 0)
              for name, at, size in rows]  # fmt: skip
    return bytes(header) + body + b"".join(packed)


def test_all_code_of_a_library_is_found() -> None:
    data = library(
        (".text", b"x" * 13),
        (".nv_fatbin", fatbin((2, 80), (2, 90)) + fatbin((1, 80))),
        ("__nv_relfatbin", fatbin((2, 75))),
    )
    assert set(read_library(data)) == {
        Code("sass", 80),
        Code("sass", 90),
        Code("ptx", 80),
        Code("sass", 75),
    }


def test_a_library_without_gpu_code() -> None:
    assert not read_library(library((".text", b"x")))


@pytest.mark.parametrize(
    ("code", "runs"),
    [
        (Code("sass", 80), {"8.0", "8.6", "8.9"}),
        (Code("sass", 86), {"8.6", "8.9"}),
        (Code("sass", 90), {"9.0"}),
        (Code("ptx", 80), {"8.0", "8.6", "8.9", "9.0", "10.0"}),
        (Code("ptx", 90), {"9.0", "10.0"}),
    ],
)
def test_where_code_runs(code: Code, runs: set[str]) -> None:
    known = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0")
    assert {each for each in known if code.runs_on(each)} == runs


@pytest.mark.parametrize("data", [b"", b"MZ" * 40, b"\x7fELF\x01\x01" + b"\0" * 80])
def test_what_is_no_library(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a 64-bit"):
        read_library(data)


def test_every_cut_of_a_library_ends_in_an_answer() -> None:
    whole = library((".nv_fatbin", fatbin((2, 80), (1, 90))))
    for end in range(0, len(whole), 7):
        try:
            read_library(whole[:end])
        except ValueError:
            continue


def wheel(folder: Path, **libraries: bytes) -> Path:
    path = folder / "vllm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("vllm/__init__.py", "")
        for name, content in libraries.items():
            packed.writestr(f"vllm/{name}.abi3.so", content)
    return path


def test_a_library_for_other_gpus_alone_is_refused(tmp_path: Path) -> None:
    path = wheel(
        tmp_path,
        _C=library((".nv_fatbin", fatbin((2, 90), (2, 100)))),
        _moe_C=library((".nv_fatbin", fatbin((2, 80)))),
    )
    with pytest.raises(FleetError, match="1 library of") as caught:
        prove_libraries(path, ["8.0"])
    assert "vllm/_C.abi3.so holds sass 10.0, sass 9.0, nothing for 8.0" in caught.value.found
    assert "_moe_C" not in caught.value.found
    assert "another CUDA variant" in caught.value.remedy


def test_every_capability_of_the_fleet_counts(tmp_path: Path) -> None:
    path = wheel(tmp_path, _C=library((".nv_fatbin", fatbin((2, 80)))))
    assert prove_libraries(path, ["8.0", "8.6"])["read"] == 1
    with pytest.raises(FleetError, match="cannot run"):
        prove_libraries(path, ["8.0", "9.0"])


def test_what_the_fleet_can_do_without_is_told_with_its_reason(tmp_path: Path) -> None:
    path = wheel(
        tmp_path,
        _C=library((".nv_fatbin", fatbin((2, 80)))),
        _vllm_fa3_C=library((".nv_fatbin", fatbin((2, 90)))),
        host=library((".text", b"x")),
    )
    told = prove_libraries(path, ["8.0"])
    assert told["read"] == 3
    assert [row["library"] for row in told["libraries"]] == [
        "vllm/_C.abi3.so",
        "vllm/_vllm_fa3_C.abi3.so",
    ]
    assert "capability 9.0" in told["libraries"][1]["not_needed"]
    assert "not_needed" not in told["libraries"][0]


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"vllm/_C.abi3.so of vllm-1.0"):
        prove_libraries(wheel(tmp_path, _C=b"nothing"), ["8.0"])


def test_a_library_without_code_is_no_row() -> None:
    assert judge({"a.so": read_library(library((".text", b"x")))}, ["8.0"]) == ([], [])
