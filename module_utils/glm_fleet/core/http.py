# SPDX-License-Identifier: Apache-2.0
"""A small HTTP client for the server on this host."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Protocol


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
            text = error.read().decode(errors="replace")
            return error.code, iter([text])
        except (OSError, http.client.HTTPException) as error:
            return 0, iter([f"{type(error).__name__}: {error}"])
        return int(answer.status), _lines(answer)

    return ask


def _lines(answer: Any) -> Iterator[str]:
    with answer:
        try:
            for line in answer:
                yield line.decode(errors="replace").rstrip("\n")
        except (OSError, http.client.HTTPException) as error:
            # The caller sees a stream that ended early, which is what happened.
            yield f"error: the stream broke off: {type(error).__name__}"
