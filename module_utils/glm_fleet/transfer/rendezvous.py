# SPDX-License-Identifier: Apache-2.0
"""Where the controller's workers of one distribution meet: a folder, a record per host."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict

from ..core.decode import Count, Size, Words, read
from ..core.errors import FleetError
from ..core.files import write_atomically
from ..core.progress import Progress

# How a host is: "gone" is one that nobody waits for.
Standing = Literal["working", "published", "failed", "gone"]


class _AnswerOptional(TypedDict, total=False):
    progress: Progress | Mapping[str, NoReturn]
    received: Count
    notes: Annotated[Sequence[Words], Size(10_000)]
    failure: Mapping[str, Any]
    torrents: Mapping[str, str]
    unknown: Sequence[str]
    busy: bool


class AgentAnswer(_AnswerOptional):
    """What the agent of a node answers: see `Agent.answer`."""

    standing: Standing


@dataclass(frozen=True)
class Record:
    """How one host is, as the others need to know it."""

    standing: Standing = "working"
    progress: Mapping[str, Any] = field(default_factory=dict)
    unknown: Sequence[str] = ()
    busy: bool = False
    pushing: bool = False
    fetching: Mapping[str, Any] = field(default_factory=dict)
    received: int = 0
    notes: Sequence[str] = ()
    failure: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: AgentAnswer) -> Record:
        """Take what the others need from what an agent answered."""
        progress = answer.get("progress")
        return cls(
            standing=answer["standing"],
            progress=vars(progress) if isinstance(progress, Progress) else {},
            unknown=answer.get("unknown", ()),
            busy=answer.get("busy", False),
            received=answer.get("received", 0),
            notes=answer.get("notes", ()),
            failure=answer.get("failure", {}),
        )

    @property
    def has_ended(self) -> bool:
        """Tell whether this host takes nothing any more. It may still give."""
        return self.standing != "working"

    @property
    def brings(self) -> bool:
        """Tell whether it is about to have what no host has: from the controller, or the hub."""
        return not self.has_ended and bool(self.pushing or self.fetching)

    def ended(self) -> Record:
        """Return the record of a host that nobody shall wait for."""
        return self if self.has_ended else replace(self, standing="gone")

    def failed(self, failure: Mapping[str, Any]) -> Record:
        """Return the record of a host that was given up."""
        return replace(self, standing="failed", failure=failure)


class Meeting:
    """One host's worker among the others. Torrents are files, named by their bundle."""

    def __init__(
        self,
        folder: Path,
        host: str,
        hosts: Sequence[str],
        *,
        stall_timeout: float,
        check: Callable[[str, bytes], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``check`` raises `FleetError` for a bundle's torrent that does not follow."""
        self._check = check
        self._folder = folder
        self._host = host
        self._others = [each for each in hosts if each != host]
        self._stall_timeout = stall_timeout
        self._clock = clock
        self._brought: set[str] = set()
        self._seen: Any = None
        self._moved = clock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def known(self) -> list[str]:
        """Name the bundles that have a torrent."""
        return sorted(path.stem for path in self._folder.glob("*.torrent"))

    def keep(self, torrents: Mapping[str, str]) -> list[str]:
        """Lay down torrents (Base64) for the others. The first one of a bundle stays.

        One that does not follow from the manifest is carried to nobody. Returns why not.
        """
        refused = []
        for name, text in torrents.items():
            path = self._folder / f"{name}.torrent"
            if name.isdigit() and not path.exists():
                try:
                    self._check(name, base64.b64decode(text, validate=True))
                except (FleetError, ValueError) as error:
                    refused.append(str(error))
                    continue
                write_atomically(path, text, mode=0o600)
            self._brought.add(name)
        return refused

    def fresh(self) -> dict[str, str]:
        """Return the torrents that this host was not given yet."""
        found = {}
        for name in self.known():
            if name not in self._brought:
                self._brought.add(name)
                found[name] = (self._folder / f"{name}.torrent").read_text()
        return found

    def say(self, record: Record) -> None:
        """Tell the others how this host is."""
        path = self._folder / f"{self._host}.json"
        write_atomically(path, json.dumps(vars(record)), mode=0o600)

    def others(self) -> dict[str, Record]:
        """Return how the other hosts are. One that said nothing yet is at work."""
        found = {}
        for host in self._others:
            try:
                found[host] = read(Record, self._folder / f"{host}.json")
            except (FileNotFoundError, FleetError):
                found[host] = Record(busy=True)
        return found

    def hopeless(self, record: Record, others: Mapping[str, Record]) -> FleetError | None:
        """Say why this host can never get what it lacks, if so.

        That is when nobody offers a part of the artifact and nobody is about to. Whoever
        still brings files from elsewhere has a patience of its own.
        """
        state = [record.progress.get("done"), record.unknown]
        state += [[host, each.progress, each.busy] for host, each in sorted(others.items())]
        now = self._clock()
        if state != self._seen or record.brings or any(each.brings for each in others.values()):
            self._seen, self._moved = state, now
        if not record.unknown or set(record.unknown) <= set(self.known()):
            return None
        waiting = record.busy or any(each.busy for each in others.values())
        # Another worker may have written a torrent that this one has not read yet.
        patience = self._stall_timeout if waiting else min(10.0, self._stall_timeout)
        if now - self._moved < patience:
            return None
        holders = ", ".join(sorted(others)) or "there is no other node"
        broken = [host for host, each in sorted(others.items()) if each.standing == "failed"]
        if broken:
            holders += f"; {', '.join(broken)} failed, see there"
        return FleetError(
            "No node offers a part of the artifact",
            expected="every file on at least one node",
            found=f"{len(record.unknown)} bundles of files that none has whole ({holders})",
            remedy="run the phases that make or fetch the artifact, then this one again",
        )
