# SPDX-License-Identifier: Apache-2.0
"""Speculation: several tokens a step, and the pull requests that answer wrongly with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import FleetError

_HEAD = "3740c02bb1223d37823593664ae3eafa397b9937"


@dataclass(frozen=True)
class _Fault:
    """What is wrong with heads of pull requests while a step has several tokens a sequence."""

    name: str
    heads: tuple[str, ...]
    symptom: str


# Named as a correction's `Mends` line names them (roles/release/files/corrections).
_FAULTS = (
    _Fault("lengths-of-two-dimensions", (_HEAD,), "a request selects the tokens of another length"),
    _Fault(
        "packing-of-float8-queries",
        (_HEAD,),
        "where decode lengths differ, queries are packed by a kernel of float8 e4m3 that does not "
        "compile for an A100, and the engine ends",
    ),
)


def speculative_config(wanted: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return the value of vLLM's ``--speculative-config``, '' while ``wanted`` is empty.

    ``wanted`` is ``serving_speculative``, ``manifest`` that of the release. Raises `FleetError`
    for a setting that is none, and for a release with a fault that speculation meets.
    """
    if not wanted:
        return ""
    tokens = wanted.get("num_speculative_tokens")
    if not wanted.get("method") or isinstance(tokens, bool) or not isinstance(tokens, int):
        raise FleetError(
            "serving_speculative cannot be used",
            expected="{}, or method and num_speculative_tokens as vLLM's --speculative-config",
            found=json.dumps(dict(wanted), sort_keys=True, default=str),
            remedy="correct serving_speculative",
        )
    faults = _open(manifest.get("provenance") or {})
    if faults:
        raise FleetError(
            "Speculation is wrong with this release",
            expected=f"a correction that mends {', '.join(each.name for each in faults)}",
            found="; ".join(f"{each.name}: {each.symptom}" for each in faults),
            remedy="set serving_speculative: {}, or name a corrected head, or a correction in "
            "release_patches",
        )
    return json.dumps(dict(wanted), sort_keys=True, separators=(",", ":"))


def _open(provenance: Mapping[str, Any]) -> list[_Fault]:
    """Return the faults of a release's heads that none of its corrections mends."""
    source = (provenance.get("inputs") or {}).get("source") or {}
    heads = {each.get("head") for each in source.get("pull_requests") or []}
    mended = {
        name for each in provenance.get("corrections") or [] for name in each.get("mends", [])
    }
    return [each for each in _FAULTS if heads & {*each.heads} and each.name not in mended]
