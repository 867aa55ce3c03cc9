# SPDX-License-Identifier: Apache-2.0
"""Do the kernels of a backend compute what plain float32 does, and only inside their rows?

On the builder, without a GPU: in Triton's interpreter, on small inputs whose lengths are not
multiples of anything. What a GPU's rounding does is not seen here; where a kernel reads and writes
is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from .proof.environment import ProofEnvironment

_LOGITS = {"module": "vllm.v1.attention.ops.mqa_logits_triton", "tolerance": 2e-3}
_PREFILL = {
    **_LOGITS,
    "kind": "prefill",
    "function": "fp8_mqa_logits_triton",
    "heads": 32,
    "dim": 128,
}
_DECODE = {
    **_LOGITS,
    "kind": "decode",
    "function": "fp8_paged_mqa_logits_triton",
    "heads": 32,
    "dim": 128,
    "block": 64,
    "next_n": 1,
    "dimensions": 1,
}
_ATTENTION = {
    "kind": "attention",
    "module": "vllm.v1.attention.ops.triton_mla_sparse_kernel",
    "function": "triton_mla_sparse_attention",
    # The result is rounded to bfloat16, which has 8 bits.
    "tolerance": 1e-2,
    "heads": 8,
    "slots": 100,
    "topk": 64,
    "latent": 512,
    "rope": 64,
    "used": [64, 1, 0, 37],
}
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "TRITON_MLA_SPARSE": (
        {
            **_PREFILL,
            "name": "prefill logits of ragged ranges",
            "keys": 150,
            "ranges": [[0, 150], [0, 1], [97, 149], [64, 64], [130, 150]],
        },
        {**_DECODE, "name": "decode logits, three rows of 100", "lengths": [100] * 3, "width": 100},
        {
            **_DECODE,
            "name": "decode logits of ragged lengths",
            "lengths": [97, 149, 1, 150],
            "width": 150,
        },
        {**_DECODE, "name": "decode logits, rows of one", "lengths": [1] * 9, "width": 1},
        {
            **_DECODE,
            "name": "decode logits in rows wider than needed",
            "lengths": [65, 128],
            "width": 256,
        },
        {
            **_DECODE,
            "name": "decode logits, lengths of two dimensions",
            "lengths": [97, 33],
            "width": 97,
            "dimensions": 2,
        },
        {
            **_DECODE,
            "name": "decode logits, two queries a sequence",
            "lengths": [97, 150, 66],
            "width": 150,
            "next_n": 2,
            "dimensions": 2,
        },
        {**_ATTENTION, "name": "sparse attention in one pass", "splits": 1},
        {**_ATTENTION, "name": "sparse attention in two splits", "splits": 2},
    ),
}
_TIMEOUT_S = 1200.0

# The same kernels at the shapes that one of 8 GPUs has of GLM-5.2: what node/acceptance runs.
_RAGGED = [2117 + 181 * place + place % 7 for place in range(32)]
_FULL_ATTENTION = {
    **_ATTENTION,
    # Scores that spread as trained ones do; compared as a share of a typical value.
    "sharpness": 3.0,
    "floor": 0.1,
    "tolerance": 4e-2,
    "slots": 65536,
    "topk": 2048,
    "used": [2048, 2047, 1, 0, 65, 1000, 1999, 2048] * 4,
}
AT_FULL_SIZE: dict[str, tuple[dict[str, Any], ...]] = {
    "TRITON_MLA_SPARSE": (
        {
            **_PREFILL,
            "name": "prefill logits",
            "keys": 8191,
            "ranges": [[0, 8191], [0, 1], [63, 4099], [8000, 8000], [8190, 8191], [5, 2053]] * 8,
        },
        {**_DECODE, "name": "decode logits, 1 sequence", "lengths": [5001], "width": 5001},
        {
            **_DECODE,
            "name": "decode logits, 32 sequences alike",
            "lengths": [5000] * 32,
            "width": 5000,
        },
        {
            **_DECODE,
            "name": "decode logits, 32 sequences, ragged",
            "lengths": _RAGGED,
            "width": max(_RAGGED),
        },
        {
            **_DECODE,
            "name": "decode logits, 16 sequences in rows of the whole context",
            "lengths": [6001 + place for place in range(16)],
            "width": 32768,
        },
        {
            **_DECODE,
            "name": "decode logits, lengths of two dimensions",
            "lengths": [2999, 5000, 4097, 2113, 3333, 4999, 65],
            "width": 5000,
            "dimensions": 2,
        },
        {
            **_DECODE,
            "name": "decode logits, two queries a sequence",
            "lengths": [2999, 5000, 4097, 2113],
            "width": 5000,
            "next_n": 2,
            "dimensions": 2,
        },
        {**_FULL_ATTENTION, "name": "sparse attention in one pass", "splits": 1},
        {**_FULL_ATTENTION, "name": "sparse attention in 8 splits", "splits": 8},
        {
            **_FULL_ATTENTION,
            "name": "sparse attention of 1 sequence",
            "splits": None,
            "used": [2048],
        },
    ),
}


def prove_conformance(
    environment: ProofEnvironment, tree: Path, *, backend: str, capability: str
) -> dict[str, Any]:
    """Run every case of a backend in both orders; return the figures for the manifest.

    Raises `FleetError` with every case that computes something else.
    """
    begun = time.monotonic()
    rows = environment.run_parts(
        "interpret",
        {"tree": str(tree), "capability": capability, "cases": list(CASES.get(backend, ()))},
        timeout=_TIMEOUT_S,
    )
    judge(rows)
    return {
        "cases": len(rows),
        "values": sum(row["of"] for row in rows),
        "seconds": round(time.monotonic() - begun, 1),
    }


def judge(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse kernels that write outside their rows or compute something else."""
    problems = []
    for row in rows:
        name = f"{row['case']} ({row['order']})"
        if "error" in row:
            problems.append(f"{name}: {row['error']}")
            continue
        if row["outside"]:
            problems.append(f"{name}: {row['outside']} values written outside the result")
        if row["wrong"]:
            problems.append(f"{name}: {row['wrong']} of {row['of']} values are wrong")
    if problems:
        raise FleetError(
            f"The kernels of this release compute something else in {len(problems)} places",
            expected="the values of a float32 reference, and nothing written outside the result",
            found="; ".join(problems[:12]),
            remedy="name a correction in release_patches, another head, or another ref",
            details={"conformance": [dict(row) for row in rows]},
        )
