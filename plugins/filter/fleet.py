# SPDX-License-Identifier: Apache-2.0
"""Registers the filters of plugins/plugin_utils/glm_filters.py, and loads them when one is used.

Ansible loads this file for every task of every host that uses a filter, also one of Jinja's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

FILTERS = (
    "doors_of",
    "lacking",
    "offers",
    "hub_share",
    "pushed_to",
    "taking_part",
    "addresses",
    "host_address",
    "artifact_of",
    "artifacts_of_run",
    "protected_on",
    "drivers",
    "cuda_variant",
    "correction_texts",
    "pinned_lock",
    "serve_command",
    "environment_file",
    "library_digest",
    "graph_mode",
    "speculative_config",
    "graph_rungs",
    "graph_remark",
    "failed_turns",
    "rehearsing",
    "small_files",
    "rollback_target",
    "node_endpoints",
    "client_digests",
    "clients_table",
    "plan_endpoints",
    "reached_at",
)
_HOME = str(Path(__file__).resolve().parents[1] / "plugin_utils")


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {name: _later(name) for name in FILTERS}


def _later(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if _HOME not in sys.path:
            sys.path.insert(0, _HOME)
        return getattr(import_module("glm_filters"), name)(*arguments, **options)

    return call
