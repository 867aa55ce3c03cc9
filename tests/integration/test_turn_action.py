# SPDX-License-Identifier: Apache-2.0
"""A turn as Ansible takes it: which host is asked for what, in which order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from glm_fleet.node.deploying import AGAIN

ROOT = Path(__file__).resolve().parents[2]
Values = dict[str, Any]
# Stands for every module that a turn calls: writes down who was asked, and answers as it was told.
MODULE = """#!/usr/bin/python
# WANT_JSON
import json, os, sys
given = json.load(open(sys.argv[1]))
host, folder = os.environ["GLM_HOST"], os.environ["GLM_TEST"]
node = given.get("server") or given.get("node") or host
aside = "rehearse" if "drained" in given else "accept" if "stop" in given else "read"
asked = given.get("state") or given.get("mode") or aside
with open(f"{folder}/calls-{node}", "a") as calls:
    options = {key: each for key, each in given.items() if not key.startswith("_ansible")}
    calls.write(json.dumps([host, asked, options]) + "\\n")
answers = {
    "rehearse": {"rehearsal": {"id": "new", "words": "rehearsed in 9 s"}},
    "active": {"deployment": {"id": given.get("id"), "port": 8003, "release": "r", "model": "m"}},
    "watch": {"watched": {"ready": True, "phase": "ready", "progress": ""}},
    "attest": {"attestation": {"passed": True}},
    "answers": {"answers": {"prompts": "p", "release": f"r of {host}", "model": "m",
                            "invocation": "i", "said": []}},
    "drain": {"before": "ready", "sessions": 0},
    "ready": {"before": "drain", "sessions": 0},
}
told = json.load(open(f"{folder}/answers-{node}")).get(f"{host} {asked}", {})
print(json.dumps({"changed": True, **answers.get(asked, {}), **told}))
"""
PLAY = """
- hosts: gpu_nodes
  gather_facts: false
  tasks:
    - fleet_turn:
        purpose: "{{ purpose }}"
        gateways: "{{ through }}"
        wanted:
          ladder: [new]
          back: old
          differences: "{{ differences | default(['release']) }}"
          running: {active: true, record: {release: r0, model: m}}
        rehearse: "{{ rehearse | default(false) }}"
        rehearsal: {layers: 6}
        quality: "{{ quality | default({}) }}"
        read_ahead: "{{ ahead | default('') }}"
        held: "{{ held | default('') }}"
        acceptance: "{{ accepted | default({}) }}"
        places: {release_root: /opt/x}
        neighbours: "{{ groups['gpu_nodes'] + ['gone'] }}"
        min_ready: 2
        drain_timeout: 30
        stall_timeout: 40
        join_timeout: 50
      register: turn
      ignore_errors: true
    - ansible.builtin.copy:
        content: "{{ turn | to_json }}"
        dest: "{{ folder }}/turn-{{ inventory_hostname }}"
        mode: "0600"
