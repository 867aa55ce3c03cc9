# SPDX-License-Identifier: Apache-2.0
"""Names of files that come from outside: data, until they are shown to stay in their folder."""

from __future__ import annotations

from pathlib import PurePosixPath

from .errors import FleetError

_LONGEST_PATH = 1024
# Of one part, in bytes, as file systems have it; with room for what is written beside a file.
_LONGEST_NAME = 200


def relative_path(text: str, owner: str) -> str:
    """Return ``text`` if it is a plain path below a folder, and refuse it otherwise.

    Called where a name becomes an object, so that whoever has the object can join it to a folder.
    ``owner`` says in the error what named it. A plain path has one form: no leading slash, no
    ``.``, ``..`` or empty part, no backslash, no control character, and names that a file system
    can hold.
    """
    found = _objection(text)
    if found:
        raise FleetError(
            f"{owner} names a file outside its folder, or one that cannot be written",
            expected="a relative path of plain names, such as config/a.json",
            found=f"{text[:200]!a}: {found}",
            remedy="do not use it: find out who made it",
        )
    return text


def file_name(text: str, owner: str) -> str:
    """Return ``text`` if it is the plain name of one file, and refuse it otherwise."""
    relative_path(text, owner)
    if "/" in text:
        raise FleetError(
            f"{owner} names a file in another folder",
            expected="the name of a file, without a folder",
            found=ascii(text[:200]),
            remedy="do not use it: find out who made it",
        )
    return text


def _objection(text: str) -> str:
    if not text or len(text) > _LONGEST_PATH:
        return f"{len(text)} characters"
    if "\\" in text or not text.isprintable():
        return "a character that is not plain"
    if text.startswith("/"):
        return "it begins at the root"
    parts = text.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "a part that is no name"
    if max(len(part.encode()) for part in parts) > _LONGEST_NAME:
        return "a name that is too long"
    return "" if str(PurePosixPath(text)) == text else "another form of a path"
