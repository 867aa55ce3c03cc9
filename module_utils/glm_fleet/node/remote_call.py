# SPDX-License-Identifier: Apache-2.0
"""A function of this package as one program that Python reads from its standard input.

What Ansible ships with a module (its parser of arguments, its own library, from source) costs a
host more processor time than all that a check reads. A check of many hosts goes without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.closure import closure, module_name

_MARK = "glm-fleet answers: "
# For the host's own Python: nothing here is newer than what the package itself needs.
_PROGRAM = """\
import json, sys
from importlib.machinery import ModuleSpec

sources = {sources}
packages = {packages}


class Package:
    def find_spec(self, name, path=None, target=None):
        if name in sources:
            return ModuleSpec(name, self, is_package=name in packages)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        exec(compile(sources[name], "<" + name + ">", "exec", dont_inherit=True), module.__dict__)


sys.meta_path.insert(0, Package())
from {package}.{module} import {function}

print("\\n" + {mark} + json.dumps({function}(json.loads({argument}))))
"""


def program(module: str, function: str, argument: Mapping[str, Any], package: Path) -> str:
    """Return a program that calls ``function(argument)`` and prints what it returns.

    ``module`` is dotted, below the package in the folder ``package``. The argument and the
    answer are plain data. The text is ASCII.
    """
    files = closure([module], package)
    names = {file: f"{package.name}.{module_name(file)}".rstrip(".") for file in files}
    return program_of(
        {names[file]: text for file, text in files.items()},
        [names[file] for file in files if file.endswith("__init__.py")],
        package.name,
        module,
        function,
        argument,
    )


def program_of(
    sources: Mapping[str, str],
    packages: Iterable[str],
    package: str,
    module: str,
    function: str,
    argument: Mapping[str, Any],
) -> str:
    """Return such a program of ``sources``, {dotted name: text}; ``packages`` are those of them."""
    return _PROGRAM.format(
        sources=ascii(dict(sources)),
        packages=ascii(set(packages)),
        package=package,
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
            except (ValueError, RecursionError):
                return None
    return None
