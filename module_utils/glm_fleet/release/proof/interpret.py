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

from . import modules

_GUARD = 4096
_MARK = 7.0


class GuardedTorch:
    """torch as a module under proof sees it: what it allocates is guarded and poisoned."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._zones: list[tuple[Any, int]] = []
        self.bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def empty(self, *shape: Any, dtype: Any = None, **options: Any) -> Any:
        torch = self._torch
        dims = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        kind = dtype or torch.float32
        if not kind.is_floating_point:
            return torch.empty(dims, dtype=kind)
        count = 1
        for each in dims:
            count *= each
        zone = torch.full((count + 2 * _GUARD,), _MARK, dtype=kind)
        self._zones.append((zone, count))
        inside = zone[_GUARD : _GUARD + count]
        inside.fill_(float("nan"))
        return inside.view(dims)

    def full(self, shape: Any, value: Any, *, dtype: Any = None, **options: Any) -> Any:
        return self.empty(shape, dtype=dtype).fill_(value)

    def zeros(self, *shape: Any, dtype: Any = None, **options: Any) -> Any:
        return self.empty(*shape, dtype=dtype).fill_(0)

    def empty_like(self, like: Any, *, dtype: Any = None, **options: Any) -> Any:
        return self.empty(tuple(like.shape), dtype=dtype or like.dtype)

    def written_outside(self) -> int:
        """Count the values in the guard zones that a kernel wrote."""
        total = 0
        for zone, count in self._zones:
            outside = self._torch.cat([zone[:_GUARD], zone[_GUARD + count :]])
            total += int((outside != _MARK).sum())
        return total


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


def _first_configuration() -> None:
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


# -- the cases: inputs, the launch, and the reference in float32 ---------------------------
def prefill(torch: Any, launch: Any, case: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Logits of queries over ranges of gathered keys: (found, wanted, where to compare)."""
    heads, dim, count = case["heads"], case["dim"], case["keys"]
    starts = torch.tensor([each[0] for each in case["ranges"]], dtype=torch.int32)
    ends = torch.tensor([each[1] for each in case["ranges"]], dtype=torch.int32)
    q = torch.randn(len(starts), heads, dim).to(torch.float8_e4m3fn)
    keys = torch.randn(count, dim).to(torch.float8_e4m3fn)
    scales, weights = torch.rand(count) + 0.5, torch.randn(len(starts), heads)
    found = launch(q, (keys, scales), weights, starts, ends, clean_logits=False)
    wanted = _scores(torch, q.float(), keys.float(), weights) * scales
    place = torch.arange(count)
    outside = (place < starts[:, None]) | (place >= ends[:, None])
    wanted = wanted.masked_fill(outside, float("-inf"))
    return found, wanted, torch.ones_like(outside)


def decode(torch: Any, launch: Any, case: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Logits of the last queries of every sequence over its pages."""
    heads, dim, block, steps = case["heads"], case["dim"], case["block"], case["next_n"]
    lengths = torch.tensor(case["lengths"], dtype=torch.int32)
    width, pages = case["width"], -(-max(case["lengths"]) // block)
    count = len(lengths)
    q = torch.randn(count, steps, heads, dim).to(torch.float8_e4m3fn)
    weights = torch.randn(count * steps, heads)
    cache = torch.zeros(count * pages, block, 1, dim + 4, dtype=torch.uint8)
    flat = cache.view(count * pages, -1)
    keys = torch.randn(count * pages, block * dim).to(torch.float8_e4m3fn)
    scales = torch.rand(count * pages, block) + 0.5
    flat[:, : block * dim] = keys.view(torch.uint8)
    flat[:, block * dim :] = scales.view(torch.uint8)
    # Pages in another order than that of the sequences.
    table = torch.randperm(count * pages).to(torch.int32).view(count, pages)
    per_step = lengths[:, None] - steps + 1 + torch.arange(steps, dtype=torch.int32)
    given = lengths if case["dimensions"] == 1 else per_step
    found = launch(
        q, cache, weights, given.to(torch.int32), table, max_model_len=width, clean_logits=False
    )
    wanted = torch.zeros(count * steps, width)
    for row in range(count * steps):
        sequence, step = divmod(row, steps)
        mine = table[sequence].long()
        own = keys[mine].float().view(-1, dim)[:width]
        scored = _scores(torch, q[sequence, step].float()[None], own, weights[row][None])[0]
        wanted[row, : len(own)] = scored * scales[mine].view(-1)[:width]
    compared = torch.arange(width) < per_step.reshape(-1)[:, None]
    return found, wanted, compared


def attention(torch: Any, launch: Any, case: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Attention over selected slots; -1 marks an unused place."""
    heads, slots, topk = case["heads"], case["slots"], case["topk"]
    latent, rope = case["latent"], case["rope"]
    used = case["used"]
    q = torch.randn(len(used), heads, latent + rope)
    kv = torch.randn(slots, 1, latent + rope)
    indices = torch.full((len(used), 1, topk), -1, dtype=torch.int32)
    for row, each in enumerate(used):
        places = torch.randperm(topk)[:each]
        indices[row, 0, places] = torch.randperm(slots)[:each].to(torch.int32)
    scale = (latent + rope) ** -0.5
    found = launch(q, kv, indices, scale, num_kv_splits=case["splits"], sm_count=108)
    chosen = kv[indices[:, 0].clamp(min=0).long(), 0]
    scores = torch.einsum("thd,tkd->thk", q, chosen) * scale
    scores = scores.masked_fill(indices < 0, float("-inf"))
    shares = torch.nan_to_num(torch.softmax(scores, dim=-1))
    wanted = torch.einsum("thk,tkd->thd", shares, chosen[..., :latent])
    return found.float(), wanted, torch.ones(wanted.shape, dtype=torch.bool)


def _scores(torch: Any, q: Any, keys: Any, weights: Any) -> Any:
    return torch.einsum("mhn,mh->mn", torch.einsum("mhd,nd->mhn", q, keys).relu(), weights)


_KINDS = {"prefill": prefill, "decode": decode, "attention": attention}


def compare(torch: Any, found: Any, wanted: Any, where: Any, tolerance: float) -> int:
    """Count the values that differ by more than ``tolerance``, of the value or of one."""
    if found.shape != wanted.shape:
        return int(wanted.numel())
    same_infinity = torch.isinf(wanted) & (found == wanted)
    near = (found - wanted).abs() <= tolerance * torch.clamp(wanted.abs(), min=1.0)
    return int((~(near | same_infinity) & where).sum())


def run_case(torch: Any, case: Mapping[str, Any], reverse: bool) -> dict[str, Any]:
    """Run one case in one order of programs."""
    begun = time.monotonic()
    row: dict[str, Any] = {
        "case": case["name"],
        "order": "last program first" if reverse else "first program first",
    }
    torch.manual_seed(0)
    try:
        launch = modules.function(case["module"], case["function"])
        guarded = GuardedTorch(torch)
        launch.__globals__["torch"] = guarded
        reverse_programs(reverse)
        found, wanted, where = _KINDS[case["kind"]](torch, launch, case)
        row["outside"] = guarded.written_outside()
        row["wrong"] = compare(torch, found, wanted, where, case["tolerance"])
        row["of"] = int(where.sum())
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
    _first_configuration()
    todo = [(case, reverse) for case in task["cases"] for reverse in (False, True)]
    return [run_case(torch, *each) for each in todo[task["part"] :: task["parts"]]]


if __name__ == "__main__":
    json.dump(conform(json.load(sys.stdin)), sys.stdout)
