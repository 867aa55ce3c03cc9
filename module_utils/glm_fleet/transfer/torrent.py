# SPDX-License-Identifier: Apache-2.0
"""Torrents of an artifact's files: BitTorrent v2, the same bytes whoever makes them.

A big file is a torrent of its own, so that it travels while the next one still arrives;
small ones share. Everything follows from the manifest, so two hosts that hold the same
file make the same torrent, and whatever torrent is made first serves all.

Run as a program, it makes one torrent: JSON on standard input, see `main`. A process per
torrent, because hashing blocks of 16 KiB in threads is a fight for the interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from ..artifact.manifest import FileEntry, Manifest
from ..artifact.merkle import HashedFile, hash_file, root_of_layer
from ..core.errors import FleetError

_BIG = 64 * 1024 * 1024
_MIB = 1024 * 1024
_PIECES = 1500
_DEPTH = 64
# As it is written, so that one value has one form.
_NUMBER = re.compile(rb"i(0|-?[1-9][0-9]{0,18})e")
_LENGTH = re.compile(rb"(0|[1-9][0-9]{0,9}):")
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


def bdecode(data: bytes) -> Any:
    """Read what `bencode` writes; `ValueError` for anything else. Strings stay bytes."""
    value, end = _read(data, 0, 0)
    if end != len(data):
        raise ValueError("bytes follow the end")
    return value


def _read(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    if data[at : at + 1] in (b"d", b"l"):
        found, end = [], at + 1
        while data[end : end + 1] != b"e":
            value, end = _read(data, end, depth + 1)
            found.append(value)
        if data[at : at + 1] == b"l":
            return found, end + 1
        keys = found[::2]
        if len(found) % 2 or not all(isinstance(key, bytes) for key in keys):
            raise ValueError("not a mapping")
        return dict(zip(keys, found[1::2])), end + 1
    number = _NUMBER.match(data, at) or _LENGTH.match(data, at)
    if number is None:
        raise ValueError("neither number, string, list nor mapping")
    if number.re is _NUMBER:
        return int(number[1]), number.end()
    end = number.end() + int(number[1])
    if end > len(data):
        raise ValueError("a string that is cut off")
    return data[number.end() : end], end


def torrent_roots(torrent: bytes, name: str, bundle: Bundle) -> dict[str, str]:
    """Return {path: root of its hash tree in hex} of a torrent that follows from the manifest.

    ``name`` is the id of the artifact. A torrent comes from another host: its files, sizes and
    pieces have to be those of the bundle, and a root has to be the one in the manifest, where the
    manifest has one. What is left to the torrent are the hashes of pieces, which have to lead to
    the root. Raises `FleetError` for anything else, down to a byte.
    """
    try:
        said = bdecode(torrent)
        layers = said[b"piece layers"]
        hashed = {}
        for entry in bundle.entries:
            place = said[b"info"][b"file tree"]
            for part in entry.path.encode().split(b"/"):
                place = place[part]
            root = bytes(place[b""][b"pieces root"])
            layer = bytes(layers[root]) if entry.size > bundle.piece_length else b""
            _check_layer(entry, bundle.piece_length, root, layer)
            hashed[entry.path] = HashedFile(entry.size, entry.sha256, root, layer)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _refusal(bundle, f"{type(error).__name__}: {error}") from error
    if make_torrent(name, bundle.entries, bundle.piece_length, hashed) != torrent:
        raise _refusal(bundle, "other files, sizes or settings")
    return {path: each.root.hex() for path, each in hashed.items()}


def _check_layer(entry: FileEntry, piece_length: int, root: bytes, layer: bytes) -> None:
    if entry.root and entry.root != root.hex():
        raise ValueError(f"the root {root.hex()[:12]}… of {entry.path}, not {entry.root[:12]}…")
    if layer and (
        len(layer) != 32 * -(-entry.size // piece_length)
        or root_of_layer(layer, piece_length) != root
    ):
        raise ValueError(f"hashes of pieces that do not lead to the root of {entry.path}")


def _refusal(bundle: Bundle, found: str) -> FleetError:
    return FleetError(
        f"A torrent does not follow from the manifest: bundle {bundle.name}",
        expected=f"the files, sizes and roots of {len(bundle.entries)} files of the manifest",
        found=found,
        remedy="find out which host made it: no other host believes it",
    )


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
