# SPDX-License-Identifier: Apache-2.0
"""The hub's client: huggingface_hub with the hub's refusals in words."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable, Protocol

from ..core.errors import FleetError
from .partfile import BLOCK, Span
from .source import HubFile

LONGEST_PAUSE_S = 30.0
_TIMEOUT_S = 30.0


class UnavailableError(Exception):
    """The hub does not answer now; it may later. ``pause`` is how long it asks to wait, in s."""

    def __init__(self, reason: str, *, quota: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.quota = quota
        self.pause = pause


class UnreachableError(FleetError):
    """No hub can be asked: none answers, or its client is not here."""


class Client(Protocol):
    """What is asked of a hub. Raises `UnavailableError`, or `FleetError` when asking is in vain."""

    def describe(
        self, endpoint: str, repository: str, revision: str
    ) -> tuple[str, list[HubFile]]: ...

    def download(
        self,
        endpoint: str,
        repository: str,
        commit: str,
        name: str,
        span: Span,
        sink: Callable[[bytes], None],
    ) -> None: ...


@dataclass(frozen=True)
class Patience:
    """How long a hub is asked again that does not answer, in seconds without any progress."""

    seconds: float
    sleep: Callable[[float], object] | None = None
    clock: Callable[[], float] = time.monotonic


class HubClient:
    """The hub's own client. It has to be importable; its settings come from the environment."""

    def __init__(self, token: str) -> None:
        try:
            self._hub: Any = importlib.import_module("huggingface_hub")
            self._utils: Any = importlib.import_module("huggingface_hub.utils")
        except ImportError as missing:
            raise UnreachableError(
                "The client of the hub is missing on this host",
                expected="huggingface_hub importable",
                found=str(missing),
                remedy="run playbooks/model.yml, which brings it",
            ) from missing
        self._token: str | bool = token or False

    def describe(self, endpoint: str, repository: str, revision: str) -> tuple[str, list[HubFile]]:
        """Return the commit of a revision and all its files."""
        api = self._hub.HfApi(endpoint=endpoint, token=self._token)
        try:
            info = api.model_info(
                repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
            )
        except (self._transport_error(), OSError) as error:
            raise self._explain(error, endpoint, repository, revision) from error
        files = [
            HubFile(
                path=str(each.rfilename),
                size=int(each.lfs.size if each.lfs else each.size or 0),
                sha256=str(each.lfs.sha256) if each.lfs else "",
                git_oid="" if each.lfs else str(each.blob_id),
            )
            for each in info.siblings or ()
        ]
        return str(info.sha), files

    def download(
        self,
        endpoint: str,
        repository: str,
        commit: str,
        name: str,
        span: Span,
        sink: Callable[[bytes], None],
    ) -> None:
        """Hand over what is in a span of a file, block by block."""
        url = self._hub.hf_hub_url(repository, name, revision=commit, endpoint=endpoint)
        # Compressed on the way, a file could not be continued at an offset.
        headers = {**self._utils.build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
        session = self._utils.get_session()
        begin, end = span
        if span != (0, None):
            headers["Range"] = f"bytes={begin}-" + (str(end - 1) if end else "")
        try:
            with session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as answer:
                if answer.status_code == 416:
                    raise UnavailableError(f"{name} has become shorter")
                self._utils.hf_raise_for_status(answer)
                # A proxy that does not know of ranges sends what lies before as well.
                position = begin if answer.status_code == 206 else 0
                for block in answer.iter_raw(BLOCK):
                    if end and position >= end:
                        break
                    fresh = block[max(0, begin - position) : end - position if end else None]
                    position += len(block)
                    if fresh:
                        sink(fresh)
        except self._transport_error() as error:
            raise self._explain(error, endpoint, repository, commit) from error

    def _transport_error(self) -> type[Exception]:
        # The client's transport has had several names; its errors share this base.
        base: type[Exception] = self._hub.errors.HfHubHTTPError.__bases__[0]
        return base

    def _explain(
        self, error: Exception, endpoint: str, repository: str, revision: str
    ) -> Exception:
        """Turn an error of the client into one that says whether asking again may help."""
        errors = self._hub.errors
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        # The order matters: a gated repository is also "not found" to the client.
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            return FleetError(
                f"The hub does not let us read {repository}",
                expected=f"access to {repository} on {endpoint}",
                found=f"HTTP {status or 'error'}: gated or private, "
                + ("and the token has no access" if self._token else "and no token was given"),
                remedy="accept its terms on the hub and give a token with access as model_token",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return FleetError(
                "The revision is not on the hub",
                expected=f"{revision} in {repository} on {endpoint}",
                found="the repository exists, the revision does not",
                remedy="correct model_revision; an owner who rewrote the history removes commits",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FleetError(
                "The model repository is not on the hub",
                expected=f"{repository} on {endpoint}",
                found="no such repository, or a private one and no token",
                remedy="correct model_repository, or give model_token",
            )
        if status == 429:
            pause = _asked_pause(response.headers if response is not None else {})
            return UnavailableError("HTTP 429: quota used up", quota=True, pause=pause)
        if status is not None and status < 500 and status != 408:
            return FleetError(
                f"The hub at {endpoint} refuses {repository}",
                expected="an answer with the file",
                found=f"HTTP {status}",
                remedy="correct model_endpoint and model_mirrors; a proxy may answer in its place",
            )
        reason = str(error).splitlines()[0] if str(error) else ""
        return UnavailableError(f"{type(error).__name__}: {reason}".rstrip(": "))


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Return how long a hub asks to wait, in seconds; 0 when it does not say."""
    asked = headers.get("retry-after", "")
    if asked.isdigit():
        return float(asked)
    window = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    return float(window.group(1)) if window else 0.0
