# SPDX-License-Identifier: Apache-2.0
"""The hub's client: huggingface_hub with the hub's refusals in words."""

from __future__ import annotations

import email.utils
import importlib
import re
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Protocol

from ..core.decode import decode
from ..core.errors import FleetError
from ..core.format import parse_count
from .partfile import BLOCK, Span
from .source import HubFile, carries_token

LONGEST_PAUSE_S = 30.0
_TIMEOUT_S = 30.0
_LISTING = "correct model_endpoint and model_mirrors; a proxy may answer in its place"
# Storage hosts refuse signatures that are older or younger than some minutes.
_SKEW_S = 240.0


class UnavailableError(Exception):
    """The hub does not answer now; it may later. ``pause`` is how long it asks to wait, in s.

    ``refused`` names the host that keeps a file from us which the hub itself gave out: the next
    question gets another signature, and maybe another host.
    """

    def __init__(
        self, reason: str, *, quota: bool = False, pause: float = 0.0, refused: str = ""
    ) -> None:
        super().__init__(reason)
        self.quota = quota
        self.pause = pause
        self.refused = refused


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

    def _token(self, endpoint: str) -> str | bool:
        safe = self._in_clear_text or carries_token(endpoint)
        return self._given if self._given and safe else False

    def describe(self, endpoint: str, repository: str, revision: str) -> tuple[str, list[HubFile]]:
        """Return the commit of a revision and all its files."""
        api = self._hub.HfApi(endpoint=endpoint, token=self._token(endpoint))
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
                remedy=_LISTING,
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
        token = self._token(endpoint)
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
        errors = self._hub.errors
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        token = self._token(endpoint)
        none = "no token was given" if not self._given else "the token is not sent over plain http"
        skew = clock_remark(response, error)
        storage = storage_host(response, endpoint) if name else ""
        if storage and status not in (408, 429):
            return UnavailableError(
                f"the storage host {storage} refuses {name} with HTTP {status}{skew}",
                refused=storage,
            )
        if isinstance(error, errors.DisabledRepoError):
            return FleetError(
                f"The hub has disabled {repository}",
                expected=f"access to {repository} on {endpoint}",
                found=f"HTTP {status}: {server_message(error)}",
                remedy="no token opens it: its page on the hub says why; choose another repository "
                "or revision, or fetch it from a mirror that still has it (model_mirrors)",
            )
        # The order matters: a gated repository is also "not found" to the client.
        if isinstance(error, errors.GatedRepoError):
            return FleetError(
                f"The hub does not let us read {repository}",
                expected=f"access to {repository} on {endpoint}",
                found=f"HTTP {status or 'error'}: gated or private, "
                + ("and the token has no access" if token else f"and {none}"),
                remedy="accept its terms on the hub and give a token with access as model_token",
            )
        if status == 401 and token:
            return FleetError(
                "The hub does not know the token",
                expected="a token that is valid, as model_token or HF_TOKEN",
                found=f"HTTP 401: {server_message(error)}{skew}",
                remedy="make a new token on the hub: tokens expire and can be revoked; for a "
                "public repository leave model_token empty",
            )
        if status == 403:
            return FleetError(
                f"{urllib.parse.urlsplit(endpoint).netloc} does not let us read {repository}",
                expected=f"access to {repository} on {endpoint}",
                found=f"HTTP 403, and not because it is gated: {server_message(error)}{skew}",
                remedy=(
                    "give the token the right to read this repository, or look at what stands "
                    if token
                    else "give a token if the repository is private, or look at what stands "
                )
                + "between the fetcher and the hub (model_proxy, a firewall)",
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
        return UnavailableError(f"{type(error).__name__}: {reason}".rstrip(": ") + skew)


def storage_host(response: Any, endpoint: str) -> str:
    """Return the host that answered in place of the hub, '' when the hub itself did.

    The hub redirects to a storage host with a signature in the address. Only the hub names the
    kind of a refusal in a header.
    """
    url = getattr(response, "url", None)
    if url is None or response.headers.get("x-error-code"):
        return ""
    parts = urllib.parse.urlsplit(str(url))
    elsewhere = parts.netloc != urllib.parse.urlsplit(endpoint).netloc
    return parts.netloc if elsewhere or getattr(response, "history", None) else ""


def server_message(error: Exception) -> str:
    """Return what the server says about a refusal, in one line."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", {}) or {}
    said = headers.get("x-error-message") or getattr(error, "server_message", "") or ""
    return " ".join(str(said).split())[:200] or "no reason given"


def clock_remark(response: Any, error: Exception) -> str:
    """Say so where a refusal comes from a wrong clock; '' when nothing speaks for it."""
    date = (getattr(response, "headers", None) or {}).get("date", "")
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        theirs = 0.0
    ahead = time.time() - theirs
    if theirs and abs(ahead) > _SKEW_S:
        return (
            f" (the clock of this host is {abs(ahead):.0f} s "
            f"{'ahead of' if ahead > 0 else 'behind'} the server's: set it, signatures depend on "
            f"it)"
        )
    if re.search(r"certificate (?:is not yet valid|has expired)", str(error)):
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        return f" (is the clock of this host right? it says {now})"
    return ""


@dataclass(frozen=True)
class _Listing:
    commit: str
    files: Sequence[HubFile]


def read_listing(info: Any, what: str) -> tuple[str, list[HubFile]]:
    """Return commit and files of the client's description of a model; raises `FleetError`."""
    listed = getattr(info, "siblings", None) or []
    files = [_described(each) for each in listed] if isinstance(listed, list) else listed
    said = {"commit": getattr(info, "sha", None), "files": files}
    listing = decode(_Listing, said, what=what, remedy=_LISTING)
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


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Return how long a hub asks to wait, in seconds; 0 when it does not say."""
    asked = parse_count(headers.get("retry-after", ""))
    if asked is not None:
        return float(asked)
    window = re.search(r"\bt=([0-9]{1,9})", headers.get("ratelimit", ""))
    return float(window.group(1)) if window else 0.0
