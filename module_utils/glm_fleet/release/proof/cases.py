# SPDX-License-Identifier: Apache-2.0
"""What a proof of kernels compares: inputs, the release's launcher, and the same in plain float32.

The same cases run in Triton's interpreter on the builder and on the GPUs of a node. Every tensor
that a launcher makes stands between guard zones and begins as NaN, so that a store outside of it,
and a value that nobody wrote, are seen. Inputs are drawn on the CPU: every device gets the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import modules

_GUARD = 4096
_MARK = 7.0


class GuardedTorch:
    """torch as a module under proof sees it: what it allocates is guarded and poisoned."""

    def __init__(self, torch: Any, device: str, half: Any) -> None:
        self._torch = torch
        self._device = device
        self._zones: list[tuple[Any, int]] = []
        self.bfloat16 = half

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def empty(self, *shape: Any, dtype: Any = None, **options: Any) -> Any:
        torch = self._torch
        dims = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        kind = dtype or torch.float32
        if not kind.is_floating_point:
            return torch.empty(dims, dtype=kind, device=self._device)
        count = 1
        for each in dims:
            count *= each
        zone = torch.full((count + 2 * _GUARD,), _MARK, dtype=kind, device=self._device)
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


def run(
    torch: Any, case: Mapping[str, Any], *, device: str, half: Any, seed: int = 0
) -> dict[str, Any]:
    """Run one case on a device; ``half`` is what a launcher gets as bfloat16.

    Returns ``outside`` (values written outside the result), ``wrong`` of ``of`` values that were
    compared, and ``worst``, the largest difference as a share of the value or of the floor.
    """
    torch.manual_seed(seed)
    launch = modules.function(case["module"], case["function"])
    guarded = GuardedTorch(torch, device, half)
    launch.__globals__["torch"] = guarded
    found, wanted, where = _KINDS[case["kind"]](torch, launch, case, device, half)
    # The floor keeps values near zero from being compared with zero.
    floor = case.get("floor", 1.0)
    wrong, worst = compare(torch, found, wanted, where, case["tolerance"], floor)
    return {
        "outside": guarded.written_outside(),
        "wrong": wrong,
        "of": int(where.sum()),
        "worst": worst,
    }


def prefill(
    torch: Any, launch: Any, case: Mapping[str, Any], device: str, half: Any
) -> tuple[Any, Any, Any]:
    """Logits of queries over ranges of gathered keys: (found, wanted, where to compare)."""
    heads, dim, count = case["heads"], case["dim"], case["keys"]
    starts = torch.tensor([each[0] for each in case["ranges"]], dtype=torch.int32).to(device)
    ends = torch.tensor([each[1] for each in case["ranges"]], dtype=torch.int32).to(device)
    q = torch.randn(len(starts), heads, dim).to(torch.float8_e4m3fn).to(device)
    keys = torch.randn(count, dim).to(torch.float8_e4m3fn).to(device)
    scales = (torch.rand(count) + 0.5).to(device)
    weights = torch.randn(len(starts), heads).to(device)
    found = launch(q, (keys, scales), weights, starts, ends, clean_logits=False)
    wanted = torch.stack(
        [
            _scores(torch, q[row].float()[None], keys.float(), weights[row][None])[0]
            for row in range(len(starts))
        ]
    )
    wanted = wanted * scales
    place = torch.arange(count, device=device)
    outside = (place < starts[:, None]) | (place >= ends[:, None])
    wanted = wanted.masked_fill(outside, float("-inf"))
    return found, wanted, torch.ones_like(outside)


def decode(
    torch: Any, launch: Any, case: Mapping[str, Any], device: str, half: Any
) -> tuple[Any, Any, Any]:
    """Logits of the last queries of every sequence over its pages."""
    heads, dim, block, steps = case["heads"], case["dim"], case["block"], case["next_n"]
    lengths = torch.tensor(case["lengths"], dtype=torch.int32)
    width, pages = case["width"], -(-max(case["lengths"]) // block)
    count = len(lengths)
    q = torch.randn(count, steps, heads, dim).to(torch.float8_e4m3fn).to(device)
    weights = torch.randn(count * steps, heads).to(device)
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
        q,
        cache.to(device),
        weights,
        given.to(torch.int32).to(device),
        table.to(device),
        max_model_len=width,
        clean_logits=False,
    )
    values, scales = keys.float().to(device), scales.to(device)
    wanted = torch.zeros(count * steps, width, device=device)
    for row in range(count * steps):
        sequence, step = divmod(row, steps)
        mine = table[sequence].long().to(device)
        own = values[mine].view(-1, dim)[:width]
        scored = _scores(torch, q[sequence, step].float()[None], own, weights[row][None])[0]
        wanted[row, : len(own)] = scored * scales[mine].view(-1)[:width]
    compared = torch.arange(width) < per_step.reshape(-1)[:, None]
    return found, wanted, compared.to(device)


def attention(
    torch: Any, launch: Any, case: Mapping[str, Any], device: str, half: Any
) -> tuple[Any, Any, Any]:
    """Attention over selected slots; -1 marks an unused place."""
    heads, slots, topk = case["heads"], case["slots"], case["topk"]
    latent, rope = case["latent"], case["rope"]
    used = case["used"]
    q = torch.randn(len(used), heads, latent + rope).to(half).to(device)
    kv = torch.randn(slots, 1, latent + rope).to(half).to(device)
    indices = torch.full((len(used), 1, topk), -1, dtype=torch.int32)
    for row, each in enumerate(used):
        places = torch.randperm(topk)[:each]
        indices[row, 0, places] = torch.randperm(slots)[:each].to(torch.int32)
    indices = indices.to(device)
    scale = case.get("sharpness", 1.0) * (latent + rope) ** -0.5
    found = launch(q, kv, indices, scale, num_kv_splits=case["splits"], sm_count=108)
    wanted = torch.stack(
        [
            _attended(torch, q[row].float(), kv[:, 0], indices[row, 0], scale, latent)
            for row in range(len(used))
        ]
    )
    return found.float(), wanted, torch.ones(wanted.shape, dtype=torch.bool, device=device)


def _attended(torch: Any, q: Any, kv: Any, indices: Any, scale: float, latent: int) -> Any:
    """Attention of one token in float32: q [heads, dim], kv [slots, dim], indices [topk]."""
    chosen = kv[indices.clamp(min=0).long()].float()
    scores = torch.einsum("hd,kd->hk", q, chosen) * scale
    scores = scores.masked_fill(indices < 0, float("-inf"))
    shares = torch.nan_to_num(torch.softmax(scores, dim=-1))
    return torch.einsum("hk,kd->hd", shares, chosen[:, :latent])


def _scores(torch: Any, q: Any, keys: Any, weights: Any) -> Any:
    return torch.einsum("mhn,mh->mn", torch.einsum("mhd,nd->mhn", q, keys).relu(), weights)


_KINDS = {"prefill": prefill, "decode": decode, "attention": attention}


def compare(
    torch: Any, found: Any, wanted: Any, where: Any, tolerance: float, floor: float = 1.0
) -> tuple[int, float]:
    """Compare two tensors in the places ``where``: (values that differ too much, worst share).

    A value may differ by ``tolerance``, as a share of itself or of ``floor``, whichever is more.
    """
    if found.shape != wanted.shape:
        return int(wanted.numel()), 1e9
    same_infinity = torch.isinf(wanted) & (found == wanted)
    share = (found - wanted).abs() / torch.clamp(wanted.abs(), min=floor)
    share = torch.where(same_infinity | ~where, torch.zeros_like(share), share)
    wrong = ~(share <= tolerance)
    # What is no number is as wrong as can be, and JSON has no infinity.
    known = torch.nan_to_num(share, nan=1e9, posinf=1e9)
    return int(wrong.sum()), float(known.max()) if known.numel() else 0.0
