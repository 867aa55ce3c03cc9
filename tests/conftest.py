# SPDX-License-Identifier: Apache-2.0
"""Makes `glm_fleet` and `lab` importable where the tests run."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "module_utils")]
