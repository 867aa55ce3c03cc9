# SPDX-License-Identifier: Apache-2.0
"""A model hub: enough of the Hugging Face protocol for the unmodified client to download.

Serves folders of the form

    <owner>/<name>/refs.json                  {"main": "<commit>"}
    <owner>/<name>/revisions/<commit>/...     the files of that revision
    <owner>/<name>/repo.json                  optional: {"gated": true, "tokens": ["..."]}

A JSON file named by --faults makes it misbehave; it is read at every request:

    {"down": true}                         every connection is closed without an answer
    {"rate_bytes_per_second": 100000}      slow downloads, per connection
    {"cut_after_bytes": 5000, "cut_times": 1}   so many downloads end early
    {"too_many_requests": 3, "retry_after": 60}   so many requests are answered with 429
    {"corrupt": "model-00001-of-00004.safetensors"}   one byte of that file is wrong
    {"gated": ["hf_right"]}                only these tokens may read
    {"refs": {"main": "<commit>"}}         branches have moved
    {"gone": ["<commit>"]}                 these commits are no longer there
    {"storage": "localhost"}               large files lie on the storage host of that name
    {"storage_refuses": {"<file>": 2}}     it answers so often with 403 for that file
    {"forbidden": "text"}                  every answer is 403 with this message
    {"disabled": true}                     the repository is disabled
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

FAULTS = frozenset(
    [
        "down",
        "rate_bytes_per_second",
        "cut_after_bytes",
        "cut_times",
        "too_many_requests",
        "retry_after",
        "corrupt",
        "gated",
        "refs",
        "gone",
        "storage",
        "storage_refuses",
        "forbidden",
        "disabled",
    ]
)
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
PAGE_ENTRIES = 5  # small, so that clients are seen to follow the pages
CHUNK = 1 << 16


class HubError(Exception):
    """An answer other than 200, with the code that the client maps to its exceptions."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@functools.lru_cache(maxsize=4096)
def digests(path: Path, size: int, modified_ns: int) -> tuple[str, str]:
    """(git blob id, SHA-256) of a file; the size and time make a changed file a new key."""
    del modified_ns
    content = path.read_bytes()
    blob = hashlib.sha1(f"blob {size}\0".encode() + content, usedforsecurity=False)
    return blob.hexdigest(), hashlib.sha256(content).hexdigest()


