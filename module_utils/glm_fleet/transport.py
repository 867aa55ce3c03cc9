# SPDX-License-Identifier: Apache-2.0
"""Moving an artifact's files from one host to another over HTTP.

The seed offers files below one folder, to named addresses and holders of a secret only,
and only while a distribution runs. The receiver trusts nothing of what arrives: the
manifest came to it from the controller over SSH, and decides.

Run as a program, this is the seed::

    python3 -m glm_fleet.transport --root DIR --port 8009 --allow 192.0.2.12 --token-file F
"""

from __future__ import annotations

import argparse
import hmac
import http.server
import shutil
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Callable

from .artifact import FileEntry, Manifest, Store
from .errors import FleetError

DEFAULT_PORT = 8009
_TOKEN_HEADER = "X-Glm-Fleet-Token"  # noqa: S105 - the header's name, not a secret
_BLOCK = 1024 * 1024
_TIMEOUT_S = 60.0
_TRIES = 5


class SeedHandler(http.server.BaseHTTPRequestHandler):
    """Answers GET with byte ranges for files below the server's root."""

    protocol_version = "HTTP/1.1"
    server: SeedServer

    def do_GET(self) -> None:
        """Send one file, from the offset of a ``Range: bytes=N-`` header on."""
        if self.client_address[0] not in self.server.allowed:
            problem = f"{self.client_address[0]} is not in the inventory"
            self.send_error(HTTPStatus.FORBIDDEN, problem)
            return
        if not hmac.compare_digest(self.headers.get(_TOKEN_HEADER, ""), self.server.token):
            self.send_error(HTTPStatus.UNAUTHORIZED, "wrong token")
            return
        name = urllib.parse.unquote(self.path.lstrip("/"))
        path = (self.server.root / name).resolve()
        if not path.is_relative_to(self.server.root) or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND, "no such file")
            return
        size = path.stat().st_size
        start = _range_start(self.headers.get("Range", ""))
        if start > size:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "past the end")
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        self.send_header("Content-Length", str(size - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        with path.open("rb") as stream:
            stream.seek(start)
            shutil.copyfileobj(stream, self.wfile, _BLOCK)

    def log_message(self, format: str, *args: object) -> None:
        """Log to standard error: the journal of the transient unit."""
        sys.stderr.write(f"{self.client_address[0]} {format % args}\n")


class SeedServer(http.server.ThreadingHTTPServer):
    """A server that offers the files below ``root``."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], root: Path, allowed: Sequence[str], token: str
    ) -> None:
        self.root = root.resolve()
        self.allowed = frozenset(allowed)
        self.token = token
        super().__init__(address, SeedHandler)


def _range_start(header: str) -> int:
    text = header.removeprefix("bytes=").partition("-")[0]
    return int(text) if text.isdigit() else 0


def fetch_missing(
    store: Store,
    manifest: Manifest,
    sources: Sequence[str],
    token: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fetch every missing file of ``manifest`` into its staging folder, with resuming.

    ``sources`` are URLs of seeds; when one fails, the next is asked. Raises `FleetError`
    when a file cannot be had from any of them. What arrived stays for the next run.
    """
    if not sources:
        raise FleetError(
            f"Nobody offers the artifact {manifest.id}",
            expected="at least one source",
            found="none",
        )
    staging = store.stage(manifest)
    proven = store.proven(manifest.kind, manifest.id)
    for entry in store.missing(manifest):
        path = staging / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch_file(manifest, entry, path, sources, token, sleep)
        if proven.sha256(staging, entry.path) != entry.sha256:
            # Once more from the start: a resumed beginning may have been of other bytes.
            proven.forget(entry.path)
            path.unlink()
            _fetch_file(manifest, entry, path, sources, token, sleep)
        if proven.sha256(staging, entry.path) != entry.sha256:
            proven.forget(entry.path)
            path.unlink()
            raise FleetError(
                f"The source sends other bytes for {entry.path}",
                expected=f"SHA-256 {entry.sha256}",
                found="another one, twice",
                remedy="remove the artifact on the source, then run again: it is made anew",
            )


def _fetch_file(
    manifest: Manifest,
    entry: FileEntry,
    path: Path,
    sources: Sequence[str],
    token: str,
    sleep: Callable[[float], None],
) -> None:
    place = urllib.parse.quote(f"{manifest.kind}/{manifest.id}/{entry.path}")
    problem = "not tried"
    for attempt in range(_TRIES):
        source = sources[attempt % len(sources)]
        have = path.stat().st_size if path.exists() else 0
        if have > entry.size:
            path.unlink()
            have = 0
        if have == entry.size and path.exists():
            return
        request = urllib.request.Request(f"{source}/{place}")  # noqa: S310 - http only, ours
        request.add_header(_TOKEN_HEADER, token)
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                resumed = answer.status == HTTPStatus.PARTIAL_CONTENT
                with path.open("ab" if resumed else "wb") as stream:
                    shutil.copyfileobj(answer, stream, _BLOCK)
        except urllib.error.HTTPError as error:
            if error.code in (HTTPStatus.FORBIDDEN, HTTPStatus.UNAUTHORIZED):
                raise FleetError(
                    f"{source} does not give this node the artifact {manifest.id}",
                    expected="to be known to it by address and secret",
                    found=f"HTTP {error.code}: {error.reason}",
                    remedy=(
                        "set artifact_address of this node to the address that it has towards "
                        "the other nodes"
                    ),
                ) from error
            problem = f"{source}: {error}"
            sleep(min(2.0**attempt, 10.0))
            continue
        except OSError as error:
            problem = f"{source}: {error}"
            sleep(min(2.0**attempt, 10.0))
            continue
        if path.stat().st_size == entry.size:
            return
        problem = f"{source}: ended after {path.stat().st_size} of {entry.size} bytes"
    raise FleetError(
        f"The file {entry.path} of {manifest.id} could not be fetched",
        expected=f"{entry.size} bytes from {', '.join(sources)}",
        found=problem,
        remedy="check that the nodes reach each other on the artifact port, then run again",
    )


def resolve(hosts: Sequence[str]) -> list[str]:
    """Return the addresses of hosts that are named by name or address."""
    return sorted({str(each[4][0]) for host in hosts for each in socket.getaddrinfo(host, None)})


def main(argv: Sequence[str] | None = None) -> int:
    """Offer artifacts until stopped."""
    parser = argparse.ArgumentParser(description="Offer artifacts to other hosts of the fleet.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the artifacts")
    parser.add_argument("--address", default="0.0.0.0", help="address to listen on")  # noqa: S104
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--allow", required=True, help="addresses that may fetch, with commas")
    parser.add_argument("--token-file", type=Path, required=True, help="file with the secret")
    options = parser.parse_args(argv)
    token = options.token_file.read_text().strip()
    allowed = resolve(options.allow.split(","))
    server = SeedServer((options.address, options.port), options.root, allowed, token)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
