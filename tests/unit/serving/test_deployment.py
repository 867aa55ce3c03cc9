# SPDX-License-Identifier: Apache-2.0
"""Deployments: staged beside what runs, switched to as one thing, taken back from the disk."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.node import deploying
from glm_fleet.node.deploying import Deploying
from glm_fleet.serving.activation import (
    activate,
    compare,
    environment_changes,
    install_policy,
    mend_links,
    unit_changes,
)
from glm_fleet.serving.deployment import UNIT, Deployment, Deployments, Places, make

ROOT = Path(__file__).resolve().parents[3]
SECRET = "sk-very-secret"  # noqa: S105 - no password


def unit(*flags: str, stop: int = 720) -> str:
    words = " \\\n  ".join(["/opt/glm-fleet/current/bin/vllm serve", "/srv/model", *flags])
    return f"[Service]\nExecStart={words}\nTimeoutStopSec={stop}\n"


def one(
    release: str = "r1", *, model: str = "m1", graphs: str = "piecewise", **changed: str
) -> Any:
    parts = {
        "unit": unit(f"--graphs {graphs}"),
        "environment": f"A=1\nVLLM_API_KEY={SECRET}\n",
        "policy": '{"port": 8000, "served_model_name": "m", "required": [], "forbidden": []}\n',
        **changed,
    }
    return make(release=release, model=model, cuda_graphs=graphs, **parts)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for folder in ("units", "releases/r1", "releases/r2", "models/m1", "models/m2"):
        (tmp_path / folder).mkdir(parents=True)
    for release in ("r1", "r2"):
        note = tmp_path / "releases" / release / "glm-fleet-release.json"
        note.write_text(json.dumps({"release": release}))
    return Places(
        deployments=tmp_path / "etc/deployments",
        etc=tmp_path / "etc",
        units=tmp_path / "units",
        release_link=tmp_path / "current",
        releases=tmp_path / "releases",
        model_link=tmp_path / "model",
        models=tmp_path / "models",
    )


@pytest.fixture
def node(places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployments]:
    # The service's group is not on this host.
    monkeypatch.setattr("shutil.chown", lambda *_: None)
    before = os.umask(0o022)
    yield Deployments(places)
    os.umask(before)


def served(node: Deployments, *wanted: Deployment) -> None:
    """Leave the node as if it had served these, one after the other."""
    for each in wanted:
        node.stage(each)
        node.note_attested(each.id)


class Systemd:
    """Answers for systemctl and fails when it is called in another order or number."""

    def __init__(self, *expected: str) -> None:
        self.expected = list(expected)

    def __call__(self, argv: Sequence[str], **_: Any) -> RunResult:
        assert self.expected, f"one call too many: {argv}"
        assert " ".join(argv) == self.expected.pop(0)
        return RunResult(0, "", "")


SWITCH = (
    f"systemctl stop {UNIT}",
    "systemctl daemon-reload",
    f"systemctl reset-failed {UNIT}",
    f"systemctl enable {UNIT}",
    f"systemctl start --no-block {UNIT}",
)


# -- named by their content ------------------------------------------------------------


def test_the_id_is_what_a_restart_would_bring() -> None:
    assert one().id == one().id
    changed = [
        one("r2"),
        one(model="m2"),
        one(graphs="eager"),
        one(environment="A=2\n"),
        one(unit=unit(stop=60)),
    ]
    assert len({one().id, *(each.id for each in changed)}) == 6
    # What the attestation expects may change without a restart.
    assert one(policy="{}").id == one().id


def test_parts_do_not_run_into_each_other() -> None:
    assert one("r1", model="m1").id != one("r1m", model="1").id


def test_nothing_secret_is_told_of_a_deployment(node: Deployments) -> None:
    old, new = one(), one("r2", environment="VLLM_API_KEY=another\n")
    served(node, old)
    said = [
        json.dumps([old.summary(), old.digests]),
        *compare({"active": True}, new, old),
        environment_changes(old.environment, new.environment),
        (node.places.deployments / old.id / "deployment.json").read_text(),
    ]
    with pytest.raises(FleetError) as error:
        node.named("nothing")
    assert SECRET not in "".join([*said, str(error.value)])


# -- staged ----------------------------------------------------------------------------


def test_staging_touches_nothing_that_runs(node: Deployments) -> None:
    assert node.stage(one())
    assert not node.stage(one())
    assert node.read(one().id) == one()
    assert node.current() == ""
    assert node.attested() == []
    assert list(node.places.units.iterdir()) == []
    assert not node.places.release_link.exists()


def test_check_mode_stages_nothing(node: Deployments) -> None:
    assert node.stage(one(), check_mode=True)
    assert not node.places.deployments.exists()


def test_another_policy_is_staged_under_the_same_id(node: Deployments) -> None:
    node.stage(one())
    assert node.stage(one(policy='{"port": 9}\n'))
    assert node.read(one().id).policy == '{"port": 9}\n'


def test_only_root_reads_what_may_hold_a_key(node: Deployments) -> None:
    node.stage(one())
    folder = node.places.deployments / one().id
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert modes["serving.env"] == "0o600"
    assert modes[UNIT] == "0o644"
    assert node.places.deployments.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_staging_that_was_cut_off_is_no_deployment(node: Deployments) -> None:
    node.stage(one())
    (node.places.deployments / one().id / "deployment.json").unlink()
    assert node.find(one().id) is None
    with pytest.raises(FleetError, match=r"does not have the deployment.*run site\.yml"):
        node.read(one().id)
    assert node.stage(one())
    assert node.find(one().id) == one()


def test_no_deployment_has_no_name(node: Deployments) -> None:
    assert node.find("") is None
    assert node.obstacles("") == ["deployment none is not on this node"]


# -- what to go back to ----------------------------------------------------------------


def test_back_is_the_newest_that_passed_and_can_still_run(node: Deployments) -> None:
    first, second, third = one(), one("r2"), one("r2", model="m2")
    served(node, first, second, third)
    assert node.before(third.id) == second.id
    assert node.before("unknown") == third.id
    shutil.rmtree(node.places.releases / "r2")
    assert node.obstacles(second.id) == ["the environment of release r2 is gone"]
    assert node.before(third.id) == first.id
    shutil.rmtree(node.places.models / "m1")
    assert node.before(third.id) == ""


def test_what_was_only_staged_is_nothing_to_go_back_to(node: Deployments) -> None:
    node.stage(one())
    assert node.before(one("r2").id) == ""
    node.note_attested("")
    assert node.attested() == []


def test_passing_again_makes_it_the_newest(node: Deployments) -> None:
    served(node, one(), one("r2"), one())
    assert node.attested() == [one("r2").id, one().id]


def test_what_turned_out_not_to_be_right_is_nothing_to_go_back_to(node: Deployments) -> None:
    served(node, one(), one("r2"))
    node.note_disproved(one("r2").id)
    assert node.attested() == [one().id]
    assert node.before(one("r3").id) == one().id
    # Nor by what the folders say, where the note is damaged.
    (node.places.deployments / "attested.json").write_text("{")
    assert node.attested() == [one().id]


@pytest.mark.parametrize("damage", ["", "{", '{"a": 1}', "7"])
def test_a_damaged_note_of_what_passed_loses_no_way_back(node: Deployments, damage: str) -> None:
    served(node, one(), one("r2"))
    for number, each in enumerate((one(), one("r2"))):
        os.utime(node.places.deployments / each.id / "attested", (number, number))
    activate(Systemd(*SWITCH), node, one("r2").id)
    (node.places.deployments / "attested.json").write_text(damage)
    assert node.attested() == [one().id, one("r2").id]
    assert node.before(one("r2").id) == one().id
    node.note_attested(one().id)
    assert node.attested() == [one("r2").id, one().id]


def test_links_that_lead_elsewhere_are_named_and_mended(node: Deployments) -> None:
    places, wanted = node.places, one()
    served(node, wanted)
    activate(Systemd(*SWITCH), node, wanted.id)
    assert mend_links(wanted, places) == []
    places.release_link.unlink()
    places.release_link.symlink_to("/nowhere")
    places.model_link.unlink()
    (places.model_link / "by-hand").mkdir(parents=True)
    (places.deployments / "current").unlink()
    told = mend_links(wanted, places, check_mode=True)
    assert told == mend_links(wanted, places)
    assert f"{places.release_link} led to /nowhere" in told
    assert f"{places.deployments}/current was missing" in told
    assert any("is moved to" in each and each.startswith(str(places.model_link)) for each in told)
    assert places.model_link.with_name("model.aside-1").joinpath("by-hand").is_dir()
    assert mend_links(wanted, places) == []
    assert node.current() == wanted.id


def test_what_is_gone_is_not_what_ran_before(node: Deployments) -> None:
    served(node, one(), one("r2"))
    activate(Systemd(*SWITCH), node, one("r2").id)
    shutil.rmtree(node.places.deployments / one("r2").id)
    assert node.current() == one("r2").id
    assert found(node, target="before")["ladder"] == [one().id]


def test_a_deployment_is_found_by_the_beginning_of_a_name(node: Deployments) -> None:
    older, newer = one(), one(model="m2")
    served(node, older, newer)
    assert node.named("r1") == newer.id
    assert node.named("m1") == older.id
    assert node.named(older.id[:5]) == older.id
    with pytest.raises(FleetError, match=r"matches 'r9'.*Found: r1 with m2; r1 with m1"):
        node.named("r9")


def test_nothing_was_ever_attested_is_said(node: Deployments) -> None:
    with pytest.raises(FleetError, match="nothing was ever attested here"):
        node.named("r1")


def test_known_failures_are_remembered_until_they_are_forgiven(node: Deployments) -> None:
    node.stage(one())
    assert node.refused(one().id) == ""
    node.refuse(one().id, "an illegal instruction")
    assert node.refused(one().id) == "an illegal instruction"
    assert node.find(one().id) == one()
    node.forgive(one().id)
    node.forgive(one().id)
    assert node.refused(one().id) == ""


def test_retiring_keeps_what_somebody_would_go_back_to(node: Deployments) -> None:
    many = [one(environment=f"A={number}\n") for number in range(7)]
    served(node, *many)
    staged = one("r2")
    kept = one("r2", graphs="eager")
    node.stage(staged)
    node.stage(kept)
    (node.places.deployments / "current").symlink_to(node.places.deployments / many[0].id)
    gone = node.retire([kept.id, ""])
    assert sorted(gone) == sorted([many[1].id, many[2].id, staged.id])
    for each in (many[0], *many[3:], kept):
        assert node.find(each.id) == each
    assert node.retire([kept.id]) == []


def test_there_is_nothing_to_retire_on_a_bare_node(node: Deployments) -> None:
    assert node.retire([]) == []


# -- what a restart would change -------------------------------------------------------


def running(of: Deployment, **changed: str) -> dict[str, Any]:
    return {
        "active": True,
        "invocation": "i",
        "record": {**of.digests, "invocation": "i", **changed},
    }


def test_what_runs_already_differs_in_nothing() -> None:
    assert compare(running(one()), one(), one()) == []
    assert compare(running(one()), one(), None) == []


def test_changes_are_named_by_flag_and_variable() -> None:
    new = one("r2", unit=unit("--graphs eager", "--seed 1"), environment=f"A=2\nK={SECRET}\n")
    assert compare(running(one()), new, one()) == [
        "release r1 -> r2",
        "--graphs piecewise -> eager",
        "--seed 1 added",
        "environment: A, K, VLLM_API_KEY",
    ]


def test_changes_against_something_unknown_are_named_coarsely() -> None:
    new = one(unit=unit("--seed 1"), environment="A=2\n")
    coarse = ["the unit or its command line", "the environment"]
    assert compare(running(one()), new, None) == coarse
    # The deployment that is current is not the one that runs.
    assert compare(running(one()), new, one("r2")) == coarse


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (unit("--a 1"), unit(), ["--a removed"]),
        (unit("--eager"), unit("--eager on1"), ["--eager on -> on1"]),
        (unit(), unit("--eager"), ["--eager added"]),
        (unit("--a=1"), unit("--a 1"), ["the unit or its command line"]),
        (unit("--a 1"), unit("--a 2", stop=9), ["--a 1 -> 2", "the unit"]),
        (unit(stop=1), unit(stop=2), ["the unit"]),
        (unit('--c "{\\"a\\":1}"'), unit('--c "{\\"a\\":2}"'), ['--c {"a":1} -> {"a":2}']),
    ],
)
def test_a_change_of_the_unit_in_words(old: str, new: str, said: list[str]) -> None:
    assert unit_changes(old, new) == said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("A=1\nB=2\n", "A=1\nC=3\n", "environment: B, C"),
        ("# one\nA=1\n", "# two\nA=1\n", "the environment"),
        ("", f"K={SECRET}\n", "environment: K"),
    ],
)
def test_a_change_of_the_environment_names_no_value(old: str, new: str, said: str) -> None:
    assert environment_changes(old, new) == said


# -- switched --------------------------------------------------------------------------


def test_everything_is_switched_as_one_thing(node: Deployments) -> None:
    wanted = one("r2", model="m2")
    node.stage(wanted)
    ticks = iter([10.0, 13.5, 14.0])
    systemd = Systemd(*SWITCH)
    assert activate(systemd, node, wanted.id, clock=lambda: next(ticks)) == {
        "stop_s": 3.5,
        "switch_s": 0.5,
    }
    assert systemd.expected == []
    places = node.places
    assert node.current() == wanted.id
    assert places.release_link.readlink() == places.releases / "r2"
    assert places.model_link.readlink() == places.models / "m2"
    assert (places.units / UNIT).read_text() == wanted.unit
    assert (places.units / UNIT).stat().st_mode & 0o777 == 0o644
    assert (places.etc / "serving.env").read_text() == wanted.environment
    assert (places.etc / "serving.env").stat().st_mode & 0o777 == 0o640
    assert (places.etc / "attestation.json").read_text() == wanted.policy


def test_switching_back_brings_back_every_part(node: Deployments) -> None:
    old, new = one(), one("r2", model="m2", environment="A=3\n")
    for each in (old, new, old):
        node.stage(each)
        activate(Systemd(*SWITCH), node, each.id)
    assert node.current() == old.id
    assert node.places.release_link.readlink().name == "r1"
    assert node.places.model_link.readlink().name == "m1"
    assert (node.places.etc / "serving.env").read_text() == old.environment


@pytest.mark.parametrize("part", ["releases/r2", "models/m2"])
def test_a_part_that_is_missing_is_seen_before_anything_stops(
    node: Deployments, tmp_path: Path, part: str
) -> None:
    wanted = one("r2", model="m2")
    node.stage(wanted)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(FleetError, match=r"cannot be activated.*gone.*run site\.yml"):
        activate(Systemd(), node, wanted.id)
    assert node.current() == ""


def test_an_unknown_deployment_stops_nothing(node: Deployments) -> None:
    with pytest.raises(FleetError, match="does not have the deployment"):
        activate(Systemd(), node, "0" * 12)


def test_a_switch_that_was_cut_off_is_repeated(node: Deployments) -> None:
    wanted = one("r2")
    node.stage(wanted)
    with pytest.raises(AssertionError, match="one call too many"):
        activate(Systemd(SWITCH[0]), node, wanted.id)
    activate(Systemd(*SWITCH), node, wanted.id)
    assert node.places.release_link.readlink().name == "r2"


def test_two_switches_of_a_node_wait_for_each_other(node: Deployments) -> None:
    inside, release, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with node.switching():
            inside.set()
            release.wait(5)
            order.append("first")

    def second() -> None:
        with node.switching():
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    threads[1].join(0.2)
    assert order == []
    release.set()
    for thread in threads:
        thread.join(5)
    assert order == ["first", "second"]


def test_a_policy_is_installed_once(node: Deployments) -> None:
    assert install_policy(one(), node.places, check_mode=True)
    node.places.etc.mkdir(exist_ok=True)
    assert not (node.places.etc / "attestation.json").exists()
    assert install_policy(one(), node.places)
    assert not install_policy(one(), node.places)


# -- on a host --------------------------------------------------------------------------


def yes(argv: Sequence[str], **_: Any) -> RunResult:
    """A systemd that always says yes."""
    return RunResult(0, "", "")


def found(node: Deployments, *, check_mode: bool = False, **asked: Any) -> dict[str, Any]:
    return Deploying(yes, node, check_mode).find(**asked)


def switched(
    node: Deployments, identifier: str, *, check_mode: bool = False, **asked: Any
) -> dict[str, Any]:
    releases = Path("/srv/a/release")
    return Deploying(yes, node, check_mode).switch(identifier, releases=releases, **asked)


def test_the_lower_steps_of_a_ladder_wait_on_the_node(node: Deployments) -> None:
    ladder = [one(graphs=mode) for mode in ("full", "piecewise", "eager")]
    rungs = [each.id for each in ladder]
    for each in ladder:
        node.stage(each)
    switched(node, rungs[0], rungs=rungs)
    second = {"rungs": rungs, "refuse": rungs[0], "reason": "illegal instruction"}
    assert switched(node, rungs[1], **second)["deployment"]["cuda_graphs"] == "piecewise"
    # The next run does not try again what is known to fail here.
    told = found(node, rungs=rungs)
    assert told["ladder"] == rungs[1:]
    assert told["skipped_rungs"] == [{"cuda_graphs": "full", "reason": "illegal instruction"}]
    # The health check says why.
    assert node.why_not("r1", "m1", "full") == "illegal instruction"
    assert node.why_not("r2", "m1", "full") == node.why_not("r1", "m1", "piecewise") == ""
    # Unless it is told to; check mode forgets nothing.
    assert found(node, rungs=rungs, retry=True, check_mode=True)["ladder"] == rungs
    assert node.refused(rungs[0])
    assert found(node, rungs=rungs, retry=True)["ladder"] == rungs
    assert node.refused(rungs[0]) == ""


def test_a_damaged_environment_is_a_difference_and_is_built_again_in_the_turn(
    node: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(node, one())
    activate(Systemd(*SWITCH), node, one().id)
    home = node.places.releases / "r1"
    built: list[tuple[Path, Path, str]] = []

    def ensure(_: Any, artifact: Path, dest: Path, *, user: str, compile_bytecode: bool) -> None:
        assert compile_bytecode
        built.append((artifact, dest, user))
        (dest / "glm-fleet-release.json").write_text('{"release": "r1"}')

    monkeypatch.setattr(deploying.environment, "ensure", ensure)
    record = {**one().digests, "invocation": "i"}
    running = {"active": True, "invocation": "i", "record": record, "unit": {}}
    monkeypatch.setattr(deploying, "read_running", lambda *_: running)
    monkeypatch.setattr(deploying, "unproven", lambda *_: False)
    monkeypatch.setattr(deploying, "activate", lambda *_, **__: {"stop_s": 1.0})
    assert found(node, rungs=[one().id])["differences"] == []
    (home / "glm-fleet-release.json").unlink()
    (words,) = found(node, rungs=[one().id])["differences"]
    assert words == "its environment is damaged: glm-fleet-release.json missing"
    told = switched(node, one().id)
    assert told["changed"]
    assert built == [(Path("/srv/a/release/r1"), home, "glm")]
    assert not switched(node, one().id)["changed"]


def test_a_node_that_runs_what_it_should_is_started_anew_when_its_repair_is_asked_for(
    node: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(node, one())
    activate(Systemd(*SWITCH), node, one().id)
    record = {**one().digests, "invocation": "i"}
    running = {"active": True, "invocation": "i", "record": record, "unit": {}}
    monkeypatch.setattr(deploying, "read_running", lambda *_: running)
    monkeypatch.setattr(deploying, "unproven", lambda *_: False)
    started: list[str] = []
    monkeypatch.setattr(deploying, "activate", lambda *given, **__: started.append(given[2]) or {})
    assert found(node, rungs=[one().id])["differences"] == []
    assert found(node, rungs=[one().id], again=True)["differences"] == [deploying.AGAIN]
    assert not switched(node, one().id)["changed"]
    assert switched(node, one().id, again=True)["changed"]
    assert started == [one().id]


def test_the_last_starts_are_remembered(node: Deployments) -> None:
    node.stage(one())
    assert found(node, rungs=[one().id])["starts"] == []
    for seconds in range(10):
        node.note_start(f"start {seconds}", 400.04 + seconds)
    # Attested once more, without having been started.
    node.note_start("start 9", 500.0)
    assert found(node, rungs=[one().id])["starts"] == [
        402.0, 403.0, 404.0, 405.0, 406.0, 407.0, 408.0, 409.0,
    ]  # fmt: skip
    (node.places.deployments / "starts.json").write_text('["soon"]')
    assert node.starts() == []


def test_check_mode_activates_nothing(node: Deployments) -> None:
    node.stage(one())
    assert switched(node, one().id, check_mode=True)["changed"]
    assert node.current() == ""


def test_going_back_leads_from_what_runs_to_what_ran_before(node: Deployments) -> None:
    old, new = one(), one("r2")
    served(node, old, new)
    activate(Systemd(*SWITCH), node, new.id)
    told = found(node, target="before")
    assert (told["ladder"], told["back"]) == ([old.id], new.id)
    assert found(node, target="r2")["ladder"] == [new.id]


def test_a_node_that_an_upgrade_did_not_reach_stays_when_the_rest_goes_back(
    node: Deployments,
) -> None:
    ancient, old, new = one(model="m2"), one(), one("r2")
    served(node, ancient, old)
    activate(Systemd(*SWITCH), node, old.id)
    node.stage(new)
    planned = found(node, rungs=[new.id])
    assert planned["back"] == old.id
    assert found(node, target=planned["back"])["ladder"] == [old.id]


def test_nothing_to_go_back_to_is_an_empty_ladder(node: Deployments) -> None:
    served(node, one())
    activate(Systemd(*SWITCH), node, one().id)
    told = found(node, target="before")
    assert (told["ladder"], told["wanted"], told["differences"]) == ([], {}, [])


def test_what_a_roll_back_needs_is_written_down(node: Deployments) -> None:
    served(node, one("r1"), one("r2"))
    places = node.places
    activate(Systemd(*SWITCH), node, one("r2").id)
    previous = places.etc / "previous.json"
    assert json.loads(previous.read_text()) == {"release": "r1", "model": "m1"}
    activate(Systemd(*SWITCH), node, one("r1").id)
    assert json.loads(previous.read_text()) == {"release": "r2", "model": "m1"}


def test_what_passed_counts_only_while_it_is_what_was_activated(node: Deployments) -> None:
    served(node, one("r1"))
    node.stage(one("r2"))
    activate(Systemd(*SWITCH), node, one("r2").id)
    node.note_passed("r1", "m1")
    assert node.attested() == [one("r1").id]
    node.note_passed("r2", "m1")
    assert node.attested() == [one("r1").id, one("r2").id]


def test_a_start_that_serves_nobody_is_not_waited_for(node: Deployments) -> None:
    node.stage(one("r1"))
    kill = f"systemctl kill --signal=SIGTERM {UNIT}"
    activate(Systemd(kill, *SWITCH), node, one("r1").id, attested_now=False)
