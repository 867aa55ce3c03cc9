# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, locks, and hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Callable

# Told how many bytes were read, from any thread.
Advance = Callable[[int], None]
_BLOCK = 1024 * 1024


def sha256_file(path: Path, advance: Advance | None = None) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if advance:
                advance(count)
    return digest.hexdigest()


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a whole file or nothing: a reader sees the old or the new content.

    The content is never readable by more users than ``mode`` lets in, not even for a moment.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            os.fchmod(descriptor, mode)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock for as long as the block lasts, waiting for whoever has it.

    ``waiting`` is called when somebody has it.

    A controller that dies leaves its module at work on the node. The next run waits for
    that one instead of pulling the folder from under it. The kernel drops the lock with
    the process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source`` where the file system allows it, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        copy_whole(source, target)


def copy_whole(source: Path, target: Path) -> Path:
    """Copy a file, so that ``target`` is whole or absent."""
    partial = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, partial)
        return partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def hashes_of(files: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each text, in hex."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}


def differing_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Name the files below a folder that are missing, different or not among ``hashes``.

    ``hashes`` is {path below the folder: SHA-256}. What Python compiled does not count.
    """
    there = {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    same = {
        name
        for name, wanted in hashes.items()
        if name in there and hashlib.sha256(there[name].read_bytes()).hexdigest() == wanted
    }
    return sorted((set(hashes) | set(there)) - same)


def replace_tree(folder: Path, files: Mapping[str, str]) -> None:
    """Replace a folder as a whole by one that holds ``files``, by two renames.

    Whoever opens a file meanwhile finds the old folder or the new one, never a mixture.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, gone = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for leftover in (fresh, gone):
        shutil.rmtree(leftover, ignore_errors=True)
    for name, text in files.items():
        path = fresh / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if folder.exists():
        folder.rename(gone)
    fresh.rename(folder)
    shutil.rmtree(gone, ignore_errors=True)
