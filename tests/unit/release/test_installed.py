# SPDX-License-Identifier: Apache-2.0
"""An environment that is not what was built is noticed: what is gone, changed, or leads nowhere."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from glm_fleet.release.installed import (
    COMPLETE,
    find_damage,
    is_complete,
    note_damage,
    read_note,
    seal,
)

from tests.clock import next_tick

FILES = {
    "tiny/__init__.py": "VALUE = 1\n",
    "tiny/envs.py": "HOME = '/x'\n",
    "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n",
    "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny-1.dist-info/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
}


def wheel(folder: Path) -> Path:
    path = folder / "tiny-1-py3-none-any.whl"
    record = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
            record.append(f"{name},sha256={digest.decode()},{len(text)}")
        archive.writestr(
            "tiny-1.dist-info/RECORD", "\n".join([*record, "tiny-1.dist-info/RECORD,,"]) + "\n"
        )
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A real environment, made by the installer that nodes use."""
    made, uv = tmp_path / "r1", Path(sys.executable).with_name("uv")
    cache = {**os.environ, "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_OFFLINE": "1"}
    for command in (
        [uv, "venv", "-q", "--relocatable", "--python", sys.executable, made],
        [uv, "pip", "install", "-q", "--no-index", "--python", made / "bin/python",
         wheel(tmp_path)],
    ):  # fmt: skip
        subprocess.run(command, check=True, env=cache)
    (site,) = (made / "lib").glob("python*/site-packages")
    (site / "tiny/__pycache__").mkdir(exist_ok=True)
    (site / "tiny/__pycache__/envs.cpython-311.pyc").write_bytes(b"x")
    seal(made, {"release": "r1"})
    return made


def site(home: Path) -> Path:
    (found,) = (home / "lib").glob("python*/site-packages")
    return found


def test_what_the_installer_makes_is_whole(home: Path) -> None:
    assert (home / "bin/tiny").exists()
    assert find_damage(home) == []
    assert find_damage(home, deep=True) == []
    assert is_complete(home, "r1")
    assert not is_complete(home, "r2")
    assert "tiny-1.dist-info" in read_note(home)["records"]


def change_size(home: Path) -> None:
    (site(home) / "tiny/envs.py").write_text("HOME = '/longer'\n")


def change_bytes(home: Path) -> None:
    next_tick(home.parent)
    (site(home) / "tiny/envs.py").write_text("HOME = '/y'\n")


def lead_nowhere(home: Path) -> None:
    (home / "bin/python").unlink()
    (home / "bin/python").symlink_to("/no/such/python3")


@pytest.mark.parametrize(
    ("damage", "path", "reason"),
    [
        (lambda home: (site(home) / "tiny/envs.py").unlink(), "tiny/envs.py", "missing"),
        (change_size, "tiny/envs.py", "changed"),
        (change_bytes, "tiny/envs.py", "changed"),
        (lambda home: (home / "bin/tiny").unlink(), "bin/tiny", "missing"),
        (
            lambda home: (site(home) / "tiny-1.dist-info/RECORD").unlink(),
            "tiny-1.dist-info/RECORD",
            "missing",
        ),
        (
            lambda home: (site(home) / "tiny-1.dist-info/RECORD").write_text(""),
            "tiny-1.dist-info/RECORD",
            "changed",
        ),
        (lead_nowhere, "bin/python", "dangling"),
        (lambda home: (home / COMPLETE).unlink(), COMPLETE, "missing"),
    ],
)
def test_damage_is_seen_by_a_quick_look(
    home: Path, damage: Callable[[Path], None], path: str, reason: str
) -> None:
    damage(home)
    (found,) = find_damage(home)
    assert found.path.endswith(path)
    assert found.reason == reason


def test_bytes_that_changed_unnoticed_are_found_by_a_deep_look_and_remembered(home: Path) -> None:
    note = read_note(home)
    change_bytes(home)
    # As of a build of the version before, which did not say when it ended.
    (home / COMPLETE).write_text('{"release": "r1"}')
    assert find_damage(home) == []
    deep = find_damage(home, deep=True)
    assert [each.reason for each in deep] == ["changed"]
    note_damage(home, deep)
    assert find_damage(home) == deep
    note_damage(home, [])
    assert find_damage(home) == []
    assert note["sealed_ns"] > 0


def test_a_folder_that_was_copied_is_not_read_whole_each_time(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_fleet.release.installed._MOST_TOUCHED", 1)
    change_bytes(home)
    os.utime(site(home) / "tiny/__init__.py")
    assert find_damage(home) == []
    assert len(find_damage(home, deep=True)) == 1
