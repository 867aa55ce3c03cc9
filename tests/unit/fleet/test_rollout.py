# SPDX-License-Identifier: Apache-2.0
"""Rolls: who is taken out when, how a turn ended, and what the tables say of it."""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict, replace
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.fleet import outcome, rollout, rollout_table
from glm_fleet.fleet.rollout import (
    JOIN,
    RESTART,
    Load,
    NodeState,
    Plan,
    first_to_try,
    plan_roll,
)
from glm_fleet.fleet.rollout_facts import NodeAnswers, endings, found_or_staged, plan_fleet
from glm_fleet.fleet.rollout_table import Ending

CHANGE = ("release r1 -> r2",)


def node(name: str, *, changes: bool = True, ready: bool = True, held: str = "") -> NodeState:
    return NodeState(name, CHANGE if changes else (), ready, held=held)


def serving(count: int) -> list[NodeState]:
    return [node(f"gpu{number:02}") for number in range(1, count + 1)]


def plan(nodes: list[NodeState], **given: Any) -> Plan:
    options = {"batch": 1, "min_ready": 1, "ready": sum(each.ready for each in nodes), **given}
    return plan_roll(nodes, **options)


def groups(found: Plan) -> list[list[str]]:
    """The names of each batch; also sees that sizes and numbers agree."""
    made: list[list[str]] = [[] for _ in found.batches]
    for turn in found.turns:
        made[turn.batch - 1].append(turn.node)
    assert [len(group) for group in made] == list(found.batches)
    return made


def test_one_canary_goes_before_the_batches() -> None:
    assert groups(plan(serving(6), batch=2)) == [
        ["gpu01"],
        ["gpu02", "gpu03"],
        ["gpu04", "gpu05"],
        ["gpu06"],
    ]


def test_a_node_that_serves_nobody_is_the_canary() -> None:
    nodes = [node("gpu01"), node("gpu02", ready=False), node("gpu03", ready=False), node("gpu04")]
    assert groups(plan(nodes)) == [["gpu02"], ["gpu03"], ["gpu01"], ["gpu04"]]


def test_what_only_has_to_join_comes_first_and_is_not_restarted() -> None:
    nodes = [node("gpu01"), node("gpu02", changes=False, ready=False)]
    found = plan(nodes)
    assert [(turn.node, turn.kind) for turn in found.turns] == [
        ("gpu02", JOIN),
        ("gpu01", RESTART),
    ]


def test_what_runs_what_it_should_has_no_turn() -> None:
    assert plan([node("gpu01", changes=False), node("gpu02", changes=False)]).turns == []


def test_a_held_node_is_switched_last_and_neither_joins_nor_counts() -> None:
    held = node("gpu03", ready=False, held="fans")
    assert groups(plan([node("gpu01"), node("gpu02"), held])) == [["gpu01"], ["gpu02"], ["gpu03"]]
    with pytest.raises(FleetError, match="No node can be taken out"):
        plan([node("gpu01"), node("gpu02"), held], min_ready=2)
    assert plan([node("gpu03", changes=False, ready=False, held="fans")]).turns == []


def test_a_percentage_is_of_the_nodes_of_the_run() -> None:
    assert list(plan(serving(9), batch="25%").batches) == [1, 2, 2, 2, 2]
    assert list(plan(serving(3), batch="1%").batches) == [1, 1, 1]


def test_a_batch_never_goes_below_what_has_to_stay_ready() -> None:
    assert list(plan(serving(4), batch="100%", min_ready=2).batches) == [1, 2, 1]
    # Nodes outside this run go on serving too.
    assert list(plan(serving(2), batch=2, min_ready=2, ready=8).batches) == [1, 1]


@pytest.mark.parametrize(("count", "least"), [(1, 1), (3, 3), (2, 5)])
def test_a_roll_that_would_leave_too_few_is_refused(count: int, least: int) -> None:
    with pytest.raises(FleetError, match=f"serve_min_ready={least}.*Found: {count}"):
        plan(serving(count), min_ready=least)


def test_nodes_that_will_join_make_room() -> None:
    nodes = [node("gpu01"), node("gpu02", changes=False, ready=False)]
    assert groups(plan(nodes, min_ready=1)) == [["gpu02"], ["gpu01"]]


