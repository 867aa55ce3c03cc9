# SPDX-License-Identifier: Apache-2.0
"""The wheel of a commit that is no release, from an index that has one for each commit.

Such an index (vLLM's own is one) answers INDEX/COMMIT/VARIANT/vllm/metadata.json with a list of
wheels. It lags behind the main line, and a pull request's branch has none. Then the wheel of the
nearest ancestor does, as long as no file was changed since that decides what is compiled: what
differs is Python, and that is taken from the source.
"""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Callable, TypedDict

from ..core.decode import Matching, Size, parse
from ..core.errors import FleetError
from ..core.paths import file_name
from .git import Repository
from .wheel_lock import WheelTarget

_TIMEOUT_S = 30
_LONGEST = 4 * 1024 * 1024
_Text = Annotated[str, Size(4096)]


class _Row(TypedDict, total=False):
    """What the index says of one wheel; it says more than this."""

    package_name: _Text
    platform_tag: _Text
    path: _Text
    sha256: Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits")]


# Gives the status and the text of a URL; status 0 with the reason where nobody answers.
Ask = Callable[[str], "tuple[int, str]"]


@dataclass(frozen=True)
class CommitWheel:
    """A wheel of the index, the commit that it was made of, and how many commits ago that is."""

    url: str
    commit: str
    behind: int


def find_commit_wheel(
    repository: Repository,
    commit: str,
    *,
    index_url: str,
    variant: str,
    target: WheelTarget,
    compiled: Sequence[str],
    depth: int,
    ask: Ask,
) -> CommitWheel:
    """Return the wheel of ``commit`` or of the nearest ancestor that compiles to the same.

    ``compiled`` are files and folders of the source whose change asks for another wheel; ``depth``
    is how many commits are asked for. Raises `FleetError` when there is none.
    """
    tried = 0
    for tried, ancestor in enumerate(repository.history(commit, depth), 1):
        changed = repository.changed(ancestor, commit, compiled)
        if changed:
            raise _missing(
                index_url, variant, commit,
                f"none for {tried - 1} commit(s), and before those {changed[0]} was changed",
            )  # fmt: skip
        url = f"{index_url.rstrip('/')}/{ancestor}/{f'{variant}/' if variant else ''}vllm/"
        status, text = ask(f"{url}metadata.json")
        if status in (403, 404):
            continue
        if status != 200:
            raise FleetError(
                "The index of wheels by commit cannot be read",
                expected=f"an answer of {url}metadata.json",
                found=text.strip()[:300] if not status else f"status {status}",
                remedy="check release_wheel_index and the network",
            )
        found = read_wheels(text, url, target)
        if found:
            return CommitWheel(found, ancestor, tried - 1)
    raise _missing(index_url, variant, commit, f"none for {tried} commit(s)")


def read_wheels(text: str, url: str, target: WheelTarget) -> str:
    """Return the URL of the wheel for a node among those of one commit; empty when there is none.

    ``url`` is the folder that their paths begin from. Raises `FleetError` for other data.
    """
    rows = parse(
        list[_Row],
        text,
        what=f"what the index of wheels says at {url}",
        remedy="check release_wheel_index",
    )
    tags = target.platform_tags()
    for row in rows:
        given = row.get("platform_tag", "").split(".")
        if row.get("package_name") != "vllm" or not set(given) & {*tags, "any"}:
            continue
        found = urllib.parse.urljoin(url, row.get("path", ""))
        name = urllib.parse.unquote(urllib.parse.urlsplit(found).path.rpartition("/")[2])
        if file_name(name, "A wheel of the index").endswith(".whl"):
            return found + (f"#sha256={row['sha256']}" if "sha256" in row else "")
    return ""


def ask_web(url: str) -> tuple[int, str]:
    """Ask an http or https URL, as `Ask` says."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        return 0, "the URL is not one of the web"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - checked above
            return int(answer.status), answer.read(_LONGEST).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (OSError, ValueError) as error:
        return 0, f"{type(error).__name__}: {error}"


def _missing(index_url: str, variant: str, commit: str, found: str) -> FleetError:
    return FleetError(
        f"There is no published wheel to put the commit {commit[:12]} on",
        expected=f"{index_url.rstrip('/')}/COMMIT/{f'{variant}/' if variant else ''}vllm/"
        "metadata.json for that commit, or for an ancestor with the same compiled files",
        found=found,
        remedy="such wheels come from vLLM's own builds of its main line, some hours after a "
        "commit: name an older commit or a release as release_ref, another index as "
        "release_wheel_index, or a wheel that you built of this commit as release_base_wheel",
    )
