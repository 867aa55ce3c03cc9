# SPDX-License-Identifier: Apache-2.0
"""Makes `glm_fleet` and `lab` importable where the tests run, modules of Ansible's included."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "module_utils")]


class _ModuleUtils(MetaPathFinder, Loader):
    """Finds `ansible.module_utils.glm_fleet` as Ansible does: it is this repository's package."""

    _PREFIX = "ansible.module_utils."

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Claim the package and what is in it."""
        package = f"{self._PREFIX}glm_fleet"
        mine = name == package or name.startswith(f"{package}.")
        return ModuleSpec(name, self) if mine else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the one module that there is: a second copy would have errors of its own."""
        return import_module(spec.name.removeprefix(self._PREFIX))

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module was run when it was imported by its own name."""


sys.meta_path.insert(0, _ModuleUtils())
