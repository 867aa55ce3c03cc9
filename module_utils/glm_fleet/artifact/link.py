# SPDX-License-Identifier: Apache-2.0
"""The link that says which artifact is active."""

from __future__ import annotations

import os
from pathlib import Path

from ..core.errors import FleetError


def point_link(link: Path, target: Path) -> bool:
    """Point a symbolic link at an artifact by one rename; tell whether it changed."""
    if not target.is_dir():
        raise FleetError(
            "An artifact that is not published cannot be activated",
            expected=f"the folder {target}",
            found="no such folder",
            remedy="distribute it first",
        )
    if link.is_symlink() and link.readlink() == target:
        return False
    if link.exists() and not link.is_symlink():
        raise FleetError(
            "The place of a symbolic link is taken",
            expected=f"{link} to be a symbolic link or absent",
            found="a file or folder that is none",
            remedy=f"move {link} away",
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    scratch.replace(link)
    return True