def test_a_fleet_of_one_rolls_when_an_outage_is_allowed() -> None:
    assert groups(plan(serving(1), min_ready=0)) == [["gpu01"]]
    assert groups(plan([node("gpu01", ready=False)], min_ready=1)) == [["gpu01"]]


def test_a_dead_node_can_be_mended_when_no_other_can_be_spared() -> None:
    nodes = [node("gpu01", ready=False), node("gpu02", changes=False)]
    assert groups(plan(nodes, min_ready=1)) == [["gpu01"]]


def test_the_named_canary_begins() -> None:
    assert groups(plan(serving(3), canary="gpu03")) == [["gpu03"], ["gpu01"], ["gpu02"]]
    idle = [node(name, ready=False) for name in ("gpu01", "gpu02", "gpu03")]
    assert groups(plan(idle, canary="gpu02")) == [["gpu02"], ["gpu01", "gpu03"]]


def test_an_unknown_canary_is_refused() -> None:
    with pytest.raises(FleetError, match=r"serve_canary to be one of gpu01, gpu02\. Found: gpu09"):
        plan(serving(2), canary="gpu09")


@pytest.mark.parametrize("batch", ["0", "-1", "101%", "0%", "two", "", "1.5"])
def test_a_batch_that_cannot_be_read_is_refused(batch: str) -> None:
    with pytest.raises(FleetError, match="serve_batch"):
        plan(serving(3), batch=batch)


@pytest.mark.parametrize("least", ["-1", "50%", "", "many"])
def test_a_minimum_that_cannot_be_read_is_refused(least: str) -> None:
    with pytest.raises(FleetError, match="serve_min_ready"):
        plan(serving(3), min_ready=least)


def test_the_plan_says_what_happens_to_each_node_and_why() -> None:
    nodes = [
        node("gpu01"),
        node("gpu02", ready=False, held="fans"),
        node("gpu03", changes=False, ready=False),
        node("gpu04", changes=False),
        NodeState("gpu05", CHANGE, True, notes=("full graphs fail here",)),
    ]
    lines = [line.text for line in rollout_table.render_plan(nodes, plan(nodes), 200)]
    assert lines[0] == "Roll: 3 of 5 nodes are restarted, 1 only joined."
    rows = {line.split()[1]: " ".join(line.split()) for line in lines[3:]}
    assert rows["gpu03"] == "1 gpu03 attest, join is not ready"
    assert rows["gpu01"] == "2 gpu01 drain, switch, attest, join (canary) release r1 -> r2"
    assert rows["gpu05"].endswith("release r1 -> r2; full graphs fail here")
    assert rows["gpu02"] == "4 gpu02 switch, attest release r1 -> r2; held: fans"
    assert rows["gpu04"] == "- gpu04 stays runs what it should"


def test_a_plan_without_turns_is_one_sentence() -> None:
    nodes = [node("gpu01", changes=False)]
    (line,) = rollout_table.render_plan(nodes, plan(nodes), 80)
    assert line.text == "Roll: nothing to do, 1 of 1 run what they should."


NEW = {"id": "b" * 12, "release": "r2", "model": "m", "cuda_graphs": "piecewise"}
OLD = {"id": "a" * 12, "release": "r1", "model": "m", "cuda_graphs": "piecewise"}


# -- going back on purpose, and the end ------------------------------------------------


@pytest.mark.parametrize(
    ("roll", "wanted", "target"),
    [
        ({}, "", "before"),
        ({}, "r1", "r1"),
        ({"operation": "rollback", "state": "done", "targets": {"gpu01": "t"}}, "", "before"),
        ({"operation": "upgrade", "state": "stopped", "targets": {"gpu01": "t"}}, "", "before"),
        ({"operation": "rollback", "state": "running", "targets": {"gpu01": "t"}}, "", "t"),
        ({"operation": "rollback", "state": "stopped", "targets": {"gpu01": "t"}}, "", "t"),
        ({"operation": "rollback", "state": "stopped", "targets": {"gpu01": "t"}}, "r1", "r1"),
        ({"operation": "rollback", "state": "stopped", "targets": {"gpu02": "t"}}, "", "before"),
        ({"operation": "rollback", "state": "running"}, "", "before"),
        ({"operation": "rollback", "state": "done", "backs": {"gpu01": "b"}}, "", "before"),
        ({"operation": "upgrade", "state": "stopped", "backs": {"gpu01": "b"}}, "", "b"),
        ({"operation": "upgrade", "state": "done", "backs": {"gpu01": "b"}}, "", "b"),
        ({"operation": "upgrade", "state": "done", "backs": {"gpu01": "b"}}, "r1", "r1"),
        ({"operation": "upgrade", "state": "done", "backs": {"gpu01": ""}}, "", "before"),
    ],
)
def test_a_roll_back_knows_where_the_last_roll_began(
    roll: dict[str, Any], wanted: str, target: str
) -> None:
    assert rollout.rollback_target(roll, "gpu01", wanted) == target


