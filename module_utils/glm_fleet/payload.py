# SPDX-License-Identifier: Apache-2.0
"""A function of this package as one program that Python reads from its standard input.

What Ansible ships with a module (its parser of arguments, its own library, from source) costs a
host more processor time than all that a check reads. A check of many hosts goes without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Imports of this package in its own modules: `from .a import b`, and `from . import a, b`.
_IMPORT = re.compile(r"^[ ]*from \.(\w*) import (?:\(([^)]*)\)|(.*))", re.MULTILINE)
_MARK = "glm-fleet answers: "
# For the host's own Python: nothing here is newer than what the package itself needs.
_PROGRAM = """\
import json, sys
from importlib.machinery import ModuleSpec

sources = {sources}


class Package:
    def find_spec(self, name, path=None, target=None):
        if name in sources:
            return ModuleSpec(name, self, is_package="." not in name)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        exec(compile(sources[name], "<" + name + ">", "exec", dont_inherit=True), module.__dict__)


sys.meta_path.insert(0, Package())
from {package}.{module} import {function}

print("\\n" + {mark} + json.dumps({function}(json.loads({argument}))))
"""


def sources_of(module: str, package: Path) -> dict[str, str]:
    """Return {name: source} of a module of the package in a folder, and of all that it imports."""
    found = {package.name: (package / "__init__.py").read_text()}
    pending = [module]
    while pending:
        each = pending.pop()
        name = f"{package.name}.{each}"
        if name in found:
            continue
        found[name] = (package / f"{each}.py").read_text()
        for source, several, one in _IMPORT.findall(found[name]):
            pending += [source] if source else re.findall(r"\w+", several or one)
    return found


def program(module: str, function: str, argument: Mapping[str, Any], package: Path) -> str:
    """Return a program that calls ``function(argument)`` and prints what it returns.

    The argument and the answer are plain data. The text is ASCII.
    """
    return _PROGRAM.format(
        sources=ascii(sources_of(module, package)),
        package=package.name,
        module=module,
        function=function,
        mark=ascii(_MARK),
        argument=ascii(json.dumps(argument)),
    )


def answer_in(output: str) -> Any:
    """Return the answer that such a program printed, whatever a login shell wrote beside it.

    None if there is none.
    """
    for line in output.splitlines():
        if line.startswith(_MARK):
            try:
                return json.loads(line[len(_MARK) :])
            except ValueError:
                return None
    return None
