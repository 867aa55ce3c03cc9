# SPDX-License-Identifier: Apache-2.0
"""A node's turn: every order of success, failure, busy and unreachable, and how each ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from glm_fleet.fleet import turn as turns
from glm_fleet.fleet.outcome import (
    DRAINED,
    HELD,
    LOST,
    ROLLED_BACK,
    SERVES,
    UNTOUCHED,
    Outcome,
    outcome,
)
from glm_fleet.fleet.turn import Answer, Order, Step, Turn, next_step, read_answer, record

Result = dict[str, Any]
GATEWAYS = ("gw01", "gw02")
DEPLOYMENTS = {
    name: {"id": name, "release": f"release of {name}", "model": "m", "cuda_graphs": name}
    for name in ("full", "piecewise", "eager", "old")
}
CRASHED: Result = {
    "failed": True,
    "msg": "The node did not come up.\n  Found: the service died",
    "diagnosis": "an illegal instruction: graphs",
    "step_down": True,
    "journal": ["ERROR illegal instruction"],
}
BROKEN: Result = {"failed": True, "msg": "The attestation failed"}
GONE: Result = {"unreachable": True, "msg": "Failed to connect"}
CUT: Result = {"skipped": True}
PASSED: Result = {
    "attestation": {"passed": True, "canary": {"tokens_per_second": 50.0}},
    "start": {"imports": 29.0},
}
UNFIT: Result = {"failed": True, "msg": "GPU 3 (serial 1) computes wrong"}
WRONG_KERNELS: Result = {"failed": True, "msg": "kernels are wrong", "of_release": True}
FEWER: Result = {"failed": True, "msg": "gpu01 gives fewer right answers than before"}
REFUSED: Result = {"failed": True, "msg": "gpu01 cannot be taken\nout"}


def switched(name: str) -> Result:
    return {"deployment": DEPLOYMENTS[name], "seconds": {"stop_s": 2.0}, "changed": True}


def order(**given: Any) -> Order:
    return Order(**{"purpose": "switch", "ladder": ("piecewise",), "back": "old",
                    "restart": True, **given})  # fmt: skip


LADDER = ("full", "piecewise", "eager")
WAYS = [
    {"restart": False, "rehearse": True},
    {},
    {"restart": False, "moved": True},
    {"read_ahead": True},
    {"rehearse": True},
    {"score": True, "score_before": True},
]
ORDERS = [
    *(
        order(back=back, held=held, **way)
        for way, back, held in itertools.product(WAYS, ("", "old"), ("", "fans"))
    ),
    *(order(ladder=LADDER[:2], **way) for way in WAYS),
    order(ladder=LADDER[:2], back="", held="fans"),
    # A third rung is like the second: one such ladder is enough.
    order(ladder=LADDER),
    *(
        order(accept=True, back=back, restart=restart, held=held)
        for back, restart, held in itertools.product(("", "old"), (True, False), ("", "fans"))
    ),
    order(accept=True, rehearse=True),
    order(purpose="leave", ladder=(), held="fans"),
    order(purpose="return", ladder=()),
]


def possible(step: Step) -> Mapping[str, Result]:
    """All that one host may answer to a step."""
    if step.action == "accept":
        return {"accepted": {}, "board": UNFIT, "release": WRONG_KERNELS, "gone": GONE}
    if step.action == "attest":
        return {"passed": PASSED, "crashed": CRASHED, "broken": BROKEN, "gone": GONE, "cut": CUT}
    if step.action in ("switch", "go back"):
        return {"switched": switched(step.deployment), "broken": BROKEN, "gone": GONE}
    if step.action in ("score before", "score"):
        return {"right": {"quality": {"passed": True}}, "fewer": FEWER, "gone": GONE}
    if step.action == "rehearse":
        passed = {
            name: {"rehearsal": {"id": name, "words": "rehearsed in 90 s"}}
            for name in LADDER[LADDER.index(step.deployment) :]
        }
        return {**passed, "broken": CRASHED, "gone": GONE}
    if step.action == "read ahead":
        return {"read": {"pages": {"read_bytes": 7}}, "broken": BROKEN, "gone": GONE}
    good = {"before": "ready", "sessions": 0}
    answers = {"good": good, "refused": REFUSED, "gone": GONE}
    if step.action == "drain":
        answers.update(idle={**good, "before": "drain"}, busy={**good, "sessions": 2})
    return answers


@cache
def answers_to(step: Step) -> Sequence[Sequence[Answer]]:
    """The same as the turn takes it, by each host that is asked."""
    return [[read_answer(host, each) for host in hosts(step)] for each in possible(step).values()]


def hosts(step: Step) -> tuple[str, ...]:
    if step.action in turns.AT_GATEWAYS:
        return GATEWAYS
    return ("gw01",) if step.action in turns.AT_LOCK else ("gpu01",)


def endings(begun: Turn) -> Iterator[Turn]:
    """Go through every order of answers, and return each turn that is over."""
    step = next_step(begun)
    if step is None:
        yield begun
        return
    assert len(begun.done) < 20, "this turn has no end"
    # Which gateway said what makes no difference.
    asked = len(hosts(step))
    for chosen in itertools.combinations_with_replacement(answers_to(step), asked):
        answers = [each[at] for at, each in enumerate(chosen)]
        yield from endings(record(begun, step, answers))


def actions(turn: Turn) -> list[str]:
    return [step.action for step, _ in turn.done]


def good(turn: Turn, action: turns.Action) -> bool:
    """Whether a step was done, and every host said yes to it."""
    answers = turn.answers(action)
    return bool(answers) and all(each.ok for each in answers)


def out_of_service(turn: Turn) -> bool:
    """Whether the last thing that any gateway of this turn heard is to send nobody."""
    heard = [action for action in actions(turn) if action in turns.AT_GATEWAYS]
    return bool(heard) and heard[-1] in ("drain", "empty", "keep out")


def over(turn: Turn) -> tuple[Turn, list[str], Outcome]:
    return turn, actions(turn), outcome(turn)


SWITCHES = [each for each in ORDERS if each.purpose == "switch"]


@pytest.mark.parametrize("given", SWITCHES, ids=repr)
def test_every_turn_that_switches_keeps_the_rules(given: Order) -> None:
    ended: dict[str, int] = {}
    for turn, did, end in map(over, endings(Turn(given))):
        ended[end.state] = ended.get(end.state, 0) + 1
        made = [*turn.attempts("switch"), *turn.attempts("go back")]
        last = made[-1] if made else None
        # Nothing is stopped while a gateway may go on sending requests.
        if given.read_ahead:
            assert did.pop(0) == "read ahead"
            if turn.answers("read ahead")[0].lost:
                assert (did, end.state) == ([], UNTOUCHED)
                continue
            assert bool(end.pages) == (bool(made) and turn.answers("read ahead")[0].ok)
        if given.restart or given.moved:
            assert did[0] == "drain"
            rehearses = given.rehearse and given.restart and not given.accept
            after_drain = "accept" if given.accept else "rehearse" if rehearses else "switch"
            last_before = "score before" if given.score_before else "drain"
            assert good(turn, last_before) == (after_drain in did)
        else:
            assert "drain" not in did
        # No engine starts on boards that did not prove themselves.
        assert ("accept" in did) == (given.accept and end.state != UNTOUCHED)
        if "accept" in did:
            after = "rehearse" if given.rehearse else "switch"
            assert good(turn, "accept") == (after in did)
            if turn.answers("accept")[0].reason == UNFIT["msg"]:
                assert "go back" not in did
        if "go back" in did:
            assert given.back
            # A node that rehearsed was drained, and nobody was let in since.
            assert did[did.index("go back") - 1] in ("keep out", "rehearse")
            assert all(each.ok or each.lost for each in turn.answers("keep out"))
        # Only what was attested takes requests, and only if nobody holds it.
        if "join" in did:
            assert last is not None
            assert last.passed
            assert not given.held
            assert did[-1] == "join"
        elif did[-1] != "let back" and last is not None and not last.passed:
            assert out_of_service(turn)
        # A node that is lost is not asked again.
        asked = [each[1][0] for each in turn.done if hosts(each[0]) == ("gpu01",)]
        assert not any(each.lost for each in asked[:-1])
        # A lower rung only after a crash that it may avoid, in order, each once.
        tried = turn.attempts("switch")
        rehearsed = turn.answers("rehearse")
        assert ("rehearse" in did) <= (given.rehearse and given.restart)
        assert not tried or all(each.ok for each in rehearsed)
        # From the one on that passed the rehearsal.
        begun = [each.rehearsal["id"] for each in rehearsed if each.rehearsal.get("id") in LADDER]
        ladder = list(given.ladder)
        ladder = ladder[ladder.index(begun[0]) :] if begun and begun[0] in ladder else ladder
        assert [each.deployment for each in tried] == ladder[: len(tried)]
        assert all(each.last.step_down and not each.last.lost for each in tried[:-1])
        # The outcome says what is.
        assert end.good == (end.state in (SERVES, HELD))
        assert (end.state == SERVES) == bool(tried and tried[-1].passed and good(turn, "join"))
        assert (end.state == HELD) == bool(tried and tried[-1].passed and given.held)
        assert bool(end.runs) == bool(last and last.passed)
        assert end.good or end.why
        if end.state == UNTOUCHED:
            assert not made
            was_ready = any(each.before == "ready" for each in turn.answers("drain"))
            assert (did[-1] == "let back") == was_ready
        if end.state == ROLLED_BACK:
            assert end.runs["id"] == "old"
        if end.state == LOST:
            assert asked[-1].lost
    assert {DRAINED, LOST} <= set(ended)
    assert (UNTOUCHED in ended) == (given.restart or given.moved)
    assert (ROLLED_BACK in ended) == bool(given.back)
    assert (HELD in ended, SERVES in ended) == (bool(given.held), not given.held)


@pytest.mark.parametrize("held", ["", "fans"])
def test_what_was_attested_is_asked_before_it_takes_requests(held: str) -> None:
    ended = set()
    for turn, did, end in map(over, endings(Turn(order(score=True, score_before=True, held=held)))):
        ended.add(end.state)
        assert ("score before" in did) == good(turn, "drain")
        tried = did[: did.index("go back")] if "go back" in did else did
        assert ("score" in did) == ("attest" in tried and first(turn, "attest").passed)
        if "score" not in did:
            continue
        assert did[did.index("score") - 1] == "attest"
        assert end.good == (good(turn, "score") and (bool(held) or good(turn, "join")))
        if not good(turn, "score"):
            assert FEWER["msg"] in end.why or GONE["msg"] in end.why
            assert did[did.index("score") + 1] == "keep out"
    assert {UNTOUCHED, ROLLED_BACK, DRAINED, LOST} <= ended


def first(turn: Turn, action: turns.Action) -> Answer:
    """Return the first answer to the first step of a kind."""
    return next(answers[0] for step, answers in turn.done if step.action == action)


def test_every_turn_that_leaves_holds_a_node_that_gets_no_new_requests() -> None:
    ended = set()
    for turn, did, end in map(over, endings(Turn(ORDERS[-2]))):
        ended.add(end.state)
        assert did[0] == "drain"
        assert good(turn, "drain") == ("hold" in did)
        assert ("empty" in did) == good(turn, "hold")
        assert end.good == good(turn, "empty")
        assert (end.state == HELD) == ("empty" in did)
        if "empty" not in did:
            assert end.state == UNTOUCHED
            was_ready = any(each.before == "ready" for each in turn.answers("drain"))
            assert (did[-1] == "let back") == was_ready
        assert end.good or "gw0" in end.why
    assert ended == {HELD, UNTOUCHED}


def test_every_turn_that_returns_attests_before_anything_else() -> None:
    ended = set()
    for turn, did, end in map(over, endings(Turn(ORDERS[-1]))):
        ended.add(end.state)
        assert did == ["attest", "unhold", "join"][: len(did)]
        assert end.good == good(turn, "join")
        assert (end.state == HELD) == (did == ["attest"])
        assert end.good or end.why
    assert ended == {HELD, DRAINED, SERVES}


# -- the words of the end table --------------------------------------------------------


def ended(given: Order, *answers: Result | tuple[Result, ...]) -> Outcome:
    """Answer step after step, all gateways alike where one answer is given."""
    turn = Turn(given)
    for results in answers:
        step = next_step(turn)
        assert step is not None, f"the turn was over after {actions(turn)}"
        asked = hosts(step)
        each = results if isinstance(results, tuple) else (results,) * len(asked)
        turn = record(turn, step, [read_answer(*pair) for pair in zip(asked, each)])
    assert next_step(turn) is None, f"{actions(turn)} goes on with {next_step(turn)}"
    return outcome(turn)


FREE: Result = {"before": "ready", "sessions": 0}
NEW, OLD = switched("piecewise"), switched("old")


def test_a_turn_that_gets_through() -> None:
    found = ended(order(), FREE, NEW, PASSED, FREE)
    assert (found.state, found.good, found.why) == (SERVES, True, "")
    assert found.runs == DEPLOYMENTS["piecewise"]
    assert found.seconds == {"stop_s": 2.0}
    assert found.canary == {"tokens_per_second": 50.0}
    assert found.start == {"imports": 29.0}
    joined = ended(order(restart=False), {**NEW, "seconds": {}, "changed": False}, PASSED, FREE)
    assert (joined.state, joined.start) == (SERVES, {})
    ahead = ended(order(read_ahead=True), {"pages": {"read_bytes": 7}}, FREE, NEW, PASSED, FREE)
    assert ahead == replace(found, pages={"read_bytes": 7})


def test_boards_that_fail_their_acceptance_leave_the_node_drained_and_named() -> None:
    for given in (order(accept=True), order(accept=True, back="")):
        found = ended(given, FREE, UNFIT, FREE)
        assert (found.state, found.good, found.runs) == (DRAINED, False, {})
        assert found.why == "GPU 3 (serial 1) computes wrong; it stays drained"
    # A node on which nothing ran was not drained, and is now.
    assert ended(order(accept=True, restart=False), UNFIT, FREE).state == DRAINED


def test_kernels_that_are_wrong_on_every_gpu_are_the_releases_fault() -> None:
    found = ended(order(accept=True), FREE, WRONG_KERNELS, FREE, OLD, PASSED, FREE)
    assert (found.state, found.good, found.why) == (ROLLED_BACK, False, "kernels are wrong")
    assert found.runs == DEPLOYMENTS["old"]


def test_a_node_that_serves_as_it_should_is_not_stopped_for_its_acceptance() -> None:
    needed = {"needed": ["it was never accepted"], "passed": None}
    assert turns.needs_acceptance(needed, stays=False)
    assert not turns.needs_acceptance(needed, stays=True)
    # But for boards that are known not to pass.
    assert turns.needs_acceptance({**needed, "did_not_pass": True}, stays=True)
    assert not turns.needs_acceptance({"needed": ["new"], "passed": True}, stays=False)
    assert not turns.needs_acceptance({}, stays=False)


def test_a_node_that_is_accepted_is_switched() -> None:
    found = ended(order(accept=True), FREE, {"ran": True}, NEW, PASSED, FREE)
    assert (found.state, found.why) == (SERVES, "")


def test_requests_that_were_cut_are_counted_over_all_gateways() -> None:
    busy = ({**FREE, "sessions": 2}, {**FREE, "sessions": 1})
    found = ended(order(), busy, NEW, PASSED, FREE)
    assert found.why == "3 requests were still running when it was stopped"


def test_a_step_down_is_told() -> None:
    given = order(ladder=LADDER)
    found = ended(given, FREE, switched("full"), CRASHED, NEW, PASSED, FREE)
    assert (found.state, found.good) == (SERVES, True)
    assert found.why == (
        "stepped down to piecewise (about a fifth of the speed in one stream and 0.6 of it in 32): "
        "an illegal instruction: graphs"
    )


REHEARSED: Result = {"rehearsal": {"id": "piecewise", "words": "rehearsed in 90 s"}}


def test_a_rehearsal_is_told_with_what_it_stepped_down_to() -> None:
    given = order(ladder=LADDER, rehearse=True)
    stepped = {"cuda_graphs": "piecewise", "stepped_down": "an illegal instruction: graphs"}
    passed = {"rehearsal": {**REHEARSED["rehearsal"], **stepped}}
    found = ended(given, FREE, passed, NEW, PASSED, FREE)
    assert (found.state, found.good) == (SERVES, True)
    assert found.why == (
        "stepped down to piecewise: an illegal instruction: graphs; rehearsed in 90 s"
    )
    # What is known to run is not told in every roll.
    known = {"rehearsal": {"id": "full", "known": True}}
    assert ended(given, FREE, known, switched("full"), PASSED, FREE).why == ""


def test_a_rehearsal_that_fails_brings_back_what_was_stopped_for_it() -> None:
    given = order(rehearse=True)
    found = ended(given, FREE, CRASHED, OLD, PASSED, FREE)
    assert (found.state, found.good, found.runs["id"]) == (ROLLED_BACK, False, "old")
    assert found.why == "the rehearsal failed: an illegal instruction: graphs"
    assert found.journal == CRASHED["journal"]
    first = ended(order(rehearse=True, back=""), FREE, CRASHED)
    assert (first.state, first.good, first.runs) == (DRAINED, False, {})
    assert first.why.endswith("graphs; nothing new was put in place")
    assert ended(given, FREE, GONE).state == LOST


def test_a_held_node_that_passed_stays_held() -> None:
    found = ended(order(held="fans"), FREE, NEW, PASSED)
    assert (found.state, found.good, found.why) == (HELD, True, "held: fans")


def test_a_roll_back_serves_the_old_release_and_stops_the_roll() -> None:
    found = ended(order(), FREE, NEW, CRASHED, FREE, OLD, PASSED, FREE)
    assert (found.state, found.good) == (ROLLED_BACK, False)
    assert found.runs == DEPLOYMENTS["old"]
    assert found.why == CRASHED["diagnosis"]
    # Of the start that failed, not of the one that went well.
    assert found.journal == CRASHED["journal"]
    held = ended(order(held="fans"), FREE, NEW, CRASHED, FREE, OLD, PASSED)
    assert held.why == f"{CRASHED['diagnosis']}; held: fans"


def test_a_roll_back_that_fails_leaves_the_node_drained() -> None:
    broken = {"failed": True, "msg": "no memory"}
    found = ended(order(), FREE, NEW, CRASHED, FREE, OLD, broken)
    assert (found.state, found.good, found.runs) == (DRAINED, False, {})
    assert found.why == "an illegal instruction: graphs; going back failed too: no memory"


def test_nothing_to_go_back_to_leaves_the_node_drained() -> None:
    found = ended(order(back=""), FREE, NEW, CRASHED, FREE)
    assert (found.state, found.good, found.runs) == (DRAINED, False, {})
    assert "nothing was attested here before" in found.why


def test_a_node_that_a_gateway_may_still_ask_does_not_go_back() -> None:
    found = ended(order(restart=False), NEW, CRASHED, (FREE, REFUSED))
    assert found.state == DRAINED
    assert found.why == "an illegal instruction: graphs; gw02: gpu01 cannot be taken out"
    gone = ended(order(restart=False), NEW, CRASHED, (FREE, GONE), OLD, PASSED, FREE)
    assert gone.state == ROLLED_BACK


def test_a_node_that_is_lost_stays_drained_and_is_named() -> None:
    for answers in ((GONE,), (NEW, GONE)):
        found = ended(order(), FREE, *answers, FREE)
        assert (found.state, found.good, found.runs) == (LOST, False, {})
        assert found.why == "no answer: Failed to connect; it stays drained"
    found = ended(order(), FREE, NEW, CRASHED, FREE, OLD, GONE)
    assert (found.state, found.good) == (LOST, False)
    assert found.why == "an illegal instruction: graphs; then no answer; it stays drained"


@pytest.mark.parametrize("refusal", [REFUSED, {**REFUSED, "failed": False, "unreachable": True}])
def test_a_drain_that_is_refused_leaves_the_node_untouched(refusal: Result) -> None:
    found = ended(order(), (FREE, refusal), FREE)
    assert (found.state, found.good) == (UNTOUCHED, False)
    assert found.why == "gw02: gpu01 cannot be taken out"


def test_an_order_without_a_deployment_does_not_count_as_done() -> None:
    found = ended(order(ladder=(), restart=False))
    assert (found.state, found.good, found.why) == (UNTOUCHED, False, "its turn did not begin")


def test_a_gateway_that_does_not_take_the_node_back_hides_nothing() -> None:
    refusal = ({"failed": True, "msg": "not ready"}, FREE)
    found = ended(order(), FREE, NEW, PASSED, refusal)
    assert (found.state, found.good, found.why) == (DRAINED, False, "gw01: not ready")
    assert found.runs == DEPLOYMENTS["piecewise"]
    back = ended(order(), FREE, NEW, CRASHED, FREE, OLD, PASSED, refusal)
    assert (back.state, back.runs) == (DRAINED, DEPLOYMENTS["old"])
    assert back.why == "an illegal instruction: graphs; rolled back; gw01: not ready"


def test_requests_that_do_not_end_leave_a_node_held() -> None:
    busy = {"failed": True, "msg": "gpu01 still has requests running", "sessions": 3}
    found = ended(ORDERS[-2], FREE, FREE, busy)
    assert (found.state, found.good) == (HELD, False)
    assert found.why.startswith("gw01: gpu01 still has requests running")


# -- what the hosts answer -------------------------------------------------------------


def test_an_attempt_passes_only_with_its_attestation() -> None:
    for nothing in (
        {}, CUT, {"attestation": {"passed": False}}, {"attestation": "passed"},
        {**PASSED, "failed": True},
    ):  # fmt: skip
        found = ended(order(back=""), FREE, NEW, nothing, FREE)
        assert not found.good
        assert "cut off" in found.why


def test_a_failure_is_read_in_one_line_with_its_diagnosis() -> None:
    found = read_answer("gpu01", CRASHED)
    assert (found.ok, found.lost, found.step_down) == (False, False, True)
    assert found.message == "The node did not come up. Found: the service died"
    assert found.reason == CRASHED["diagnosis"]
    assert found.journal == CRASHED["journal"]


@pytest.mark.parametrize("wrong", [None, [], "x", 7, float("nan"), {"a": object()}])
@pytest.mark.parametrize(
    "key",
    ["attestation", "before", "deployment", "diagnosis", "journal", "msg", "seconds", "sessions",
     "step_down", "of_release", "failed", "unreachable"],
)  # fmt: skip
def test_an_answer_of_any_shape_can_be_read(key: str, wrong: Any) -> None:
    found = read_answer("gpu01", {**switched("full"), **PASSED, key: wrong})
    assert isinstance(found, Answer)
    assert isinstance(found.reason, str)
