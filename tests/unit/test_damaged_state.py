# SPDX-License-Identifier: Apache-2.0
"""State that is damaged is refused, or had from elsewhere: it is never taken for state that is not.

Each kind is written by the code that writes it, damaged, and then asked for what it decides.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from glm_fleet.artifact.manifest import MANIFEST
from glm_fleet.artifact.retention import protected_by
from glm_fleet.artifact.store import Store
from glm_fleet.core.errors import FleetError
from glm_fleet.fleet.lock import FleetLock
from glm_fleet.gateway.client_store import ClientStore
from glm_fleet.gateway.clients import Clients, Key, add
from glm_fleet.health import history
from glm_fleet.model.pins import pin, pinned
from glm_fleet.model.source import Source
from glm_fleet.node.acceptance.record import read_acceptance, why_needed
from glm_fleet.serving.command import differences
from glm_fleet.serving.deployment import Deployments, Places, make
from glm_fleet.serving.policy import read_policy
from glm_fleet.serving.record import read_record

NOW = "2026-11-27T12:00:00+00:00"
DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) * 2 // 3],
    "another type": lambda text: "[7]" if text.lstrip().startswith("{") else '{"a": 7}',
    "no text": lambda text: "\0" * len(text),
    "another version": lambda text: json.dumps({"schema": "glm-fleet/9", "state": 7, "run": 7}),
}


@dataclass(frozen=True)
class Kind:
    """A kind of state: ``make`` writes it below a folder and returns its file.

    ``look`` asks for what it decides. It raises `FleetError`, or the words that it returns say
    that this was refused; '' would be what is said where there is no such state.
    """

    name: str
    make: Callable[[Path], Path]
    look: Callable[[Path], str]

    def __str__(self) -> str:
        return self.name


def deployments(folder: Path) -> Deployments:
    for each in ("releases/r1", "models/m1", "units"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    return Deployments(
        Places(
            deployments=folder / "etc/deployments",
            etc=folder / "etc",
            releases=folder / "releases",
            models=folder / "models",
        )
    )


DEPLOYMENT = make(
    release="r1",
    model="m1",
    cuda_graphs="piecewise",
    unit="[Service]\n",
    environment="A=1\n",
    policy='{"port": 8000, "served_model_name": "m", "required": [], "forbidden": []}\n',
)


def staged(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        known = deployments(folder)
        (folder / "etc/deployments").mkdir(parents=True)
        known.stage(DEPLOYMENT)
        known.note_attested(DEPLOYMENT.id)
        known.refuse(DEPLOYMENT.id, "an illegal instruction")
        found = folder / "etc/deployments" / name
        return found if found.exists() else folder / "etc/deployments" / DEPLOYMENT.id / name

    return write


def lock(folder: Path) -> Path:
    FleetLock(folder).take({"run": "r1", "owner": "o"}, replace="", now=NOW)
    return folder / "roll.json"


def hold(folder: Path) -> Path:
    FleetLock(folder).hold("gpu01", by="o", reason="a board", now=NOW)
    return folder / "held.json"


def taken(folder: Path) -> str:
    FleetLock(folder).take({"run": "r2", "owner": "o"}, replace="", now=NOW)
    return ""


def source() -> Source:
    return Source("a/b", "main", ())


def pins(folder: Path) -> Path:
    pin(Store(folder), source(), "0" * 40)
    return folder / ".pins.json"


def clients(folder: Path) -> Path:
    known = add(Clients(), "alice", Key("1", "a" * 64), {}, NOW)
    ClientStore(folder / "clients.json", folder / "maps").write(known, "")
    return folder / "clients.json"


def published(folder: Path) -> Path:
    made = folder / "made"
    made.mkdir()
    (made / "a").write_text("a")
    store = Store(folder / "store")
    manifest = store.adopt(made, kind="model", slug="m", provenance={})
    return store.published_path("model", manifest.id) / MANIFEST


def look_at_artifacts(folder: Path) -> str:
    store = Store(folder / "store")
    (path,) = (folder / "store/model").glob("m-*")
    return "" if store.published("model") else f"{path.name} is not published"


def report(folder: Path) -> Path:
    history.save(folder, {"schema": history.SCHEMA, "time": NOW, "nodes": [], "gateways": []}, 3)
    (path,) = folder.iterdir()
    return path


def look_at_reports(folder: Path) -> str:
    damaged: list[str] = []
    assert history.load(folder, 3, damaged) == [] or not damaged
    return " ".join(damaged)


def record(folder: Path) -> Path:
    told = {"release": "r1", "model": "m1", "invocation": "i1", **DEPLOYMENT.digests}
    (folder / "serving.json").write_text(json.dumps(told))
    return folder / "serving.json"


def look_at_start(folder: Path) -> str:
    running = {
        "active": True,
        "invocation": "i1",
        "record": read_record(folder / "serving.json"),
    }
    return "; ".join(differences(running, DEPLOYMENT.digests))


def acceptance(folder: Path) -> Path:
    told = {"schema": 1, "time_s": 1.0, "seconds": 9.5, "release": "r", "passed": True,
            "fingerprint": {"gpus": {"GPU-0": "1"}, "driver": "580", "kernels": "k"},
            "modules": [], "faults": [], "notes": [], "dcgm": None, "gpus": []}  # fmt: skip
    (folder / "acceptance.json").write_text(json.dumps(told))
    return folder / "acceptance.json"


def look_at_acceptance(folder: Path) -> str:
    now = {"gpus": {"GPU-0": "1"}, "driver": "580", "kernels": "k"}
    return "; ".join(why_needed(read_acceptance(folder / "acceptance.json"), now))  # type: ignore[arg-type]


def to_go_back(folder: Path) -> Path:
    (folder / "previous.json").write_text(json.dumps({"release": "r1", "model": "m1"}))
    return folder / "previous.json"


def policy(folder: Path) -> Path:
    (folder / "attestation.json").write_text(DEPLOYMENT.policy)
    return folder / "attestation.json"


KINDS = (
    Kind("lock", lock, taken),
    Kind("holds", hold, lambda folder: "" if FleetLock(folder).held() else "nothing is held"),
    Kind("pins", pins, lambda folder: "" if pinned(Store(folder), source()) else "not pinned"),
    Kind(
        "clients",
        clients,
        lambda folder: str(ClientStore(folder / "clients.json", folder / "maps").merged([]) and ""),
    ),
    Kind("manifest", published, look_at_artifacts),
    Kind(
        "deployment",
        staged("deployment.json"),
        lambda folder: "; ".join(deployments(folder).obstacles(DEPLOYMENT.id)),
    ),
    Kind("start record", record, look_at_start),
    Kind("acceptance", acceptance, look_at_acceptance),
    Kind("kept report", report, look_at_reports),
    Kind(
        "what a roll-back needs",
        to_go_back,
        lambda folder: "" if protected_by([], folder / "previous.json") else "nothing is needed",
    ),
    Kind("policy", policy, lambda folder: str(read_policy(folder / "attestation.json") and "")),
)


def damaged(kind: Kind, damage: str, folder: Path) -> Path:
    path = kind.make(folder)
    path.write_text(DAMAGE[damage](path.read_text()))
    return path


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_is_refused_in_one_sentence_and_left_as_it_is(
    kind: Kind, damage: str, tmp_path: Path
) -> None:
    path = damaged(kind, damage, tmp_path)
    before = path.read_bytes()
    try:
        said = kind.look(tmp_path)
    except FleetError as error:
        said = str(error)
        assert error.expected
        assert error.found
    assert said, "it was taken for state that is not there"
    assert "\n" not in said
    assert said not in ("nothing is held", "not pinned", "nothing is needed")
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_right_is_taken(kind: Kind, tmp_path: Path) -> None:
    kind.make(tmp_path)
    # Only the lock is refused when it is right: another run has it.
    with pytest.raises(FleetError) if kind.name == "lock" else contextlib.nullcontext():
        assert kind.look(tmp_path) == ""


@pytest.fixture(params=DAMAGE)
def damage(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_what_passed_is_had_from_its_marks(damage: str, tmp_path: Path) -> None:
    damaged(Kind("", staged("attested.json"), lambda _: ""), damage, tmp_path)
    assert deployments(tmp_path).attested() == [DEPLOYMENT.id]


def test_what_was_refused_stays_refused(damage: str, tmp_path: Path) -> None:
    damaged(Kind("", staged("refused.json"), lambda _: ""), damage, tmp_path)
    assert "the note of why is damaged" in deployments(tmp_path).refused(DEPLOYMENT.id)
    deployments(tmp_path).forgive(DEPLOYMENT.id)
    assert deployments(tmp_path).refused(DEPLOYMENT.id) == ""


def test_clients_are_had_from_another_gateway(damage: str, tmp_path: Path) -> None:
    right = clients(tmp_path).read_text()
    (tmp_path / "clients.json").write_text(DAMAGE[damage](right))
    store = ClientStore(tmp_path / "clients.json", tmp_path / "maps")
    assert store.merged([right]).text() == right
