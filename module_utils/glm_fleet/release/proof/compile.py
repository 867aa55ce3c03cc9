# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel that the entries launch, for GPUs that this machine does not have.

Run as a program: reads JSON on standard input (tree, capability, entries, sizes, notes, part,
parts) and writes one JSON list of rows. The release's own launchers are called with tensors that
have a shape and no memory, so what is compiled is what they would launch; every configuration of an
autotuner is compiled. `notes` is a folder that keeps what ptxas said, by the assembly's digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import modules

_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class Driver:
    """Names the GPU that is compiled for; there is none to run on."""

    launcher_cls = utils = None

    def __init__(self, torch: Any, target: Any) -> None:
        self._device = torch.device("meta")
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        return self._device

    def get_benchmarker(self) -> Any:
        return lambda *arguments, **options: [0.0]

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


class Recorder:
    """Takes the place of a launch: compiles, and notes what came of it."""

    def __init__(self, notes: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.entry = ""
        self._notes = notes
        self._ptxas = _ptxas()

    def install(self) -> None:
        """Let Triton's launches end here, and let it print what ptxas says."""
        importlib.import_module("triton").knobs.nvidia.dump_ptxas_log = True
        jit = importlib.import_module("triton.runtime.jit").JITFunction
        tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
        real = jit.run
        recorder = self

        def run(kernel: Any, *arguments: Any, grid: Any = None, warmup: Any = None,
                **options: Any) -> None:  # fmt: skip
            recorder.note(kernel, real, arguments, grid, options)

        def tuned(kernel: Any, *arguments: Any, **options: Any) -> None:
            for config in kernel.configs:
                kernel.fn.run(*arguments, **{**options, **config.all_kwargs()})

        jit.run = run
        tuner.run = tuned

    def note(
        self, kernel: Any, real: Any, arguments: Any, grid: Any, options: Mapping[str, Any]
    ) -> None:
        """Compile one launch and add a row."""
        begun = time.monotonic()
        row: dict[str, Any] = {
            "entry": self.entry,
            "kernel": kernel.fn.__name__,
            "file": inspect.getsourcefile(kernel.fn) or "",
            "options": {
                key: value
                for key, value in options.items()
                if isinstance(value, (int, str)) and (key.isupper() or key.startswith("num_"))
            },
        }
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                made = real(kernel, *arguments, grid=grid, warmup=True, **options)
            row["shared"] = made.metadata.shared
            row |= self._resources(made.asm["ptx"], said.getvalue())
        except Exception as error:  # noqa: BLE001 - whatever Triton raises is the finding
            row |= _failure(kernel, error)
        row["seconds"] = round(time.monotonic() - begun, 2)
        self.rows.append(row)

    def _resources(self, assembly: str, said: str) -> dict[str, int]:
        """Return registers and spilled bytes as ptxas gives them, once for each assembly.

        ``said`` is what Triton's own run of ptxas printed; empty where Triton had it cached.
        """
        note = self._notes / f"{hashlib.sha256(assembly.encode()).hexdigest()}.json"
        try:
            known: dict[str, int] = json.loads(note.read_text())
        except (OSError, ValueError):
            known = _read_log(said) or _read_log(self._ask_ptxas(assembly))
            note.write_text(json.dumps(known))
        return known

    def _ask_ptxas(self, assembly: str) -> str:
        target = re.search(r"\.target (sm_\w+)", assembly)
        arch = f"-arch={target[1] if target else ''}"
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(assembly)
            file.flush()
            command = [self._ptxas, "-v", arch, file.name, "-o", "/dev/null"]
            return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def _read_log(said: str) -> dict[str, int]:
    """Read the log of ptxas about one kernel; {} when there is none."""
    used, spills = _USED.search(said), _SPILLS.search(said)
    if not (used and spills):
        return {}
    return {
        "registers": int(used[1]),
        "spill_stores": int(spills[2]),
        "spill_loads": int(spills[3]),
    }


def _ptxas() -> str:
    triton = importlib.import_module("triton")
    return str(Path(inspect.getfile(triton)).parent / "backends/nvidia/bin/ptxas")


def _failure(kernel: Any, error: BaseException) -> dict[str, Any]:
    """Say why a kernel does not compile, and in which line of its file."""
    line, said = 0, str(error)
    each: BaseException | None = error
    while each is not None:
        place = getattr(getattr(each, "node", None), "lineno", None)
        if place:
            line = kernel.starting_line_number + place - 1
        message = getattr(each, "error_message", None) or (each.args[0] if each.args else "")
        said = str(message or said)
        each = each.__cause__
    last = next((text for text in reversed(said.splitlines()) if text.strip()), said)
    return {"error": f"{type(error).__name__}: {last.strip()[:300]}", "line": line}


def make(spec: Any, sizes: Mapping[str, int], torch: Any) -> Any:
    """Turn an argument as `entries` describes it into a value."""
    if not isinstance(spec, dict):
        return spec
    ((kind, value),) = spec.items()
    if kind == "tensor":
        dtype, shape = value
        dims = [sizes[each] if isinstance(each, str) else each for each in shape]
        return torch.empty(dims, dtype=getattr(torch, dtype), device="meta")
    if kind == "values":
        return torch.tensor(value[1], dtype=getattr(torch, str(value[0])))
    if kind == "size":
        return sizes[value]
    if kind == "tuple":
        return tuple(make(each, sizes, torch) for each in value)
    if kind == "slice":
        return slice(*value)
    if kind == "name":
        found: Any = importlib.import_module(value[0])
        for part in value[1].split("."):
            found = getattr(found, part)
        return found
    if kind == "namespace":
        return types.SimpleNamespace(
            **{name: make(each, sizes, torch) for name, each in value.items()}
        )
    raise ValueError(f"an argument of the kind {kind!r} is not known")


def calls(arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of every call: one for each combination of the ``each``."""
    names = [name for name, each in arguments.items() if isinstance(each, dict) and "each" in each]
    for values in itertools.product(*(arguments[name]["each"] for name in names)):
        yield {**arguments, **dict(zip(names, values))}


def prove(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Call every entry of this part and return the rows."""
    torch = importlib.import_module("torch")
    compiler = importlib.import_module("triton.backends.compiler")
    driver = importlib.import_module("triton.runtime").driver
    major, minor = (int(part) for part in task["capability"].split("."))
    modules.prepare(
        Path(task["tree"]), [entry["module"] for entry in task["entries"]], (major, minor)
    )
    driver.set_active(Driver(torch, compiler.GPUTarget("cuda", major * 10 + minor, 32)))
    recorder = Recorder(Path(task["notes"]))
    recorder.install()
    todo = [(entry, call) for entry in task["entries"] for call in calls(entry["arguments"])]
    for entry, call in todo[task["part"] :: task["parts"]]:
        recorder.entry = entry["name"]
        before = len(recorder.rows)
        try:
            target = modules.function(entry["module"], entry["function"])
            target(**{name: make(each, task["sizes"], torch) for name, each in call.items()})
        except Exception as error:  # noqa: BLE001 - a launcher may raise anything
            if not any("error" in row for row in recorder.rows[before:]):
                recorder.rows.append(
                    {"entry": entry["name"], "error": f"{type(error).__name__}: {error}"[:300]}
                )
        if len(recorder.rows) == before:
            recorder.rows.append({"entry": entry["name"], "error": "it launched no kernel"})
    return recorder.rows


if __name__ == "__main__":
    json.dump(prove(json.load(sys.stdin)), sys.stdout)
