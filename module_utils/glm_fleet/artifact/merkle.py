# SPDX-License-Identifier: Apache-2.0
"""The hash tree of a file, as BitTorrent v2 (BEP 52) defines it.

Its root depends on the content alone, not on the size of pieces: a manifest that names it says
which torrent is the file's, before a byte has moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.files import Advance

BLOCK = 16 * 1024
_NO_LEAF = bytes(32)
_MIB = 1024 * 1024


@dataclass(frozen=True)
class HashedFile:
    """What one pass over a file gives: its size, its SHA-256 in hex, and its tree."""

    size: int
    sha256: str
    root: bytes
    layer: bytes


def merkle_root(hashes: Sequence[bytes], width: int, padding: bytes) -> bytes:
    """Return the root of a tree over ``hashes``, filled with ``padding`` up to ``width`` leaves.

    ``width`` is a power of two. Only what is there is hashed: the rest has a known hash.
    """
    level = list(hashes)
    while width > 1:
        if len(level) % 2:
            level.append(padding)
        level = [
            hashlib.sha256(level[index] + level[index + 1]).digest()
            for index in range(0, len(level), 2)
        ]
        padding = hashlib.sha256(padding + padding).digest()
        width //= 2
    return level[0] if level else padding


def root_of_layer(layer: bytes, piece_length: int) -> bytes:
    """Return the root of the file whose pieces have the hashes that ``layer`` joins."""
    pieces = [layer[start : start + 32] for start in range(0, len(layer), 32)]
    no_piece = merkle_root([], piece_length // BLOCK, _NO_LEAF)
    return merkle_root(pieces, _power_of_two(len(pieces)), no_piece)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def hash_file(path: Path, piece_length: int = _MIB, advance: Advance | None = None) -> HashedFile:
    """Read a file once; return its SHA-256, the root of its tree and the hashes of its pieces."""
    whole = hashlib.sha256()
    pieces: list[bytes] = []
    leaves: list[bytes] = []
    size = 0
    width = piece_length // BLOCK
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(piece_length)
        view = memoryview(buffer)
        while True:
            filled = 0
            while filled < piece_length and (count := stream.readinto(view[filled:])):
                filled += count
            if not filled:
                break
            size += filled
            whole.update(view[:filled])
            leaves = [
                hashlib.sha256(view[start : min(start + BLOCK, filled)]).digest()
                for start in range(0, filled, BLOCK)
            ]
            pieces.append(merkle_root(leaves, width, _NO_LEAF))
            if advance:
                advance(filled)
            if filled < piece_length:
                break
    if len(pieces) <= 1:
        root = merkle_root(leaves, _power_of_two(len(leaves)), _NO_LEAF)
        return HashedFile(size, whole.hexdigest(), root, b"")
    layer = b"".join(pieces)
    return HashedFile(size, whole.hexdigest(), root_of_layer(layer, piece_length), layer)