ENDINGS = [
    Ending("gpu01", outcome.SERVES, True, NEW, ""),
    Ending("gpu02", outcome.ROLLED_BACK, False, OLD, "it crashed", ["ERROR it crashed"]),
    Ending("gpu03", outcome.UNTOUCHED, True, OLD, "its turn did not come"),
    Ending("gpu04", outcome.DRAINED, False, {}, "dead"),
]


def test_the_end_table_names_every_node_and_shows_the_journal_of_failures() -> None:
    lines = rollout_table.render_end(ENDINGS, 200)
    rows = {line.text.split()[0]: line for line in lines if line.text.startswith("gpu")}
    assert [each.tone for each in rows.values()] == ["good", "bad", "", "bad"]
    assert rows["gpu02"].text.split() == ["gpu02", "rolled", "back", "r1", "m", "it", "crashed"]
    assert rows["gpu04"].text.split() == ["gpu04", "drained", "-", "-", "dead"]
    assert [line.text for line in lines[-2:]] == [
        "The journal of gpu02 said:",
        "  ERROR it crashed",
    ]


def test_where_the_time_of_a_start_went_stands_below_the_table() -> None:
    start = {"imports": 29.0, "compile": 102.0, "server": 0.0}
    read = {"read_bytes": 8 * 10**9, "bytes_per_second": 10**9}
    ending = Ending("gpu01", outcome.SERVES, True, NEW, "", start=start, pages=read)
    lines = rollout_table.render_end([ending, *ENDINGS[1:]], 200)
    told = [line.text for line in lines if " started in " in line.text]
    assert told == [
        "gpu01 started in 131 s: imports 29, compile 102. "
        "8.0 GB were read before the drain; all of it takes this disk 8 s"
    ]


def test_the_end_in_one_sentence() -> None:
    assert rollout_table.end_sentence(ENDINGS) == (
        "The roll stopped at gpu02 (rolled back), gpu04 (drained); 1 nodes were not touched. "
        "Mend what the table names, then run again."
    )


# -- what the controller makes of the answers ------------------------------------------


def gateway(**states: str) -> dict[str, Any]:
    """What a gateway answers; a state is admin state and status."""
    servers = [
        dict(zip(("name", "admin_state", "status"), (name, *state.split())))
        for name, state in states.items()
    ]
    return {"gateway": {"servers": servers}}


def info(*changes: str, **more: Any) -> dict[str, Any]:
    found = {"wanted": NEW, "current": OLD, "differences": list(changes), "back": OLD["id"]}
    return {"__serving_info": {**found, **more}}


def answers(hosts: dict[str, dict[str, Any]]) -> list[NodeAnswers]:
    """What is known of nodes that have these variables, as the action plugin gathers it."""
    return [
        NodeAnswers(
            name,
            found_or_staged(said.get("__serving_info", {}), said.get("__serving_staged", {})),
            said,
            said.get("__serving_turn", {}).get("outcome", {}),
        )
        for name, said in hosts.items()
    ]


def planned(
    hosts: dict[str, dict[str, Any]], *gateways: dict[str, Any], remark: str = "", **given: Any
) -> dict[str, Any]:
    options = {"held": {}, "batch": "1", "min_ready": "1", **given}
    found = plan_fleet(answers(hosts), [each["gateway"] for each in gateways], **options)
    return {
        "lines": rollout_table.render_plan(found.nodes, found.plan, 120, remark),
        "turns": [each.node for each in found.plan.turns],
        "batches": list(found.plan.batches),
        "moved": found.moved,
        "targets": found.targets,
        "backs": found.backs,
    }