"""
BOTH = ["gw01", "gw02"]
CRASH = {"failed": True, "msg": "it died", "diagnosis": "out of memory", "journal": ["dead"]}
ASKED = {"release": "r", "look": True}
# Each node takes another turn: its variables, and what is answered otherwise than well.
NODES: dict[str, tuple[Values, Values]] = {
    "through": ({"purpose": "switch", "ahead": "/srv/m"}, {}),
    "canary": ({"purpose": "switch", "rehearse": True}, {}),
    "dud": ({"purpose": "switch", "rehearse": True}, {"dud rehearse": CRASH}),
    "fails": ({"purpose": "switch", "held": "fans"}, {"fails attest": CRASH}),
    "refused": ({"purpose": "switch", "through": ["gw01", "gone"]}, {}),
    "leaves": ({"purpose": "leave", "held": "new fans"}, {}),
    "busy": (
        {"purpose": "leave", "through": ["gw02"]},
        {
            "gw02 drain": {"failed": True, "msg": "requests still run"},
            "busy answers": {"answers": {"said": "nothing that could be compared"}},
        },
    ),
    "returns": ({"purpose": "return"}, {}),
    "broken": ({"purpose": "return"}, {"broken attest": {"failed": True, "msg": "not passed"}}),
}

# Nodes whose right answers are counted: {which were right before, which are right after}.
ASKED_OF = {"asked": ("110", "101"), "worse": ("111", "010")}

# Nodes whose GPUs have to prove themselves still.
TRIED: dict[str, tuple[Values, Values]] = {
    "wrong": (
        {
            "purpose": "return",
            "accepted": {"did_not_pass": True, "message": "GPU 3 is slow", "of_release": False},
        },
        {},
    ),
    "accepted": ({"purpose": "switch", "accepted": {"needed": ["new"], "asked": ASKED}}, {}),
    "unfit": (
        {"purpose": "switch", "accepted": {"needed": ["new"], "asked": ASKED}},
        {"unfit accept": {"failed": True, "msg": "GPU 3 (serial 7) is slow", "of_release": False}},
    ),
    "known": (
        {
            "purpose": "switch",
            "accepted": {
                "needed": ["new"],
                "ran": True,
                "passed": False,
                "message": "GPU 3 (serial 7) is slow",
                "of_release": False,
                "asked": ASKED,
            },
        },
        {},
    ),
    "repaired": ({"purpose": "switch", "differences": [AGAIN]}, {}),
}


class Taken:
    """The turn of a node: what was asked, what came of it and what an operator saw."""

    def __init__(self, folder: Path, node: str, output: str) -> None:
        path = folder / f"calls-{node}"
        calls = path.read_text().splitlines() if path.exists() else []
        # Looks at a start, and what others ask, are not steps.
        aside = ("watch", "answers")
        self.calls = [each for each in map(json.loads, calls) if each[1] not in aside]
        self.asked = [f"{host} {asked}" for host, asked, _ in self.calls]
        self.options: list[Values] = [each[2] for each in self.calls]
        self.result: Values = json.loads((folder / f"turn-{node}").read_text())
        self.outcome: Values = self.result.get("outcome", {})
        begun = f"  {node}: "
        self.said = [line[len(begun) :] for line in output.splitlines() if line.startswith(begun)]


def host(folder: Path, name: str) -> Values:
    """Return the variables of a host that is this machine; its Python says which one it is."""
    python = folder / f"python-{name}"
    python.write_text(f'#!/bin/sh\nGLM_HOST={name} GLM_TEST={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return {"ansible_connection": "local", "ansible_python_interpreter": str(python)}


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Taken]:
    """All turns at once, as the nodes of one batch take them."""
    return take(tmp_path_factory.mktemp("turns"), NODES)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Taken]:
    """The turns of nodes whose GPUs have to prove themselves."""
    return take(tmp_path_factory.mktemp("tried"), TRIED)


def take(folder: Path, given: Mapping[str, tuple[Values, Values]]) -> Mapping[str, Taken]:
    """Let nodes take their turns: {node: (variables, answers otherwise than well)}."""
    (folder / "library").mkdir()
    for name in ("haproxy_server", "deployment", "vllm_probe", "fleet_lock", "model_pages",
                 "rehearsal", "acceptance", "vllm_quality"):  # fmt: skip
        (folder / "library" / f"{name}.py").write_text(MODULE)
    for node, (_, told) in given.items():
        (folder / f"answers-{node}").write_text(json.dumps(told))
    nodes = {
        node: {**host(folder, node), "through": BOTH, **variables}
        for node, (variables, _) in given.items()
    }
    # Nothing listens there.
    gone = {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_connection": "ssh"}
    gateways = {**{name: host(folder, name) for name in BOTH}, "gone": gone}
    groups = {"gpu_nodes": {"hosts": nodes}, "gateways": {"hosts": gateways}}
    inventory = {"all": {"children": groups, "vars": {"folder": str(folder)}}}
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    (folder / "play.yml").write_text(PLAY)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "hosts.yml", "play.yml"],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_LIBRARY": f"{folder}/library:{ROOT}/library",
            "ANSIBLE_NOCOLOR": "1",
            # A local connection looks below the user's own home, a module below $HOME.
            "ANSIBLE_ASYNC_DIR": str(folder / "jobs"),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {node: Taken(folder, node, done.stdout) for node in given}


def test_a_switch_asks_every_gateway_and_the_node(turns: Mapping[str, Taken]) -> None:
    taken = turns["through"]
    assert taken.asked == [
        "through read", "gw01 drain", "gw02 drain", "through active", "through attest",
        "gw01 ready", "gw02 ready",
    ]  # fmt: skip
    assert (taken.outcome["state"], taken.outcome["good"]) == ("serves", True)
    assert taken.outcome["runs"] == {"id": "new", "port": "8003", "release": "r", "model": "m"}
    assert taken.result["changed"]
    assert taken.options[0] == {"path": "/srv/m", "rate": 1_000_000_000}
    assert taken.options[1] == {
        "server": "through", "state": "drain", "timeout": 30, "min_ready": 2, "wait": True,
        "fail_when_busy": False,
    }  # fmt: skip
    assert taken.options[3] == {
        "state": "active", "id": "new", "rungs": ["new", "old"], "release_root": "/opt/x",
    }  # fmt: skip
    attest = taken.options[4]
    assert attest.pop("progress_file").startswith("/run/glm-fleet/")
    assert set(attest.pop("neighbours")) == {"broken"}, "one is gone, one talks nonsense"
    assert attest == {"mode": "attest", "release": "r", "model": "m", "stall_timeout": 40}
    assert taken.options[5] == {
        "server": "through", "state": "ready", "timeout": 50, "endpoint": "through:8003",
    }  # fmt: skip
    assert taken.said == [
        "reads its next weights into memory",
        "drains",
        "switches to deployment new",
        "is attested",
        "joins",
    ]


def test_what_is_new_is_rehearsed_while_the_node_is_drained(turns: Mapping[str, Taken]) -> None:
    taken = turns["canary"]
    assert taken.asked == [
        "gw01 drain", "gw02 drain", "canary rehearse", "canary active", "canary attest",
        "gw01 ready", "gw02 ready",
    ]  # fmt: skip
    options = {"rungs": ["new"], "drained": True, "layers": 6, "release_root": "/opt/x"}
    assert {key: taken.options[2][key] for key in options} == options
    assert taken.said[1].startswith("rehearses deployment new")
    assert taken.outcome["why"] == "rehearsed in 9 s"


def test_a_repair_starts_anew_what_runs(tried: Mapping[str, Taken]) -> None:
    given = {
        node: tried[node].options[tried[node].asked.index(f"{node} active")]
        for node in ("repaired", "accepted")
    }
    assert given["repaired"]["again"] is True
    assert "again" not in given["accepted"]


def test_what_cannot_be_rehearsed_is_never_switched_to(turns: Mapping[str, Taken]) -> None:
    taken = turns["dud"]
    assert taken.asked[2:] == ["dud rehearse", "dud active", "dud attest",
                               "gw01 ready", "gw02 ready"]  # fmt: skip
    assert taken.options[3]["id"] == "old"
    assert (taken.outcome["state"], taken.outcome["good"]) == ("rolled back", False)
    assert taken.outcome["why"] == "the rehearsal failed: out of memory"


def test_a_node_proves_its_gpus_between_the_drain_and_the_switch(
    tried: Mapping[str, Taken],
) -> None:
    taken = tried["accepted"]
    assert taken.asked[:4] == ["gw01 drain", "gw02 drain", "accepted accept", "accepted active"]
    assert taken.options[2] == {"release": "r", "look": True, "stop": True, "strict": True}
    assert taken.outcome["state"] == "serves"


def test_a_node_with_a_bad_board_is_not_switched(tried: Mapping[str, Taken]) -> None:
    taken = tried["unfit"]
    assert taken.asked == [
        "gw01 drain", "gw02 drain", "unfit accept", "gw01 drain", "gw02 drain"
    ]  # fmt: skip
    assert taken.outcome["state"] == "drained"
    assert taken.outcome["why"] == "GPU 3 (serial 7) is slow; it stays drained"
    # What was found while nothing ran there is not tried again.
    known = tried["known"]
    assert known.asked == ["gw01 drain", "gw02 drain", "gw01 drain", "gw02 drain"]
    assert known.outcome["why"] == taken.outcome["why"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Taken]:
    """The turns of nodes whose right answers are counted."""
    folder = tmp_path_factory.mktemp("scored")
    lines = [json.dumps({"question": str(each), "answer": "7"}) for each in range(3)]
    given: dict[str, tuple[Values, Values]] = {}
    for node, rights in ASKED_OF.items():
        (folder / f"set-{node}").write_text("\n".join(lines))
        quality = {"set": str(folder / f"set-{node}"), "record": str(folder / f"record-{node}")}
        told = {
            f"{node} {state}": {"score": {"release": release, "model": "m", "questions": "q",
                                          "right": right}}
            for state, release, right in zip(("recorded", "judged"), ("r0", "r"), rights)
        }  # fmt: skip
        given[node] = ({"purpose": "switch", "quality": quality}, told)
    return take(folder, given)


def test_right_answers_are_counted_before_and_after_the_switch(scored: Mapping[str, Taken]) -> None:
    taken = scored["asked"]
    assert taken.asked == [
        "gw01 drain", "gw02 drain", "asked recorded", "asked active", "asked attest",
        "asked judged", "gw01 ready", "gw02 ready",
    ]  # fmt: skip
    assert taken.outcome["state"] == "serves"
    assert taken.options[5]["before"] == {"release": "r0", "model": "m"}


def test_fewer_right_answers_go_back(scored: Mapping[str, Taken]) -> None:
    taken = scored["worse"]
    assert taken.asked[5:] == [
        "worse judged", "gw01 drain", "gw02 drain", "worse active", "worse attest",
        "gw01 ready", "gw02 ready",
    ]  # fmt: skip
    assert (taken.options[8]["id"], taken.options[8]["disproved"]) == ("old", "new")
    assert taken.outcome["state"] == "rolled back"
    assert "gives fewer right answers than before" in taken.outcome["why"]
    assert "100.0%" in taken.outcome["why"]


def test_a_node_with_a_bad_board_is_not_let_back(tried: Mapping[str, Taken]) -> None:
    taken = tried["wrong"]
    assert taken.asked == []
    assert taken.result["failed"]
    assert "Its GPUs did not prove themselves: GPU 3 is slow" in taken.result["msg"]


def test_a_failure_goes_back_and_the_task_goes_on(turns: Mapping[str, Taken]) -> None:
    taken = turns["fails"]
    assert taken.asked == [
        "gw01 drain", "gw02 drain", "fails active", "fails attest",
        "gw01 drain", "gw02 drain", "fails active", "fails attest",
    ]  # fmt: skip
    assert (taken.options[2]["id"], taken.options[6]["id"]) == ("new", "old")
    assert not taken.result["failed"]
    assert (taken.outcome["state"], taken.outcome["good"]) == ("drained", False)
    assert taken.outcome["why"] == "out of memory; going back failed too: out of memory"


def test_neighbours_that_cannot_be_asked_or_say_nothing_are_left_out(
    turns: Mapping[str, Taken],
) -> None:
    assert set(turns["fails"].options[3]["neighbours"]) == {"leaves", "refused", "returns"}
    (asked, *_) = turns["returns"].options
    assert {name: each["release"] for name, each in asked["neighbours"].items()} == {
        "broken": "r of broken",
        "through": "r of through",
    }
    assert asked["again"], "its hardware may be another"


def test_a_gateway_that_is_gone_ends_a_turn_before_anything_stops(
    turns: Mapping[str, Taken],
) -> None:
    taken = turns["refused"]
    assert taken.asked == ["gw01 drain", "gw01 ready"]
    assert not taken.result["failed"]
    assert (taken.outcome["state"], taken.outcome["good"]) == ("untouched", False)
    assert taken.outcome["why"].startswith("gone: ")


def test_a_node_that_leaves_is_held_before_anybody_waits(turns: Mapping[str, Taken]) -> None:
    taken = turns["leaves"]
    assert taken.asked == ["gw01 drain", "gw02 drain", "gw01 held", "gw01 drain", "gw02 drain"]
    waits = [each.get("wait", True) for each in taken.options if each["state"] == "drain"]
    assert waits == [False, False, True, True]
    assert taken.options[2]["reason"] == "new fans"
    # What says who asks is added on the way, as for any task.
    assert taken.options[2]["claim"]["owner"]
    assert not taken.result["failed"]


def test_a_turn_that_leaves_or_returns_fails_the_task(turns: Mapping[str, Taken]) -> None:
    busy, broken = turns["busy"], turns["broken"]
    assert busy.asked == ["gw02 drain", "gw02 ready"]
    assert (busy.result["failed"], busy.result["msg"]) == (True, "gw02: requests still run")
    assert broken.asked == ["broken attest"]
    assert (broken.result["failed"], broken.result["msg"]) == (True, "broken: not passed")


def test_a_node_returns_when_it_was_attested(turns: Mapping[str, Taken]) -> None:
    taken = turns["returns"]
    assert taken.asked == ["returns attest", "gw01 unheld", "gw01 ready", "gw02 ready"]
    assert taken.said == ["is attested", "is not held any more", "joins"]
