# SPDX-License-Identifier: Apache-2.0
"""What a hub, a storage host or a network means when it does not give what was asked for."""

from __future__ import annotations

import email.utils
import re
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import FleetError
from ..core.format import parse_count

PROXY = "correct model_endpoint and model_mirrors; a proxy may answer in its place"
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


@dataclass(frozen=True)
class Refusal:
    """A question to a hub and the error of its client.

    ``name`` is the file that was asked for, '' where the question was about the repository.
    ``no_token`` says why no token was sent; '' when one was.
    """

    error: Exception
    endpoint: str
    repository: str
    revision: str
    name: str
    no_token: str

    @property
    def status(self) -> int | None:
        """The HTTP status; None when nothing answered."""
        status: int | None = getattr(getattr(self.error, "response", None), "status_code", None)
        return status

    @property
    def skew(self) -> str:
        """What the clocks have to do with it; '' when nothing."""
        return clock_remark(getattr(self.error, "response", None), self.error)

    def explain(self, errors: Any) -> Exception:
        """Return `UnavailableError` where asking again may help, `FleetError` where it is in vain.

        ``errors`` are the classes of huggingface_hub. The order matters: a gated repository is
        also "not found" to the client.
        """
        return (
            self._by_storage()
            or self._by_access(errors)
            or self._by_absence(errors)
            or self._by_status()
        )

    def _by_storage(self) -> Exception | None:
        storage = storage_host(getattr(self.error, "response", None), self.endpoint)
        if not self.name or not storage or self.status in (408, 429):
            return None
        return UnavailableError(
            f"the storage host {storage} refuses {self.name} with HTTP {self.status}{self.skew}",
            refused=storage,
        )

    def _by_access(self, errors: Any) -> Exception | None:
        wanted = f"access to {self.repository} on {self.endpoint}"
        if isinstance(self.error, errors.DisabledRepoError):
            return FleetError(
                f"The hub has disabled {self.repository}",
                expected=wanted,
                found=f"HTTP {self.status}: {server_message(self.error)}",
                remedy="no token opens it: its page on the hub says why; choose another repository "
                "or revision, or fetch it from a mirror that still has it (model_mirrors)",
            )
        if isinstance(self.error, errors.GatedRepoError):
            return FleetError(
                f"The hub does not let us read {self.repository}",
                expected=wanted,
                found=f"HTTP {self.status or 'error'}: gated or private, and "
                + (self.no_token or "the token has no access"),
                remedy="accept its terms on the hub and give a token with access as model_token",
            )
        if self.status == 401 and not self.no_token:
            return FleetError(
                "The hub does not know the token",
                expected="a token that is valid, as model_token or HF_TOKEN",
                found=f"HTTP 401: {server_message(self.error)}{self.skew}",
                remedy="make a new token on the hub: tokens expire and can be revoked; for a "
                "public repository leave model_token empty",
            )
        if self.status == 403:
            host = urllib.parse.urlsplit(self.endpoint).netloc
            said = f"{server_message(self.error)}{self.skew}"
            step = (
                "give a token if the repository is private"
                if self.no_token
                else "give the token the right to read this repository"
            )
            return FleetError(
                f"{host} does not let us read {self.repository}",
                expected=wanted,
                found=f"HTTP 403, and not because it is gated: {said}",
                remedy=f"{step}, or look at what stands between the fetcher and the hub "
                "(model_proxy, a firewall)",
            )
        return None

    def _by_absence(self, errors: Any) -> Exception | None:
        if isinstance(self.error, errors.RevisionNotFoundError):
            return FleetError(
                "The revision is not on the hub",
                expected=f"{self.revision} in {self.repository} on {self.endpoint}",
                found="the repository exists, the revision does not",
                remedy="correct model_revision; an owner who rewrote the history removes commits",
            )
        if isinstance(self.error, errors.RepositoryNotFoundError):
            return FleetError(
                "The model repository is not on the hub",
                expected=f"{self.repository} on {self.endpoint}",
                found="no such repository, or a private one and no token",
                remedy="correct model_repository, or give model_token",
            )
        return None

    def _by_status(self) -> Exception:
        status = self.status
        if status == 429:
            response = getattr(self.error, "response", None)
            pause = _asked_pause(response.headers if response is not None else {})
            return UnavailableError("HTTP 429: quota used up", quota=True, pause=pause)
        if status is not None and status < 500 and status != 408:
            return FleetError(
                f"The hub at {self.endpoint} refuses {self.repository}",
                expected="an answer with the file",
                found=f"HTTP {status}",
                remedy=PROXY,
            )
        said = str(self.error)
        reason = said.splitlines()[0] if said else ""
        return UnavailableError(f"{type(self.error).__name__}: {reason}".rstrip(": ") + self.skew)


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


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Return how long a hub asks to wait, in seconds; 0 when it does not say."""
    asked = parse_count(headers.get("retry-after", ""))
    if asked is not None:
        return float(asked)
    window = re.search(r"\bt=([0-9]{1,9})", headers.get("ratelimit", ""))
    return float(window.group(1)) if window else 0.0