def test_the_plan_remembers_where_every_node_goes_and_came_from() -> None:
    hosts = {"gpu01": info("release r1 -> r2"), "gpu02": info()}
    found = planned(hosts, gateway(gpu01="ready UP", gpu02="ready UP"))
    assert (found["turns"], found["batches"]) == (["gpu01"], [1])
    assert found["targets"] == {"gpu01": NEW["id"], "gpu02": NEW["id"]}
    assert found["backs"] == {"gpu01": OLD["id"], "gpu02": OLD["id"]}


def fleet_of_100() -> list[NodeState]:
    """All serve, and all are restarted; every third node starts slowly, one has no record."""
    return [
        NodeState(
            f"gpu{number:03}", ["release r1 -> r2"], True, NEW, OLD,
            starts=() if number == 7 else (700.0, 900.0 if number % 3 == 0 else 420.0, 420.0),
        )
        for number in range(100)
    ]  # fmt: skip


def test_a_roll_of_100_nodes_is_foreseen_from_recorded_starts() -> None:
    nodes = fleet_of_100()
    plan = plan_roll(nodes, batch="10%", min_ready=90, ready=100)
    found = rollout.foresee(nodes, plan)
    # The roll itself, step by step: a batch ends with its slowest node.
    clock, serving, fewest = 0.0, {each.name for each in nodes}, 100
    for number in range(1, len(plan.batches) + 1):
        batch = [turn.node for turn in plan.turns if turn.batch == number]
        fewest = min(fewest, len(serving - set(batch)))
        clock += max(700.0 if int(name[3:]) % 3 == 0 else 420.0 for name in batch)
    assert len(plan.batches) == 11
    assert (found.seconds, found.fewest) == (clock, fewest) == (7700.0, 90)
    text = " ".join(line.text for line in rollout_table.render_plan(nodes, plan, 120))
    assert "it takes 2:08:20 and the drains; at least 90 of 100 nodes" in text


def test_without_a_recorded_start_nothing_is_foretold() -> None:
    nodes = [NodeState("gpu01", ["release r1 -> r2"], False, NEW, OLD)]
    plan = plan_roll(nodes, batch=1, min_ready=0, ready=0)
    assert rollout.foresee(nodes, plan) == rollout.Forecast(0.0, 0)
    assert "recorded" not in " ".join(
        each.text for each in rollout_table.render_plan(nodes, plan, 120)
    )


def test_a_remark_stands_below_the_plan() -> None:
    hosts, answer = {"gpu01": info("the service does not run")}, gateway(gpu01="ready DOWN")
    plain = planned(hosts, answer)["lines"]
    remarked = planned(hosts, answer, remark="piecewise: the release has a fault")["lines"]
    assert [each.text for each in remarked[len(plain) :]] == ["piecewise: the release has a fault"]


def test_a_dead_node_is_mended_whoever_else_serves() -> None:
    dead = info("the service does not run")
    assert planned({"gpu01": dead}, gateway(gpu01="ready DOWN"))["turns"] == ["gpu01"]
    hosts = {"gpu01": info("release r1 -> r2"), "gpu02": dead, "gpu03": info()}
    answers = gateway(gpu01="ready UP", gpu02="ready DOWN", gpu03="ready UP")
    assert planned(hosts, answers)["turns"] == ["gpu02", "gpu01"]


def test_a_node_that_one_gateway_leaves_out_has_to_join() -> None:
    both = gateway(gpu01="ready UP", gpu02="ready UP")
    one = gateway(gpu01="ready UP", gpu02="drain DRAIN")
    hosts = {"gpu01": info(), "gpu02": info()}
    assert planned(hosts, both, both)["turns"] == []
    assert planned(hosts, both, one)["turns"] == ["gpu02"]
    assert planned(hosts, both, one, held={"gpu02": {"reason": "fans"}})["turns"] == []


