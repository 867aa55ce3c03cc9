# SPDX-License-Identifier: Apache-2.0
"""Torrents of an artifact's files: BitTorrent v2, the same bytes whoever makes them.

A big file is a torrent of its own, so that it travels while the next one still arrives;
small ones share. Everything follows from the manifest, so two hosts that hold the same
file make the same torrent, and whatever torrent is made first serves all.

Run as a program, it makes one torrent: JSON on standard input, see `main`. A process per
torrent, because hashing blocks of 16 KiB in threads is a fight for the interpreter.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from ..artifact.manifest import FileEntry, Manifest

BLOCK = 16 * 1024  # of BitTorrent v2
_BIG = 64 * 1024 * 1024
_MIB = 1024 * 1024
_PIECES = 1500
Bencodable = Union[int, bytes, str, Sequence["Bencodable"], Mapping[bytes, "Bencodable"]]


@dataclass(frozen=True)
class Bundle:
    """Files that travel as one torrent."""

    name: str
    entries: tuple[FileEntry, ...]

    @property
    def bytes(self) -> int:
        """Size of all its files together, in bytes."""
        return sum(entry.size for entry in self.entries)

    @property
    def piece_length(self) -> int:
        """Bytes of a piece: about 1400 of them, from 128 KiB to 4 MiB."""
        length = _MIB // 8
        while length < 4 * _MIB and length * _PIECES < self.bytes:
            length *= 2
        return length


def bundles(manifest: Manifest) -> list[Bundle]:
    """Divide an artifact. Empty files are left out: there is nothing to move."""
    found: list[tuple[FileEntry, ...]] = []
    group: list[FileEntry] = []
    for entry in sorted(manifest.files, key=lambda each: each.path):
        if entry.size >= _BIG:
            found.append((entry,))
        elif entry.size:
            if group and sum(each.size for each in group) + entry.size > _BIG:
                found.append(tuple(group))
                group = []
            group.append(entry)
    if group:
        found.append(tuple(group))
    return [Bundle(f"{number:04d}", entries) for number, entries in enumerate(found)]


def shares(
    manifest: Manifest, hosts: Sequence[str], missing: Collection[str]
) -> dict[str, list[str]]:
    """Deal the files of an artifact to hosts that fetch it: {host: paths}, as even as can be.

    A bundle goes whole to one host, or no host could make its torrent; bundles of which nothing
    is ``missing`` go to none. The same hosts get the same files in every run, so that a run goes
    on with what the one before left half done.
    """
    dealt: dict[str, list[str]] = {host: [] for host in hosts}
    load = dict.fromkeys(hosts, 0)
    for bundle in sorted(bundles(manifest), key=lambda each: (-each.bytes, each.name)):
        host = min(hosts, key=lambda each: load[each])
        load[host] += bundle.bytes
        paths = [entry.path for entry in bundle.entries]
        dealt[host] += paths if set(paths) & set(missing) else []
    return dealt


def bencode(value: Bencodable) -> bytes:
    """Write a value as torrents hold it. Keys of a mapping are bytes and get sorted."""
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return b"%d:%s" % (len(value), value)
    if isinstance(value, Mapping):
        parts = (bencode(key) + bencode(value[key]) for key in sorted(value))
        return b"d" + b"".join(parts) + b"e"
    return b"l" + b"".join(bencode(each) for each in value) + b"e"


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


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


@dataclass(frozen=True)
class HashedFile:
    """What one pass over a file gives: its SHA-256 in hex, and its tree."""

    size: int
    sha256: str
    root: bytes
    layer: bytes


def hash_file(path: Path, piece_length: int) -> HashedFile:
    """Read a file once; return its SHA-256, the root of its tree and the hashes of its pieces."""
    whole = hashlib.sha256()
    pieces: list[bytes] = []
    leaves: list[bytes] = []
    size = 0
    no_leaf = bytes(32)
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
            pieces.append(merkle_root(leaves, width, no_leaf))
            if filled < piece_length:
                break
    if len(pieces) <= 1:
        root = merkle_root(leaves, _power_of_two(len(leaves)), no_leaf)
        return HashedFile(size, whole.hexdigest(), root, b"")
    no_piece = merkle_root([], width, no_leaf)
    root = merkle_root(pieces, _power_of_two(len(pieces)), no_piece)
    return HashedFile(size, whole.hexdigest(), root, b"".join(pieces))


def make_torrent(
    name: str, entries: Iterable[FileEntry], piece_length: int, hashed: Mapping[str, HashedFile]
) -> bytes:
    """Write the torrent of files below the folder ``name``."""
    tree: dict[bytes, Bencodable] = {}
    layers: dict[bytes, Bencodable] = {}
    for entry in entries:
        file = hashed[entry.path]
        place = tree
        *folders, last = entry.path.encode().split(b"/")
        for folder in folders:
            place = place.setdefault(folder, {})  # type: ignore[assignment]
        place[last] = {b"": {b"length": file.size, b"pieces root": file.root}}
        if file.layer:
            layers[file.root] = file.layer
    info: dict[bytes, Bencodable] = {
        b"file tree": tree,
        b"meta version": 2,
        b"name": name,
        b"piece length": piece_length,
        b"private": 1,
    }
    return bencode({b"info": info, b"piece layers": layers})


def main() -> int:
    """Make the torrent that standard input describes; print the files that are damaged.

    Input: ``folder``, ``name``, ``piece_length``, ``entries`` and ``target``. Nothing is
    written when a file is not what its entry says.
    """
    wanted = json.load(sys.stdin)
    entries = [FileEntry(**each) for each in wanted["entries"]]
    hashed: dict[str, HashedFile] = {}
    damaged = []
    for entry in entries:
        found = hash_file(Path(wanted["folder"], entry.path), wanted["piece_length"])
        hashed[entry.path] = found
        if (found.size, found.sha256) != (entry.size, entry.sha256):
            damaged.append(entry.path)
    if not damaged:
        torrent = make_torrent(wanted["name"], entries, wanted["piece_length"], hashed)
        target = Path(wanted["target"])
        scratch = target.with_suffix(".new")
        scratch.write_bytes(torrent)
        scratch.replace(target)
    json.dump(damaged, sys.stdout)
    return 0


if __name__ == "__main__":
    main()
