# SPDX-License-Identifier: Apache-2.0
"""Files are whole or absent, and readable by those they are for: never by others, for a moment."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from glm_fleet.core.files import write_atomically


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_file_has_its_mode(tmp_path: Path, mode: int) -> None:
    before = os.umask(0)
    try:
        write_atomically(tmp_path / "x", "a", mode)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o7777 == mode


def test_a_secret_is_readable_by_nobody_else_for_a_moment(tmp_path: Path) -> None:
    """Somebody looks at every file of the folder, again and again, while secrets are written."""
    done, seen, looked = threading.Event(), set[int](), 0

    def look() -> None:
        nonlocal looked
        while not done.is_set():
            for each in os.scandir(tmp_path):
                try:
                    seen.add(each.stat(follow_symlinks=False).st_mode & 0o077)
                except FileNotFoundError:
                    continue
                looked += 1

    thread = threading.Thread(target=look)
    before = os.umask(0)
    thread.start()
    try:
        for number in range(150):
            write_atomically(tmp_path / "serving.env", f"VLLM_API_KEY={number}\n", 0o600)
    finally:
        os.umask(before)
        done.set()
        thread.join()
    assert looked > 150
    assert seen == {0}


def test_what_was_there_stays_when_a_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "a\ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
