# SPDX-License-Identifier: Apache-2.0
"""The hub's client: huggingface_hub with the hub's refusals in words."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable, Protocol

from ..core.decode import decode
from ..core.errors import FleetError
from .partfile import BLOCK, Span
from .refusal import PROXY, Refusal, UnavailableError
from .source import HubFile, carries_token

LONGEST_PAUSE_S = 30.0
_TIMEOUT_S = 30.0


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

    def __init__(self, token: str, *, in_clear_text: bool = False) -> None:
        """``in_clear_text`` gives the token to plain http endpoints too."""
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
        self._given = token
        self._in_clear_text = in_clear_text

    def token_for(self, endpoint: str) -> str | bool:
        """Return the token that is sent to an endpoint; False for none."""
        safe = self._in_clear_text or carries_token(endpoint)
        return self._given if self._given and safe else False

    def describe(self, endpoint: str, repository: str, revision: str) -> tuple[str, list[HubFile]]:
        """Return the commit of a revision and all its files."""
        api = self._hub.HfApi(endpoint=endpoint, token=self.token_for(endpoint))
        try:
            info = api.model_info(
                repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
            )
        except (self._transport_error(), OSError) as error:
            raise self._explain(error, endpoint, repository, revision) from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # The client takes the hub's JSON as it comes.
            raise FleetError(
                f"The answer of {endpoint} cannot be used",
                expected=f"the description of {repository}",
                found=f"{type(error).__name__}: {error}"[:300],
                remedy=PROXY,
            ) from error
        return read_listing(info, f"The answer of {endpoint}")

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
        token = self.token_for(endpoint)
        headers = {**self._utils.build_hf_headers(token=token), "Accept-Encoding": "identity"}
        session = self._utils.get_session()
        begin, end = span
        if span != (0, None):
            headers["Range"] = f"bytes={begin}-" + (str(end - 1) if end else "")
        try:
            with session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as answer:
                if answer.status_code == 416:
                    raise UnavailableError(f"{name} has become shorter")
                if answer.status_code >= 400:
                    answer.read()  # what it says is part of the error
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
            raise self._explain(error, endpoint, repository, commit, name) from error

    def _transport_error(self) -> type[Exception]:
        # The client's transport has had several names; its errors share this base.
        base: type[Exception] = self._hub.errors.HfHubHTTPError.__bases__[0]
        return base

    def _explain(
        self, error: Exception, endpoint: str, repository: str, revision: str, name: str = ""
    ) -> Exception:
        """Turn an error of the client into one that says whether asking again may help."""
        token = bool(self.token_for(endpoint))
        why = "no token was given" if not self._given else "the token is not sent over plain http"
        refusal = Refusal(error, endpoint, repository, revision, name, "" if token else why)
        return refusal.explain(self._hub.errors)


@dataclass(frozen=True)
class _Listing:
    commit: str
    files: Sequence[HubFile]


def read_listing(info: Any, what: str) -> tuple[str, list[HubFile]]:
    """Return commit and files of the client's description of a model; raises `FleetError`."""
    listed = getattr(info, "siblings", None) or []
    files = [_described(each) for each in listed] if isinstance(listed, list) else listed
    said = {"commit": getattr(info, "sha", None), "files": files}
    listing = decode(_Listing, said, what=what, remedy=PROXY)
    return listing.commit, list(listing.files)


def _described(sibling: Any) -> dict[str, Any]:
    lfs = getattr(sibling, "lfs", None)
    size = getattr(lfs if lfs else sibling, "size", None)
    return {
        "path": getattr(sibling, "rfilename", None),
        "size": 0 if size is None else size,
        "sha256": getattr(lfs, "sha256", None) if lfs else "",
        "git_oid": "" if lfs else getattr(sibling, "blob_id", None),
    }
