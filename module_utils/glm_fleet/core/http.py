# SPDX-License-Identifier: Apache-2.0
"""A small HTTP client for the server on this host."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

_LONGEST_LINE = 1024 * 1024
_LONGEST = 64 * 1024 * 1024
# How many time-outs a whole answer may take.
_PATIENCE = 10


class Http(Protocol):
    """What a probe needs of HTTP: status and lines of the body, as they arrive."""

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]: ...


def local_http(
    port: int, *, address: str = "127.0.0.1", api_key: str = "", timeout_s: float = 300.0
) -> Http:
    """Return a client of the server on this node. A connection that fails is status 0.

    ``address`` is the one that the server is bound to.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, address)  # noqa: S104

    def ask(path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Iterator[str]]:
        request = urllib.request.Request(
            f"http://{host}:{port}{path}",
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"},
        )
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        try:
            answer = urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310
        except urllib.error.HTTPError as error:
            return error.code, _lines(error, timeout_s)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return 0, iter([f"{type(error).__name__}: {error}"])
        return int(answer.status), _lines(answer, timeout_s)

    return ask


def _lines(answer: Any, timeout_s: float) -> Iterator[str]:
    """Yield the lines of a body; where it breaks off or does not end, the last one says so."""
    # The time-out is for each byte: a server that sends one now and then never reaches it.
    end, received = time.monotonic() + _PATIENCE * timeout_s, 0
    with answer:
        try:
            while line := answer.readline(_LONGEST_LINE):
                received += len(line)
                if received > _LONGEST or time.monotonic() > end:
                    yield "error: the answer does not end"
                    return
                yield line.decode(errors="replace").rstrip("\n")
        except (OSError, ValueError, http.client.HTTPException) as error:
            # The caller sees a stream that ended early, which is what happened.
            yield f"error: the stream broke off: {type(error).__name__}"