def test_a_changed_endpoint_is_part_of_a_turn() -> None:
    def reached(port: int) -> dict[str, Any]:
        found = gateway(gpu01="ready UP", gpu02="ready UP", gpu03="ready UP")
        for each in found["gateway"]["servers"]:
            each |= {"address": "10.0.0.1", "port": port}
        return found

    address = {"ansible_host": "10.0.0.1"}
    wanted = {**NEW, "port": 8010}
    hosts = {
        "gpu01": {**address, **info("--port 8000 -> 8010", wanted=wanted)},
        "gpu02": {**address, **info(wanted=wanted)},
        "gpu03": {**address, **info(wanted={**NEW, "port": 8000})},
    }
    found = planned(hosts, reached(8000), reached(8000))
    assert found["turns"] == ["gpu01", "gpu02"]
    assert found["moved"] == ["gpu01", "gpu02"]
    text = " ".join(line.text for line in found["lines"])
    assert "reached at 10.0.0.1:8000 -> 10.0.0.1:8010" in text
    assert "drain, attest, join" in text
    hosts = {name: {**address, **info(wanted=wanted)} for name in hosts}
    assert planned(hosts, reached(8010))["turns"] == []
    with pytest.raises(FleetError, match="No node can be taken out"):
        planned({"gpu01": hosts["gpu01"]}, {"gateway": {"servers": [
            {"name": "gpu01", "admin_state": "ready", "status": "UP", "address": "10.0.0.1",
             "port": 8000}]}})  # fmt: skip


def test_an_outage_is_called_one() -> None:
    changed = {"gpu01": info("release r1 -> r2"), "gpu02": info()}
    alone = gateway(gpu01="ready UP", gpu02="ready DOWN")
    both = gateway(gpu01="ready UP", gpu02="ready UP")

    def says(hosts: dict[str, dict[str, Any]], answer: dict[str, Any]) -> bool:
        found = planned(hosts, answer, min_ready="0")
        return any(line.text.startswith("Outage: while gpu01 is") for line in found["lines"])

    assert says({"gpu01": changed["gpu01"]}, alone)
    assert not says(changed, both)
    assert not says(changed, alone), "gpu02 is mended first"


def test_nodes_that_are_down_are_mended_together_before_anything_new_is_tried() -> None:
    dead = info("the service does not run", current=NEW)
    hosts = {"gpu01": dead, "gpu02": dead, "gpu03": info("release r1 -> r2"), "gpu04": info()}
    answers = gateway(gpu01="ready DOWN", gpu02="ready DOWN", gpu03="ready UP", gpu04="ready UP")
    found = planned(hosts, answers)
    assert (found["turns"], found["batches"]) == (["gpu01", "gpu02", "gpu03"], [2, 1])


def test_only_the_first_node_that_gets_something_new_has_to_try_it() -> None:
    def first(*nodes: NodeState) -> str:
        each = list(nodes)
        return first_to_try(each, plan(each, min_ready=0, ready=len(each)))

    new, old = {"id": "new"}, {"id": "old"}
    a, b = (replace(node(name), wanted=new, current=old) for name in "ab")
    assert first(a, b) == "a"
    # A node that is mended gets nothing new, and one that only joins is not restarted.
    mended = replace(node("m", ready=False), wanted=old, current=old)
    joins = replace(node("j", changes=False, ready=False), wanted=new, current=new)
    assert first(mended, joins, a) == "a"
    assert first(mended) == first() == ""
    # Another one serves with it: a roll that was stopped goes on.
    assert first(replace(node("c", changes=False), wanted=new, current=new), b) == ""


def test_a_bare_fleet_is_a_first_start_of_every_node() -> None:
    skipped = {"__serving_info": {"skipped": True}, "__serving_staged": {"skipped": True}}
    found = planned({"gpu01": skipped, "gpu02": skipped})
    assert found["turns"] == ["gpu01", "gpu02"]
    assert found["targets"] == {}


def test_check_mode_plans_with_what_it_would_stage() -> None:
    staged = {"__serving_staged": {"results": [{"wanted": NEW, "differences": ["--seed 1 added"]}]}}
    unknown = {"__serving_info": {"wanted": {}, "ladder": ["b"], "differences": []}}
    answers = gateway(gpu01="ready UP", gpu02="ready UP")
    hosts = {"gpu01": {**staged, **unknown}, "gpu02": info()}
    assert planned(hosts, answers)["turns"] == ["gpu01"]
    # A node that stepped down runs what it should.
    assert planned({**hosts, "gpu01": {**staged, **info()}}, answers)["turns"] == []


