# SPDX-License-Identifier: Apache-2.0
"""One file from a URL: resumed where it stopped, proven by its hash when that is known."""

from __future__ import annotations

import http.client
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from ..core.errors import FleetError
from ..core.files import sha256_file
from ..core.paths import file_name

_TIMEOUT_S = 60
_ATTEMPTS = 3
# Not OSError as a whole: a full disk is not the server's fault.
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def fetch_wheel(url: str, folder: Path) -> Path:
    """Bring the wheel of an http(s) URL into ``folder``, under the name that the URL has.

    ``#sha256=HEX`` at the end of the URL is checked. What a broken transfer brought is kept
    and continued. Raises `FleetError` when the file cannot be had or has another hash.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise FleetError(
            "The URL of the base wheel is not one of the web",
            expected="http or https; a file is named by its path",
            found=url,
            remedy="correct the base wheel",
        )
    name = wheel_name(url)
    wanted = dict(urllib.parse.parse_qsl(urllib.parse.urldefrag(url).fragment)).get("sha256", "")
    target = folder / name
    if target.is_file() and wanted in ("", sha256_file(target)):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.part"
    bare = urllib.parse.urldefrag(url).url
    for attempt in range(_ATTEMPTS):
        try:
            _continue(bare, partial)
            break
        except _BROKEN as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or attempt == _ATTEMPTS - 1:
                raise _unavailable(name, f"{type(error).__name__}: {error}") from error
    found = sha256_file(partial)
    if wanted and found != wanted:
        partial.unlink()
        raise FleetError(
            f"The wheel {name} has another hash than it should",
            expected=f"SHA-256 {wanted}",
            found=f"SHA-256 {found}",
            remedy="run again; if it stays so, the URL serves another file",
        )
    return partial.replace(target)


def wheel_name(url: str) -> str:
    """Return the file name at the end of a URL."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    return file_name(name, "The URL of the base wheel")


def _continue(url: str, partial: Path) -> None:
    """Append what is missing; begin anew when the server does not continue."""
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - the scheme is checked
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310 - the scheme is checked
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            # Nothing is missing, or the file is another one now: the hash will tell.
            return
        raise
    with response, partial.open("ab" if response.status == 206 else "wb") as sink:
        shutil.copyfileobj(response, sink, 1024 * 1024)
        length = response.headers.get("Content-Length")
        got = sink.tell() - (have if response.status == 206 else 0)
        if length is not None and got < int(length):
            raise http.client.IncompleteRead(b"", int(length) - got)


def _unavailable(name: str, reason: str) -> FleetError:
    return FleetError(
        f"The wheel {name} cannot be downloaded",
        expected="an answer of the server with the whole file",
        found=reason,
        remedy="check the URL of the base wheel and the network; what arrived is kept",
    )
