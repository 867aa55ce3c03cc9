# SPDX-License-Identifier: Apache-2.0
"""Runs kernels on the CPU in Triton's interpreter and compares them with plain float32.

Run as a program: reads JSON on standard input (tree, capability, cases, part, parts) and writes one
JSON list of rows. Every tensor that a launcher makes stands between guard zones and begins as NaN,
so that a store outside of it, and a value that nobody wrote, are seen. Each case runs twice, with
the programs of a launch in both orders, because on a GPU none is guaranteed.

The interpreter has no bfloat16 of its own and misreads tables of it, so launchers get float32 where
they ask for bfloat16. What the kernels round themselves stays rounded.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import cases, modules


def reverse_programs(reverse: bool) -> None:
    """Let the interpreter run the programs of a launch from last to first."""
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def ordered(*bounds: int) -> Any:
        # Only the loop over the grid; conversions of numbers have loops of their own.
        of_grid = sys._getframe(1).f_code.co_name == "__call__"
        numbers = builtins.range(*bounds)
        return numbers[::-1] if of_grid else numbers

    if reverse:
        interpreter.__dict__["range"] = ordered
    else:
        interpreter.__dict__.pop("range", None)


class _AnyInt(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)


class _Int(metaclass=_AnyInt):
    """int as the interpreter needs it: numpy refuses arrays of one element since 2.4."""

    def __new__(cls, value: Any = 0) -> Any:
        return int(value.item() if getattr(value, "size", 0) == 1 else value)


def first_configuration() -> None:
    """Let an autotuner take its first configuration: the interpreter has no time to measure."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    importlib.import_module("triton.runtime.interpreter").__dict__["int"] = _Int

    def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        chosen = {
            key: value
            for key, value in kernel.configs[0].all_kwargs().items()
            if key in kernel.arg_names
        }
        return kernel.fn.run(*arguments, **{**options, **chosen, "warmup": False})

    tuner.run = run


def run_case(torch: Any, case: Mapping[str, Any], reverse: bool) -> dict[str, Any]:
    """Run one case in one order of programs."""
    begun = time.monotonic()
    row: dict[str, Any] = {
        "case": case["name"],
        "order": "last program first" if reverse else "first program first",
    }
    try:
        reverse_programs(reverse)
        # float32 where a launcher asks for bfloat16: see above.
        row.update(cases.run(torch, case, device="cpu", half=torch.float32))
    except Exception as error:  # noqa: BLE001 - a kernel may raise anything
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    finally:
        reverse_programs(False)
    row["seconds"] = round(time.monotonic() - begun, 2)
    return row


def conform(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run the cases of this part and return the rows."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    major, minor = (int(part) for part in task["capability"].split("."))
    modules.prepare(Path(task["tree"]), [each["module"] for each in task["cases"]], (major, minor))
    first_configuration()
    todo = [(case, reverse) for case in task["cases"] for reverse in (False, True)]
    return [run_case(torch, *each) for each in todo[task["part"] :: task["parts"]]]


if __name__ == "__main__":
    json.dump(conform(json.load(sys.stdin)), sys.stdout)
