# SPDX-License-Identifier: Apache-2.0
"""Loads single modules of vLLM's source, with everything else replaced by blanks.

The whole of vLLM needs 180 packages and a GPU to be imported; a module that holds Triton kernels
needs torch, Triton, and a few names. What the modules under proof compute with is real; what they
only mention is a blank: it can be called, subclassed and used as a decorator, and is false.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Modules that kernels take names from, besides those that an entry names.
REAL = ("vllm.utils.math_utils", "vllm.v1.attention.ops.")
# Units of the GPU that launchers divide their work by: an A100 has 108.
COMPUTE_UNITS = 108


class Blank:
    """Stands for a name that a module mentions and the proof does not use."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Blank:
        if name.startswith("__"):
            raise AttributeError(name)
        return Blank(f"{self._name}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # As a decorator it gives back what it decorates.
        if len(arguments) == 1 and not options and callable(arguments[0]):
            return arguments[0]
        return Blank(f"{self._name}()")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: Any) -> Blank:
        return self

    def __or__(self, other: Any) -> Any:
        return object

    __ror__ = __or__

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter(())

    def __repr__(self) -> str:
        return f"<blank {self._name}>"


class _BlankModule(types.ModuleType):
    """Gives blanks for names, but the real value of what its file sets to a literal."""

    def __init__(self, name: str, file: Path | None = None) -> None:
        super().__init__(name)
        self._file = file

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._constants().get(name, Blank(f"{self.__name__}.{name}"))

    def _constants(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for node in ast.parse(self._file.read_bytes()).body if self._file else []:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                with contextlib.suppress(ValueError):
                    found[node.targets[0].id] = ast.literal_eval(node.value)
        return found


class _BlankLoader(importlib.abc.Loader):
    def __init__(self, file: Path | None = None) -> None:
        self._file = file

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _BlankModule(spec.name, self._file)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class Capability(tuple):  # type: ignore[type-arg]
    """A compute capability as vLLM's platform gives it."""

    major = property(lambda self: self[0])
    minor = property(lambda self: self[1])

    def to_int(self) -> int:
        return int(self[0]) * 10 + int(self[1])


class Platform:
    """vLLM's ``current_platform`` on a GPU of one capability."""

    device_type = "cuda"

    def __init__(self, torch: Any, capability: tuple[int, int]) -> None:
        self._torch = torch
        self._capability = Capability(capability)

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = is_cuda

    def get_device_capability(self, *_: Any) -> Capability:
        return self._capability

    def has_device_capability(self, wanted: Any, *_: Any) -> bool:
        number = wanted if isinstance(wanted, int) else Capability(wanted).to_int()
        return self._capability.to_int() >= number

    def fp8_dtype(self) -> Any:
        return self._torch.float8_e4m3fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("is_"):
            return lambda *arguments: False
        return Blank(f"current_platform.{name}")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the real modules in the tree, and blanks for the rest of vLLM."""

    def __init__(self, tree: Path, real: Sequence[str]) -> None:
        self._tree = tree
        self._real = tuple(real)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != "vllm":
            return None
        file = self._tree.joinpath(*name.split(".")).with_suffix(".py")
        if name.startswith(self._real) and file.is_file():
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, _BlankLoader(file if file.is_file() else None))


class _Missing(importlib.abc.MetaPathFinder):
    """Finds a blank for a package that is not installed, where vLLM itself imports it.

    Other packages look for optional ones and must see that they are not there.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        frame: types.FrameType | None = sys._getframe(1)
        while frame and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        importer = frame.f_globals.get("__name__", "") if frame else ""
        if importer.split(".")[0] != "vllm":
            return None
        return importlib.machinery.ModuleSpec(name, _BlankLoader())


def _module(name: str, **names: Any) -> types.ModuleType:
    module = _BlankModule(name)
    module.__dict__.update(names)
    module.__path__ = []
    sys.modules[name] = module
    return module


def prepare(tree: Path, modules: Sequence[str], capability: tuple[int, int]) -> None:
    """Make ``vllm`` of ``tree`` importable; ``modules`` are the ones that are loaded for real."""
    torch = importlib.import_module("torch")
    # Triton looks for optional packages while it is imported: it must not find blanks.
    triton = importlib.import_module("triton")
    language = importlib.import_module("triton.language")
    importlib.import_module("numpy")
    device = importlib.import_module("triton.language.extra.libdevice")
    sys.meta_path.insert(0, _Finder(tree, [*REAL, *modules]))
    sys.meta_path.append(_Missing())
    _module("vllm")
    _module(
        "vllm.triton_utils",
        tl=language,
        triton=triton,
        tldevice=device,
        HAS_TRITON=True,
        LOG2E=1.4426950408889634,
        LOGE2=0.6931471805599453,
    )
    _module("vllm.utils.platform_utils", num_compute_units=lambda *_: COMPUTE_UNITS)
    platform = Platform(torch, capability)
    _module("vllm.platforms", current_platform=platform)
    limits = torch.finfo(torch.float8_e4m3fn)
    _module(
        "vllm.model_executor.layers.quantization.utils.quant_utils",
        get_fp8_min_max=lambda: (limits.min, limits.max),
    )


def function(module: str, name: str) -> Any:
    """Return a function of a module, or a method by ``Class.method``."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if callable(found) and not isinstance(found, Blank):
        return found
    raise AttributeError(f"module {module!r} has no function {name!r}")
