# SPDX-License-Identifier: Apache-2.0
"""The defaults of a role as its tasks see them, with those that roles share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).resolve().parents[1] / "roles"


def defaults(role: str) -> dict[str, Any]:
    """Return {variable: default}; an expression is text."""
    files = [ROLES / each / "defaults/main.yml" for each in ("common", role)]
    return {
        name: value for file in files for name, value in yaml.safe_load(file.read_text()).items()
    }
