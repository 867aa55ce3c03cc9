# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own diagnosis of a node's GPUs, where it is installed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from typing import Any

from ...core.runner import Runner

_TIMEOUT_S = 900.0


def diagnose(run: Runner, level: int) -> list[dict[str, Any]] | None:
    """Run ``dcgmi diag`` of a level: the rows of `parse_dcgm`, None where there is no dcgmi."""
    if not shutil.which("dcgmi"):
        return None
    done = run(["dcgmi", "diag", "-r", str(level), "-j"], timeout=_TIMEOUT_S, check=False)
    rows = read_dcgm(done.stdout)
    if rows:
        return rows
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-300:]
    # A service that does not run says nothing of the GPUs.
    return [{"test": "dcgmi", "gpu": None, "status": "skip", "said": said or "no answer"}]


def read_dcgm(text: str) -> list[dict[str, Any]]:
    """Read what ``dcgmi diag -j`` printed, also after other words; [] for anything else."""
    begin = text.find("{")
    try:
        return parse_dcgm(json.loads(text[begin:])) if begin >= 0 else []
    except (ValueError, RecursionError):
        return []


def parse_dcgm(answer: Any) -> list[dict[str, Any]]:
    """Return the rows {test, gpu, status, said} of ``dcgmi diag -j``, of any version.

    ``status`` is pass, warn, fail or skip; ``gpu`` None for a test of the node. What has no
    status is passed over: nothing here is refused.
    """
    rows: list[dict[str, Any]] = []

    def walk(value: Any, test: str, depth: int) -> None:
        if depth > 12 or len(rows) > 1000:
            return
        if isinstance(value, list):
            for each in value:
                walk(each, test, depth + 1)
        elif isinstance(value, Mapping):
            status = value.get("status")
            if isinstance(status, str):
                rows.append(_dcgm_row(value, status, test))
            name = value.get("name")
            for key, each in value.items():
                if key not in ("status", "warnings", "info"):
                    walk(each, name if isinstance(name, str) else test, depth + 1)

    walk(answer, "", 0)
    return rows


def _dcgm_row(value: Mapping[str, Any], status: str, test: str) -> dict[str, Any]:
    said = value.get("warnings") or value.get("info") or ""
    number = next(
        (
            int(text)
            for key in ("entity_id", "gpu_id", "gpu_ids")
            if re.fullmatch(r"[0-9]{1,4}", text := str(value.get(key, "")))
        ),
        None,
    )
    kind = status.strip().lower()
    return {
        "test": str(value.get("name") or test)[:100],
        "gpu": number,
        "status": kind if kind in ("pass", "warn", "fail") else "skip",
        "said": " ".join(re.sub(r"[\[\]{}\"']", " ", str(said)).split())[:300],
    }
