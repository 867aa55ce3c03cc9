# SPDX-License-Identifier: Apache-2.0
"""A deployment: all that decides what a node serves, as one thing to stage, activate, take back.

Release, model, unit and environment belong together: a new release under the flags of the
old one is something nobody has attested. So they are kept together, named by their content,
below one root (``/etc/glm-fleet/deployments`` on a node)::

    <id>/deployment.json      release, model and CUDA graph mode
    <id>/glm-serving.service, serving.env, attestation.json
    <id>/refused.json         why it does not run on this node, if that is known
    <id>/attested             it passed the attestation
    <id>/answers.json         what it answered then: see `answers`
    current                   -> <id>, the one that was activated last
    attested.json             ids that passed the attestation, newest last

``previous.json`` beside that root names what a roll-back would need.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from ..core.decode import Range, Words, read
from ..core.errors import FleetError
from ..core.files import exclusive, write_atomically
from .answers import Answers
from .policy import parse_policy

UNIT = "glm-serving.service"
ENVIRONMENT = "serving.env"
POLICY = "attestation.json"
_SUMMARY = "deployment.json"
REFUSED = "refused.json"
ATTESTED = "attested"
ANSWERS = "answers.json"
# What a roll-back needs: `retention.protected_by` reads it.
_TO_GO_BACK = "previous.json"
# How long the last starts took, in seconds.
STARTS = "starts.json"
_STARTS = 8

_KEEP = 4
_ID = re.compile(r"[0-9a-f]{12}")


class Summary(TypedDict):
    """What is said of a deployment; nothing secret."""

    id: str
    port: int
    release: str
    model: str
    cuda_graphs: str


class _Recorded(TypedDict):
    release: str
    model: str
    cuda_graphs: str


class _Refusal(TypedDict):
    reason: Words


class _Start(TypedDict):
    invocation: Words
    seconds: Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True)
class Deployment:
    """What one deployment consists of; ``cuda_graphs`` is the mode in its command line."""

    id: str
    release: str
    model: str
    cuda_graphs: str
    unit: str
    environment: str
    policy: str

    @property
    def digests(self) -> dict[str, str]:
        """What `serving.differences` compares with the record of the pre-start check."""
        return {
            "release": self.release,
            "model": self.model,
            "unit_sha256": hashlib.sha256(self.unit.encode()).hexdigest(),
            "environment_sha256": hashlib.sha256(self.environment.encode()).hexdigest(),
        }

    @property
    def port(self) -> int:
        """Return the port on which its server listens; 0 where its policy does not say."""
        try:
            return parse_policy(self.policy)["port"]
        except FleetError:
            return 0

    def summary(self) -> Summary:
        """Return what reports say of it; nothing secret."""
        return {
            "id": self.id,
            "port": self.port,
            "release": self.release,
            "model": self.model,
            "cuda_graphs": self.cuda_graphs,
        }


def make(
    *, release: str, model: str, cuda_graphs: str, unit: str, environment: str, policy: str
) -> Deployment:
    """Name a deployment by what a restart would bring; the policy may change without one."""
    hashed = hashlib.sha256()
    for part in (release, model, unit, environment):
        hashed.update(part.encode() + b"\0")
    identifier = hashed.hexdigest()[:12]
    return Deployment(identifier, release, model, cuda_graphs, unit, environment, policy)


@dataclass(frozen=True)
class Places:
    """Where things are on a node."""

    deployments: Path = Path("/etc/glm-fleet/deployments")
    etc: Path = Path("/etc/glm-fleet")
    units: Path = Path("/etc/systemd/system")
    release_link: Path = Path("/opt/glm-fleet/current")
    releases: Path = Path("/opt/glm-fleet/releases")
    model_link: Path = Path("/srv/glm-fleet/model")
    models: Path = Path("/srv/glm-fleet/artifacts/model")
    group: str = "glm"


class Deployments:
    """The deployments of one node."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._root = places.deployments

    @contextmanager
    def switching(self) -> Iterator[None]:
        """Wait until nobody else switches this node.

        A controller that dies leaves its module at work here, waiting for vLLM to stop. Two at
        once would mix what they switch to, and the wrong one would count as attested.
        """
        with exclusive(self._root / ".switching"):
            yield

    def read(self, identifier: str) -> Deployment:
        """Return a deployment; raises `FleetError` when the node does not have it."""
        folder = self._root / identifier
        try:
            record = read(_Recorded, folder / _SUMMARY)
            return Deployment(
                identifier,
                record["release"],
                record["model"],
                record["cuda_graphs"],
                (folder / UNIT).read_text(),
                (folder / ENVIRONMENT).read_text(),
                (folder / POLICY).read_text(),
            )
        except (OSError, ValueError, FleetError) as error:
            raise FleetError(
                "This node does not have the deployment",
                expected=f"a complete folder {folder}",
                found=f"{type(error).__name__}: {error}",
                remedy="run site.yml, which stages it",
            ) from error

    def find(self, identifier: str) -> Deployment | None:
        """Return a deployment, None when the node has no complete one of this id."""
        try:
            return self.read(identifier) if identifier else None
        except FleetError:
            return None

    def current(self) -> str:
        """Return the id that was activated last, '' if none was."""
        link = self._root / "current"
        return link.readlink().name if link.is_symlink() else ""

    def attested(self) -> list[str]:
        """Return the ids that passed the attestation on this node, newest last."""
        try:
            known = read(list[str], self._root / "attested.json")
        except (FileNotFoundError, FleetError):
            known = []
        listed = [each for each in known if _ID.fullmatch(each)]
        # Each has a mark of its own too: the list can be emptied by a full disk.
        marks = [
            (mark.stat().st_mtime, mark.parent.name)
            for mark in self._root.glob(f"*/{ATTESTED}")
            if _ID.fullmatch(mark.parent.name)
        ]
        return [*(name for _, name in sorted(marks) if name not in listed), *listed]

    def stage(self, wanted: Deployment, *, check_mode: bool = False) -> bool:
        """Put a deployment beside the one that runs; tell whether that changed anything."""
        known = self.find(wanted.id)
        if known == wanted:
            return False
        if not check_mode:
            with exclusive(self._root / ".lock"):
                self._write(wanted)
        return True

    def _write(self, wanted: Deployment) -> None:
        folder = self._root / wanted.id
        self._root.chmod(0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        write_atomically(folder / UNIT, wanted.unit)
        write_atomically(folder / ENVIRONMENT, wanted.environment, 0o600)
        write_atomically(folder / POLICY, wanted.policy)
        # Last: a folder without it is not a deployment.
        write_atomically(folder / _SUMMARY, json.dumps(wanted.summary(), indent=1) + "\n")

    def note_attested(self, identifier: str) -> None:
        """Remember that a deployment passed: it is what a failure goes back to."""
        if not identifier:
            return
        with exclusive(self._root / ".lock"):
            known = [each for each in self.attested() if each != identifier]
            write_atomically(self._root / "attested.json", json.dumps([*known, identifier]))
            if (self._root / identifier).is_dir():
                write_atomically(self._root / identifier / ATTESTED, "")
        self.note_previous()

    def note_disproved(self, identifier: str) -> None:
        """Forget that a deployment passed: nothing goes back to it, or compares itself with it."""
        with exclusive(self._root / ".lock"):
            known = [each for each in self.attested() if each != identifier]
            write_atomically(self._root / "attested.json", json.dumps(known))
            for name in (ATTESTED, ANSWERS):
                (self._root / identifier / name).unlink(missing_ok=True)

    def note_passed(self, release: str, model: str) -> None:
        """Remember that what runs passed, unless something else was activated meanwhile."""
        current = self.find(self.current())
        if current and (current.release, current.model) == (release, model):
            self.note_attested(current.id)

    def note_answers(self, answers: Answers) -> None:
        """Keep the known answers of what runs, unless something else was activated meanwhile."""
        current = self.find(self.current())
        if current and (current.release, current.model) == (answers["release"], answers["model"]):
            write_atomically(self._root / current.id / ANSWERS, json.dumps(answers) + "\n")

    def answers(self, identifier: str) -> Answers | None:
        """Return the known answers of a deployment, None where none are kept."""
        try:
            return read(Answers, self._root / identifier / ANSWERS) if identifier else None
        except (FileNotFoundError, FleetError):
            return None

    def answers_before(self, model: str) -> Answers | None:
        """Return the newest known answers of this node with these weights.

        Those of the deployment that runs come first: it passed with them at an earlier start.
        """
        for identifier in (self.current(), *reversed(self.attested())):
            found = self.answers(identifier)
            if found and found["model"] == model:
                return found
        return None

    def note_start(self, invocation: str, seconds: float) -> None:
        """Remember how long a start took until its first answer, for the plan of the next roll.

        ``invocation`` is systemd's id of the start: one that is attested again counts once.
        """
        with exclusive(self._root / ".lock"):
            known = self._starts()
            if invocation not in {each["invocation"] for each in known}:
                known.append(_Start(invocation=invocation, seconds=round(seconds, 1)))
                write_atomically(self._root / STARTS, json.dumps(known[-_STARTS:]))

    def starts(self) -> list[float]:
        """Return the seconds of the last starts, newest last; [] where none were recorded."""
        return [each["seconds"] for each in self._starts()]

    def _starts(self) -> list[_Start]:
        try:
            return list(read(list[_Start], self._root / STARTS))
        except (FileNotFoundError, FleetError):
            return []

    def note_previous(self) -> None:
        """Write down which release and model a roll-back would need, so that they are kept."""
        found = self.find(self.before(self.current()))
        parts = {"release": found.release, "model": found.model} if found else {}
        write_atomically(self.places.etc / _TO_GO_BACK, json.dumps(parts, indent=1) + "\n")

    def before(self, identifier: str) -> str:
        """Return the newest attested deployment other than ``identifier`` that can still run."""
        for known in reversed(self.attested()):
            if known != identifier and not self.obstacles(known):
                return known
        return ""

    def named(self, name: str) -> str:
        """Return the newest attested deployment whose id, release or model starts with ``name``.

        Raises `FleetError` that lists what there is.
        """
        candidates = [each for each in reversed(self.attested()) if not self.obstacles(each)]
        for known in candidates:
            found = self.read(known)
            if any(part.startswith(name) for part in (found.id, found.release, found.model)):
                return known
        listed = [f"{each.release} with {each.model}" for each in map(self.read, candidates)]
        raise FleetError(
            f"Nothing on this node matches '{name}'",
            expected="the beginning of the id of a release, model or deployment that served here",
            found="; ".join(listed) or "nothing was ever attested here",
        )

    def obstacles(self, identifier: str) -> list[str]:
        """Say why a deployment could not be activated: [] when all of it is on the node."""
        found = self.find(identifier)
        if found is None:
            return [f"deployment {identifier or 'none'} is not on this node"]
        problems = []
        if not (self.places.releases / found.release).is_dir():
            problems.append(f"the environment of release {found.release} is gone")
        if not (self.places.models / found.model).is_dir():
            problems.append(f"model {found.model} is gone")
        return problems

    def refuse(self, identifier: str, reason: str) -> None:
        """Remember that a deployment is known not to run on this node."""
        write_atomically(self._root / identifier / REFUSED, json.dumps({"reason": reason}) + "\n")

    def refused(self, identifier: str) -> str:
        """Return why a deployment is known not to run here, '' if nothing is known."""
        try:
            return read(_Refusal, self._root / identifier / REFUSED)["reason"]
        except FileNotFoundError:
            return ""
        except FleetError:
            # Somebody refused it: started all the same, it would fail in front of clients.
            return f"it was refused, and the note of why is damaged ({REFUSED})"

    def why_not(self, release: str, model: str, cuda_graphs: str) -> str:
        """Return why this node does not run a mode of CUDA graphs, '' if nothing is known."""
        try:
            names = [each.name for each in self._root.iterdir() if _ID.fullmatch(each.name)]
        except OSError:
            return ""
        wanted = (release, model, cuda_graphs)
        for name in sorted(names):
            found = self.find(name)
            reason = self.refused(name)
            if found and reason and (found.release, found.model, found.cuda_graphs) == wanted:
                return reason
        return ""

    def forgive(self, identifier: str) -> None:
        """Forget that a deployment did not run."""
        (self._root / identifier / REFUSED).unlink(missing_ok=True)

    def retire(self, keep: Sequence[str]) -> list[str]:
        """Remove deployments that nothing would go back to; return their ids."""
        needed = {self.current(), *keep, *self.attested()[-_KEEP:]}
        removed = []
        for folder in sorted(self._root.iterdir()) if self._root.is_dir() else []:
            if _ID.fullmatch(folder.name) and folder.name not in needed:
                shutil.rmtree(folder)
                removed.append(folder.name)
        return removed
