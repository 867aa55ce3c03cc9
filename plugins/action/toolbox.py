# SPDX-License-Identifier: Apache-2.0
"""Puts locked Python packages together on the controller, for the Python of a host.

Hosts have no package index: what they need comes to them as an archive over SSH. It is
made once per Python and lock, kept on the controller, and not made at all for hosts that
have it.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import FleetAction
from glm_fleet.core.files import exclusive
from glm_fleet.core.runner import run_program


class ActionModule(FleetAction):
    """Returns ``path`` on the host, whether it is ``present``, and else the ``archive``."""

    _VALID_ARGS = frozenset({"name", "lock", "cache", "dest"})

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Look at the host, and make the archive that it needs."""
        arguments = self._task.args
        facts = self.module(
            "ansible.legacy.setup",
            {"gather_subset": ["!all", "!min", "python", "platform"]},
            variables,
        )
        if facts.get("failed"):
            return facts
        python = ".".join(facts["ansible_facts"]["ansible_python_version"].split(".")[:2])
        machine = str(facts["ansible_facts"]["ansible_machine"])
        lock = Path(arguments["lock"])
        digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
        name = f"{arguments['name']}-py{python}-{machine}-{digest}"
        path = f"{arguments['dest']}/{name}"
        found = self.module("ansible.legacy.stat", {"path": path}, variables)
        if found.get("failed"):
            return found
        archive = Path(arguments["cache"]).expanduser() / f"{name}.tar.gz"
        present = bool(found["stat"]["exists"])
        if not present and not self._task.check_mode:
            with exclusive(archive.with_suffix(".lock")):
                if not archive.is_file():
                    _make(archive, name, lock, python, machine)
        return {
            "changed": False,
            "name": name,
            "path": path,
            "present": present,
            "archive": str(archive),
        }


def _make(archive: Path, name: str, lock: Path, python: str, machine: str) -> None:
    """Install into a folder and pack it. What has the archive's name is whole."""
    folder = archive.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    run_program(
        [
            str(Path(sys.executable).with_name("uv")),
            "pip",
            "install",
            "--quiet",
            "--target",
            str(folder),
            "--python-version",
            python,
            "--python-platform",
            f"{machine}-manylinux_2_28",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--requirements",
            str(lock),
        ]
    )
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz", compresslevel=1) as packed:
        packed.add(folder, arcname=name)
    partial.replace(archive)
    shutil.rmtree(folder)
