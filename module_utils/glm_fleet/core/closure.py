# SPDX-License-Identifier: Apache-2.0
"""What travels to a host: modules of this package, and everything that they import of it.

The answer comes from the imports themselves, so that nobody keeps a list. The program that
reads a host's facts, the library that is copied to nodes, and the digest by which a unit knows
its library all ask here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# The modules that units on a node start by name, as `python3 -m glm_fleet.NAME`. A deployment
# keeps the text of its unit, and a roll-back starts an old unit with the library of today: these
# names stay for ever.
# `__main__` starts them by name without a folder, an environment or a home of anybody.
ENTRY_POINTS = ("gate", "helper", "sentry", "watch", "swarm", "__main__")

# By its words and not as a syntax tree: every check works this out for every host, and a parser
# takes twenty times as long. The tests compare both.
_IMPORT = re.compile(r"^[ ]*from (\.+)([\w.]*) import (?:\(([^)]*)\)|(.*))", re.MULTILINE)


def closure(modules: Iterable[str], package: Path) -> dict[str, str]:
    """Return {file: source} of modules of a package and of all that they import of it.

    ``modules`` are dotted names below the package in the folder ``package``, such as
    ``node.facts``; files are relative to that folder, such as ``node/facts.py``. Imports within
    functions count. Raises `OSError` where a module does not exist.
    """
    found: dict[str, str] = {}
    pending = [tuple(module.split(".")) for module in modules]
    while pending:
        parts = pending.pop()
        # A module is imported after every package above it.
        for depth in range(len(parts) + 1):
            name = parts[:depth]
            file = _file(name, package)
            if file in found:
                continue
            found[file] = (package / file).read_text()
            pending += _imports(found[file], name, file.endswith("__init__.py"), package)
    return found


def digest(modules: Iterable[str], package: Path) -> str:
    """Name the content of a closure in 12 hex digits."""
    hashed = hashlib.sha256()
    for file, text in sorted(closure(modules, package).items()):
        for part in (file, text):
            hashed.update(part.encode() + b"\0")
    return hashed.hexdigest()[:12]


def module_name(file: str) -> str:
    """Return the dotted name of a closure's file: "" for the package itself."""
    return file.removesuffix(".py").replace("/", ".").removesuffix("__init__").rstrip(".")


def _file(name: tuple[str, ...], package: Path) -> str:
    path = "/".join(name)
    if not name or (package / path).is_dir():
        return f"{path}/__init__.py".lstrip("/")
    return f"{path}.py"


def _imports(
    text: str, name: tuple[str, ...], is_package: bool, package: Path
) -> Iterator[tuple[str, ...]]:
    """Yield the names, below the package, of the modules that a relative import takes."""
    here = name if is_package else name[:-1]
    for dots, module, several, one in _IMPORT.findall(text):
        base = here[: len(here) - len(dots) + 1]
        base += tuple(module.split(".")) if module else ()
        yield base
        for word in re.findall(r"\w+", several or one):
            # `from ..core import files` takes a module, `from ..core.files import x` a name.
            below = (*base, word)
            if (package / _file(below, package)).is_file():
                yield below