class Store:
    """Repositories in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(
        self, repository: str, authorization: str | None, gated: list[str] | None = None
    ) -> Path:
        """The folder of a repository that the caller may read."""
        folder = self.root / repository
        if ".." in repository or not (folder / "refs.json").is_file():
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        settings_file = folder / "repo.json"
        settings = json.loads(settings_file.read_text()) if settings_file.exists() else {}
        if gated is not None:
            settings = {"gated": True, "tokens": gated}
        if settings.get("gated"):
            token = (authorization or "").removeprefix("Bearer ")
            if not token:
                text = f"Access to model {repository} is restricted; authenticate"
                raise HubError(HTTPStatus.UNAUTHORIZED, "GatedRepo", text)
            if token not in settings.get("tokens", []):
                text = f"Access to model {repository} is restricted; ask for access"
                raise HubError(HTTPStatus.FORBIDDEN, "GatedRepo", text)
        return folder

    def resolve(self, folder: Path, revision: str, faults: dict[str, Any]) -> str:
        """The commit that a branch or commit id means."""
        refs: dict[str, str] = json.loads((folder / "refs.json").read_text())
        commit = str({**refs, **faults.get("refs", {})}.get(revision, revision))
        if commit in faults.get("gone", []):
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        if re.fullmatch("[0-9a-f]{40}", commit) and (folder / "revisions" / commit).is_dir():
            return commit
        raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, folder: Path, commit: str) -> list[str]:
        tree = folder / "revisions" / commit
        return sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file())

    def entry(self, folder: Path, commit: str, name: str) -> dict[str, Any]:
        """A file as the tree listing shows it."""
        tree = folder / "revisions" / commit
        path = tree / name
        if ".." in Path(name).parts or not path.is_file():
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"Entry not found: {name}")
        stat = path.stat()
        blob, sha256 = digests(path, stat.st_size, stat.st_mtime_ns)
        entry: dict[str, Any] = {"type": "file", "path": name, "size": stat.st_size, "oid": blob}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": sha256, "size": stat.st_size, "pointerSize": 134}
        return entry


class Faults:
    """What is to go wrong, from a control file; counters start anew when the file changes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.modified_ns = 0
        self.settings: dict[str, Any] = {}
        self.used: Counter[str] = Counter()

    def get(self) -> dict[str, Any]:
        with self.lock:
            try:
                modified_ns = self.path.stat().st_mtime_ns if self.path else 0
            except FileNotFoundError:
                modified_ns = 0
            if modified_ns != self.modified_ns:
                self.settings = (
                    json.loads(self.path.read_text()) if self.path and modified_ns else {}
                )
                self.modified_ns = modified_ns
                self.used.clear()
            return self.settings

    def take(self, name: str, limit: int) -> bool:
        """Use a counted fault once; False when it is used up."""
        with self.lock:
            if self.used[name] >= limit:
                return False
            self.used[name] += 1
            return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        faults = self.server.faults.get()
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if faults.get("down"):
            self.close_connection = True
            return
        try:
            self.route(faults, body)
        except HubError as error:
            self.send_failure(error)

    def route(self, faults: dict[str, Any], body: bytes) -> None:
        busy = int(faults.get("too_many_requests", 0))
        if busy and self.server.faults.take("too_many_requests", busy):
            raise HubError(HTTPStatus.TOO_MANY_REQUESTS, "", "Too many requests")
        if faults.get("forbidden"):
            raise HubError(HTTPStatus.FORBIDDEN, "", str(faults["forbidden"]))
        if faults.get("disabled"):
            text = "Access to this resource is disabled."
            raise HubError(HTTPStatus.FORBIDDEN, "", text)
        address = urlsplit(self.path)
        path = unquote(address.path).removeprefix("/storage")
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        patterns = (
            (r"/api/models/([^/]+/[^/]+)", self.send_info),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self.send_info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self.send_tree),
            (r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", self.send_paths),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.send_file),
        )
        for pattern, function in patterns:
            match = re.fullmatch(pattern, path)
            if match is not None:
                repository, *rest = match.groups()
                authorization = self.headers.get("Authorization")
                folder = self.server.store.open(repository, authorization, faults.get("gated"))
                commit = self.server.store.resolve(folder, rest[0] if rest else "main", faults)
                name = rest[1] if len(rest) > 1 else None
                function(
                    {
                        "repository": repository,
                        "folder": folder,
                        "commit": commit,
                        "revision": rest[0] if rest else "main",
                        "name": name or "",
                        "query": query,
                        "body": body,
                        "faults": faults,
                    }
                )
                return
        raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", f"No such page: {path}")

    def send_failure(self, error: HubError) -> None:
        body = json.dumps({"error": str(error)}).encode()
        self.send_response(error.status)
        if error.code:
            self.send_header("X-Error-Code", error.code)
        self.send_header("X-Error-Message", str(error))
        if error.status == HTTPStatus.TOO_MANY_REQUESTS:
            pause = self.server.faults.get().get("retry_after", 1)
            self.send_header("Retry-After", str(pause))
        self.send_body(body, "application/json")

    def send_body(self, body: bytes, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, data: Any, headers: dict[str, str] | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_body(json.dumps(data).encode(), "application/json")

    def send_info(self, request: dict[str, Any]) -> None:
        store, folder, commit = self.server.store, request["folder"], request["commit"]
        siblings = []
        for name in store.files(folder, commit):
            sibling: dict[str, Any] = {"rfilename": name}
            if request["query"].get("blobs"):
                entry = store.entry(folder, commit, name)
                sibling.update(size=entry["size"], blobId=entry["oid"])
                if "lfs" in entry:
                    lfs = entry["lfs"]
                    sibling["lfs"] = {
                        "sha256": lfs["oid"],
                        "size": lfs["size"],
                        "pointerSize": lfs["pointerSize"],
                    }
            siblings.append(sibling)
        self.send_json(
            {
                "_id": commit[:24],
                "id": request["repository"],
                "modelId": request["repository"],
                "sha": commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def send_tree(self, request: dict[str, Any]) -> None:
        store, folder, commit = self.server.store, request["folder"], request["commit"]
        below = request["name"].strip("/")
        names = [
            name
            for name in store.files(folder, commit)
            if not below or name.startswith(f"{below}/")
        ]
        recursive = request["query"].get("recursive", "").lower() in ("1", "true")
        entries: list[dict[str, Any]] = []
        folders: set[str] = set()
        for name in names:
            inner = name[len(below) + 1 :] if below else name
            parents = inner.split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                path = "/".join(([below] if below else []) + parents[:depth])
                if path not in folders:
                    folders.add(path)
                    oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
                    entries.append({"type": "directory", "path": path, "size": 0, "oid": oid})
            if recursive or not parents:
                entries.append(store.entry(folder, commit, name))
        start = int(request["query"].get("cursor", "0"))
        end = start + PAGE_ENTRIES
        headers = {}
        if end < len(entries):
            host = self.headers["Host"]
            where = quote(urlsplit(self.path).path, safe="/%")
            flag = "true" if recursive else "false"
            link = f"http://{host}{where}?recursive={flag}&cursor={end}"
            headers["Link"] = f'<{link}>; rel="next"'
        self.send_json(entries[start:end], headers)

    def send_paths(self, request: dict[str, Any]) -> None:
        if (self.headers.get("Content-Type") or "").startswith("application/json"):
            wanted = json.loads(request["body"] or b"{}").get("paths", [])
        else:
            wanted = parse_qs(request["body"].decode()).get("paths", [])
        store, folder, commit = self.server.store, request["folder"], request["commit"]
        known = set(store.files(folder, commit))
        self.send_json([store.entry(folder, commit, name) for name in wanted if name in known])

    def send_file(self, request: dict[str, Any]) -> None:
        folder, commit, name = request["folder"], request["commit"], request["name"]
        entry = self.server.store.entry(folder, commit, name)
        size = entry["size"]
        if "lfs" in entry and request["faults"].get("storage"):
            if not self.path.startswith("/storage/"):
                self.send_redirect(request["faults"]["storage"])
                return
            times = int(request["faults"].get("storage_refuses", {}).get(name, 0))
            if self.server.faults.take(f"storage {name}", times):
                self.send_response(HTTPStatus.FORBIDDEN)
                self.send_body(b"<Error><Code>AccessDenied</Code></Error>", "application/xml")
                return
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        start, end = self.byte_range(size)
        self.log_message("%s %s bytes %d-%d", self.command, name, start, end)
        partial = (start, end) != (0, size)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if "lfs" in entry:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(size))
        self.send_header("Accept-Ranges", "bytes")
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "HEAD":
            path = folder / "revisions" / commit / name
            self.send_bytes(path, start, end, request["faults"], name)

    def send_redirect(self, host: str) -> None:
        """Send the caller to the storage host, with a signature of its own each time."""
        port = self.server.server_address[1]
        self.send_response(HTTPStatus.FOUND)
        signature = time.monotonic_ns()
        where = f"http://{host}:{port}/storage{urlsplit(self.path).path}?signature={signature}"
        self.send_header("Location", where)
        self.send_body(b"", "text/plain")

    def byte_range(self, size: int) -> tuple[int, int]:
        """First byte and the one after the last that the client asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return 0, size
        start = int(match[1])
        end = min(size, int(match[2]) + 1) if match[2] else size
        if start >= end:
            status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            raise HubError(status, "", f"the file has {size} bytes")
        return start, end

    def send_bytes(
        self, path: Path, start: int, end: int, faults: dict[str, Any], name: str
    ) -> None:
        rate = int(faults.get("rate_bytes_per_second", 0))
        cut_at = None
        cut_after = int(faults.get("cut_after_bytes", 0))
        cut_times = int(faults.get("cut_times", 1)) if 0 < cut_after < end - start else 0
        if cut_times and self.server.faults.take("cut", cut_times):
            cut_at = start + cut_after
        wrong = path.stat().st_size // 2 if faults.get("corrupt") == name else -1
        position = start
        with path.open("rb") as handle:
            handle.seek(start)
            while position < end:
                if cut_at is not None and position >= cut_at:
                    self.close_connection = True
                    return
                limit = min(CHUNK, end - position)
                if cut_at is not None:
                    limit = min(limit, cut_at - position)
                if rate:
                    limit = min(limit, max(1, rate // 10))
                chunk = bytearray(handle.read(limit))
                if position <= wrong < position + len(chunk):
                    chunk[wrong - position] ^= 0xFF
                self.wfile.write(chunk)
                position += len(chunk)
                if rate:
                    time.sleep(len(chunk) / rate)


class Hub(ThreadingHTTPServer):
    """The server, with its store and its faults."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], root: Path, faults: Path | None) -> None:
        super().__init__(address, Handler)
        self.store = Store(root)
        self.faults = Faults(faults)


def check_faults(text: str) -> dict[str, Any]:
    """The faults of a JSON text; ValueError when one is unknown."""
    faults = json.loads(text)
    if not isinstance(faults, dict) or not set(faults) <= FAULTS:
        raise ValueError(f"expected an object with keys of {', '.join(sorted(FAULTS))}")
    return faults


@contextlib.contextmanager
def serving(folder: Path, faults: Path) -> Iterator[str]:
    """Serve a folder on a free port of this host for a while; gives the endpoint."""
    server = Hub(("127.0.0.1", 0), folder, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    top = argparse.ArgumentParser(prog="python3 -m lab.hub", description=__doc__)
    top.add_argument("root", type=Path, help="folder with the repositories")
    top.add_argument("--bind", default="127.0.0.1")
    top.add_argument("--port", type=int, default=8500)
    top.add_argument("--faults", type=Path, help="control file with what is to go wrong")
    arguments = top.parse_args()
    Hub((arguments.bind, arguments.port), arguments.root, arguments.faults).serve_forever()


if __name__ == "__main__":
    main()