def test_the_end_names_who_had_a_turn_and_who_had_none() -> None:
    ended = outcome.Outcome(outcome.ROLLED_BACK, False, "it crashed", OLD, ["ERROR it crashed"])
    hosts = {
        "gpu01": {**info("x"), "__serving_turn": {"outcome": asdict(ended)}},
        "gpu02": info("x", running={"record": OLD}),
        "gpu03": info(running={"record": NEW}),
    }
    ended = endings(answers(hosts))
    rows = [
        line.text for line in rollout_table.render_end(ended, 120) if line.text.startswith("gpu")
    ]
    assert [each.good for each in ended] == [False, True, True]
    assert rollout_table.end_sentence(ended).startswith(
        "The roll stopped at gpu01 (rolled back); 2 nodes"
    )
    assert rows[1].split()[:4] == ["gpu02", "untouched", "r1", "m"]
    assert "its turn did not come" in rows[1]
    assert "runs what it should" in rows[2]


def test_a_batch_is_what_the_load_spares() -> None:
    def sizes(requests: int, **given: Any) -> list[int]:
        load = Load(requests, given.pop("slots", 32))
        return list(plan(serving(40), batch="auto", load=load, **given).batches)

    # 40 nodes at 70 percent of 32 requests: 448 take 20 of them. A quarter is the most.
    assert sizes(448) == [1, 10, 10, 10, 9]
    assert sizes(0) == [1, 10, 10, 10, 9]
    assert sizes(784) == [1, *[5] * 7, 4]
    assert sizes(448, min_ready=38) == [1, *[2] * 19, 1]
    assert set(sizes(896)) == {1}
    assert set(sizes(2000)) == {1}
    assert set(sizes(0, slots=0)) == {1}


def test_the_plan_says_why_batches_are_so_large() -> None:
    nodes = serving(40)
    found = plan(nodes, batch="auto", load=Load(448, 32))
    text = " ".join(line.text for line in rollout_table.render_plan(nodes, found, 120))
    assert "By the load, batches of 10: 448 requests run or wait, which takes 20 of 40" in text
    assert plan(nodes, batch=2, load=Load(448, 32)).pace == ""


def test_the_load_is_what_runs_and_waits_at_all_gateways() -> None:
    def gateway(running: int, waiting: int) -> dict[str, Any]:
        servers = [
            {"name": f"gpu{number:02}", "status": "UP", "admin_state": "ready",
             "sessions_current": running}
            for number in range(1, 9)
        ]  # fmt: skip
        return {"servers": servers, "waiting": waiting}

    answers = [NodeAnswers(f"gpu{number:02}") for number in range(1, 9)]
    found = plan_fleet(
        answers, [gateway(5, 3), gateway(2, 0)], held={}, batch="auto", min_ready=1, slots=32
    )
    assert "59 requests run or wait" in found.plan.pace


def test_100_nodes_are_rolled_faster_and_no_request_waits_for_it() -> None:
    shares = []
    for seed in range(200):
        drawn = random.Random(seed)  # noqa: S311 - a simulation
        nodes = [
            NodeState(
                f"gpu{number:03}", ["release r1 -> r2"], True, NEW, OLD,
                starts=(min(max(drawn.lognormvariate(6.8, 0.4), 420.0), 2700.0),),
            )
            for number in range(100)
        ]  # fmt: skip
        load = Load(int(drawn.uniform(0.1, 0.9) * 100 * 32), 32)
        auto = plan_roll(nodes, batch="auto", min_ready=1, ready=100, load=load)
        fewest = rollout.foresee(nodes, auto).fewest
        assert fewest * 32 >= load.requests, "every request has a slot all the time"
        assert 99 >= fewest >= 75
        alone = plan_roll(nodes, batch=1, min_ready=1, ready=100)
        shares.append(rollout.foresee(nodes, auto).seconds / rollout.foresee(nodes, alone).seconds)
    assert statistics.median(shares) < 0.15
    assert max(shares) <= 1.0
