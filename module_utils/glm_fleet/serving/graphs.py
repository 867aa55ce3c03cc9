# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: the modes, what each is worth, and which one a node starts with.

Between two tokens every layer launches its kernels. Launched from Python that takes longer than
the kernels themselves; a graph launches them all at once. Measured on an H100 with 78 layers
(docs/performance.md), tokens a second, and the median request of 32 clients with short ones:

    mode                 1 stream   32 streams   short request
    full_and_piecewise         87        1,118           1.5 s
    full_decode_only           87        1,118           4.7 s
    piecewise                  17          674           1.6 s
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import FleetError

AUTO = "auto"
# The fault of a release that full graphs crash with, as release_known_faults names it.
LOGITS_PAST_THE_ROW = "logits-past-the-row"


@dataclass(frozen=True)
class Mode:
    """A mode of CUDA graphs.

    ``vllm`` is vLLM's name for it, '' where it has a flag of its own. ``lower`` are the modes
    that a node may step down to, best first. ``price`` says what the mode costs against the
    best one.
    """

    vllm: str
    lower: tuple[str, ...]
    price: str


# Nothing steps down to full_decode_only: it captures the same full graphs, so what crashes in
# them crashes there too, and finding that out costs a cold start.
MODES = {
    "full_and_piecewise": Mode("FULL_AND_PIECEWISE", ("piecewise", "eager"), ""),
    "full_decode_only": Mode(
        "FULL_DECODE_ONLY",
        ("piecewise", "eager"),
        "about a third of the speed while short requests come and go",
    ),
    "piecewise": Mode(
        "PIECEWISE",
        ("eager",),
        "about a fifth of the speed in one stream and 0.6 of it in 32",
    ),
    "eager": Mode(
        "",
        (),
        "less than piecewise graphs: a fifth of the speed in one stream, a third of it in 32",
    ),
}
_BEST, _BEST_WITH_THE_FAULT = "full_and_piecewise", "piecewise"


def open_faults(manifest: Mapping[str, Any]) -> list[str]:
    """Name the faults that a release is known to have, from its manifest.

    Those that its recipe accepted; of a release from before faults were looked for, the one that
    decides about graphs, if it carries a pull request at all.
    """
    inputs = (manifest.get("provenance") or {}).get("inputs") or {}
    source = inputs.get("source") or {}
    if "accepted_faults" in source:
        return [str(name) for name in source["accepted_faults"] or []]
    return [LOGITS_PAST_THE_ROW] if source.get("pull_requests") else []


def resolve(wanted: str, faults: list[str]) -> str:
    """Return the mode that ``serving_cuda_graphs`` stands for on a release with these faults.

    `AUTO` is the best mode that the release can be trusted with; anything else is what the
    operator chose. Raises `FleetError` for a mode that nobody knows.
    """
    if wanted == AUTO:
        return _BEST_WITH_THE_FAULT if LOGITS_PAST_THE_ROW in faults else _BEST
    if wanted not in MODES:
        raise FleetError(
            "The mode of CUDA graphs is unknown",
            expected=f"serving_cuda_graphs to be one of {', '.join([AUTO, *MODES])}",
            found=wanted,
        )
    return wanted


def rungs(mode: str, *, fallback: bool = False) -> list[str]:
    """Return the mode and, with ``fallback``, those a node may step down to, best first."""
    return [mode, *(MODES[mode].lower if fallback else ())]


def remark(wanted: str, mode: str, faults: list[str]) -> str:
    """Say what a person should know of the mode that was chosen, '' if there is nothing."""
    if LOGITS_PAST_THE_ROW not in faults:
        return ""
    if wanted == AUTO:
        return (
            f"CUDA graphs {mode}: this release has the fault {LOGITS_PAST_THE_ROW}, with which "
            f"full graphs crash; a corrected one would use {_BEST} (now {MODES[mode].price})"
        )
    if MODES[mode].vllm.startswith("FULL"):
        return (
            f"CUDA graphs {mode} were asked for, and this release has the fault "
            f"{LOGITS_PAST_THE_ROW}, with which they crash"
        )
    return ""


def price_of(mode: str) -> str:
    """Return what a mode costs against the best one, in words; '' for the best and unknown ones."""
    return MODES[mode].price if mode in MODES else ""
