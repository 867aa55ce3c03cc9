# SPDX-License-Identifier: Apache-2.0
"""Running uv and pip without what the operator has configured for his own work.

A line in pip.conf, uv.toml or a variable can add an index, a constraint or a folder of wheels, and
the same inputs would then give another release on another builder. What only says how a server is
reached (a certificate, a proxy, a time-out, a cache) stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..core.runner import RunResult, run_program

_THEIRS = re.compile(r"(?:PIP|UV)_")
_REACHING = frozenset(
    {
        "PIP_CERT",
        "PIP_CLIENT_CERT",
        "PIP_PROXY",
        "PIP_RETRIES",
        "PIP_DEFAULT_TIMEOUT",
        "PIP_CACHE_DIR",
        "UV_CACHE_DIR",
        "UV_HTTP_TIMEOUT",
        "UV_HTTP_RETRIES",
        "UV_NATIVE_TLS",
        "UV_SYSTEM_CERTS",
    }
)
# User names and passwords of an index, which belong in no URL.
_PASSWORD = re.compile(r"UV_INDEX_\w+_(?:USERNAME|PASSWORD)")


def installer_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which uv and pip read no configuration but ours."""
    kept = {
        name: value
        for name, value in environ.items()
        if not _THEIRS.match(name) or name in _REACHING or _PASSWORD.fullmatch(name)
    }
    # What uv is told of the site's own certificates is meant for pip too, whose file is not read.
    bundle = {"PIP_CERT": kept["SSL_CERT_FILE"]} if kept.get("SSL_CERT_FILE") else {}
    return {**bundle, **kept, "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}


def run_installer(argv: Any, **options: Any) -> RunResult:
    """Run uv or pip as `run_program` does."""
    return run_program(argv, environ=installer_environment(os.environ), **options)
