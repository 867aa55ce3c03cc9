# SPDX-License-Identifier: Apache-2.0
"""Which CUDA build of vLLM every node of the fleet can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import FleetError
from ..core.format import parse_version


def choose_variant(
    variants: Sequence[Mapping[str, Any]], drivers: Mapping[str, str], stated: str = ""
) -> dict[str, Any]:
    """Choose the newest variant whose ``min_driver`` every driver reaches.

    ``drivers`` maps host -> driver version as preflight saw it; ``stated`` counts where it
    saw none. Without both the newest variant is taken. Returns ``variant`` and, in one
    sentence, ``reason``. Raises `FleetError` when a driver is too old for every variant.
    """
    if not variants:
        raise FleetError(
            "There is no CUDA build to choose from",
            expected="release_base_wheel, or at least one entry of release_cuda_variants",
            found="neither",
            remedy="set release_base_wheel",
        )
    newest_first = sorted(
        variants, key=lambda each: parse_version(str(each["min_driver"])), reverse=True
    )
    seen = {host: driver for host, driver in drivers.items() if driver}
    if not seen and stated:
        seen = {"release_driver": stated}
    if not seen:
        first = newest_first[0]
        reason = "the newest: preflight did not run, and release_driver is not set"
        return {"variant": first, "reason": f"{first['name']}, {reason}"}
    oldest = min(seen.values(), key=parse_version)
    for variant in newest_first:
        if parse_version(oldest) >= parse_version(str(variant["min_driver"])):
            reason = f"the oldest driver is {oldest}, and it needs {variant['min_driver']}"
            return {"variant": variant, "reason": f"{variant['name']}: {reason}"}
    least = newest_first[-1]
    old = [
        f"{host} has {driver}"
        for host, driver in sorted(seen.items())
        if parse_version(driver) < parse_version(str(least["min_driver"]))
    ]
    raise FleetError(
        "The NVIDIA driver of a node is too old for every CUDA build",
        expected=f"{least['min_driver']} or newer, for {least['name']}",
        found="; ".join(old),
        remedy="install a newer driver there, or take the node out of gpu_nodes",
    )
