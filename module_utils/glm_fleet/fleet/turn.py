# SPDX-License-Identifier: Apache-2.0
"""One node's turn, step by step: what comes next.

A turn that switches a node to what it should run::

    read ahead --> drain --> accept --> rehearse --> switch ----> attest --> score --> join
                     | refused  |           | failed    | failed     | failed   | failed
                     v          | failed    v           v            v          |
                   let back     |        go back     the next rung, if it may   |
                                |                    help, else                 |
                                +------------------> keep out <-----------------+
                                                     then go back --> attest --> join

A node that does not have to be restarted begins at the switch, which then changes nothing, unless
its endpoint moves: then it is drained too. Only a node whose GPUs have to prove themselves is
accepted; when its boards fail that, it does not go back, because they would fail what ran before
as well. Only the first node that gets something new rehearses: what runs is stopped, and the new
release is started with random weights. Only that node's answers to a set of questions are counted,
where the operator wants it: those of what runs after the drain (``score before``), unless they are
known, and those of what was attested. Reading the weights ahead, while the node still serves, may
fail without harm. A node that is held does not join. A turn that takes a node out of service
(``leave``) or lets it back (``return``)::

    drain ----> hold ----> empty            attest ----> unhold ----> join
      | refused   | refused
      v           v
    let back    let back

`next_step` names the next step, somebody does it and `record` notes what the hosts answered.
Steps at a gateway are done at every gateway, the others on the node, or for ``hold`` and
``unhold`` where the fleet's lock lies. Nothing here does anything, so that every order of
successes and failures can be tested. `outcome` says how a turn ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Purpose = Literal["switch", "leave", "return"]
Action = Literal[
    "read ahead", "drain", "hold", "empty", "score before", "accept", "rehearse", "switch",
    "attest", "score", "unhold", "join", "keep out", "go back", "let back",
]  # fmt: skip
AT_GATEWAYS: tuple[Action, ...] = ("drain", "empty", "join", "keep out", "let back")
AT_LOCK: tuple[Action, ...] = ("hold", "unhold")


@dataclass(frozen=True)
class Order:
    """What a turn is for, as it is known before its first step.

    ``ladder`` holds ids of deployments, the wanted one first, then what to step down to, and
    ``back`` the id of what a failure goes back to, '' if there is nothing. ``read_ahead`` says
    whether the node reads the weights of its next start into memory before it is drained,
    ``accept`` whether its GPUs have to prove themselves while no engine runs, ``rehearse`` whether
    what it is restarted to is rehearsed before, ``restart`` whether it has to be restarted,
    ``score`` whether the right answers to a set of questions are counted after that, and
    ``score_before`` whether they can be counted of what runs now, ``moved`` whether the gateways
    will reach it somewhere else, ``held`` why it is or will be held out of service.
    """

    purpose: Purpose
    ladder: Sequence[str] = ()
    back: str = ""
    read_ahead: bool = False
    rehearse: bool = False
    accept: bool = False
    restart: bool = False
    score: bool = False
    score_before: bool = False
    moved: bool = False
    held: str = ""


@dataclass(frozen=True)
class Step:
    """Something to do now; ``deployment`` is the id to switch or to go back to."""

    action: Action
    deployment: str = ""


@dataclass(frozen=True)
class Answer:
    """What one host answered to a step.

    ``ok`` is false for a failure and for a ``lost`` host. ``before`` is the state that a server
    had at a gateway, ``sessions`` counts requests that still ran there. ``runs`` is the
    deployment that was switched to, {id, port, release, model, cuda_graphs}. ``passed`` says that
    the attestation passed, ``start`` where the time of the start went, in seconds by phase,
    ``pages`` what was read ahead, ``rehearsal`` what a rehearsal gave, {id, words, stepped_down},
    ``step_down`` that a lower mode of CUDA graphs may help, ``of_release`` that an acceptance
    failed by the release's kernels alone.
    """

    host: str
    ok: bool = True
    lost: bool = False
    message: str = ""
    before: str = ""
    sessions: int = 0
    runs: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)
    pages: Mapping[str, Any] = field(default_factory=dict)
    canary: Mapping[str, Any] = field(default_factory=dict)
    rehearsal: Mapping[str, str] = field(default_factory=dict)
    passed: bool = False
    diagnosis: str = ""
    step_down: bool = False
    of_release: bool = False
    journal: Sequence[str] = ()

    @property
    def reason(self) -> str:
        """Why it failed, by its known cause where there is one."""
        return self.diagnosis or self.message


def read_answer(host: str, result: Mapping[str, Any]) -> Answer:
    """Take what a turn needs from the result of a module on a host, whatever shape that has."""

    def mapping(value: Any) -> Mapping[str, Any]:
        return value if isinstance(value, Mapping) else {}

    def numbers(value: Any) -> dict[str, float]:
        return {
            str(key): float(each)
            for key, each in mapping(value).items()
            if isinstance(each, (int, float))
        }

    attestation = mapping(result.get("attestation"))
    sessions, journal = result.get("sessions"), result.get("journal")
    lost = bool(result.get("unreachable"))
    ok = not (lost or result.get("failed"))
    return Answer(
        host,
        ok=ok,
        lost=lost,
        message=" ".join(str(result.get("msg") or "").split()),
        before=str(result.get("before") or ""),
        sessions=sessions if isinstance(sessions, int) else 0,
        runs={str(key): str(value) for key, value in mapping(result.get("deployment")).items()},
        seconds=numbers(result.get("seconds")),
        start=numbers(result.get("start")),
        pages=dict(mapping(result.get("pages"))),
        canary=dict(mapping(attestation.get("canary"))),
        rehearsal={str(key): str(each) for key, each in mapping(result.get("rehearsal")).items()},
        passed=ok and attestation.get("passed") is True,
        diagnosis=str(result.get("diagnosis") or ""),
        step_down=result.get("step_down") is True,
        of_release=result.get("of_release") is True,
        journal=[str(line) for line in journal] if isinstance(journal, list) else [],
    )


@dataclass(frozen=True)
class Attempt:
    """A deployment that was switched to, and the attestation of its start if it came to that.

    Or one that the node was not even switched to, because its acceptance failed: ``unfit`` says
    that its boards did, and not the release.
    """

    deployment: str
    switched: Answer
    attested: Answer | None = None
    unfit: bool = False

    @property
    def passed(self) -> bool:
        """Whether the node runs it and was attested."""
        return self.switched.ok and self.attested is not None and self.attested.passed

    @property
    def last(self) -> Answer:
        """The answer by which it is judged."""
        return self.attested if self.switched.ok and self.attested else self.switched

    @property
    def reason(self) -> str:
        """Why it did not pass."""
        return self.last.reason or "the turn was cut off before the attestation"


def _failed_score(step: Step, answers: Sequence[Answer]) -> bool:
    return step.action == "score" and not answers[0].ok


@dataclass(frozen=True)
class Turn:
    """A turn as far as it has come: its order, and every step with what the hosts answered."""

    order: Order
    done: tuple[tuple[Step, tuple[Answer, ...]], ...] = ()

    def answers(self, action: Action) -> Sequence[Answer]:
        """Return what the hosts answered to the last step of this kind; () if there was none."""
        found = [answers for step, answers in self.done if step.action == action]
        return found[-1] if found else ()

    def attempts(self, action: Action) -> list[Attempt]:
        """Return what was tried to ``switch`` to, or to ``go back`` to, in order."""
        return [attempt for kind, attempt in self._attempts if kind == action]

    @cached_property
    def _attempts(self) -> Sequence[tuple[Action, Attempt]]:
        made: list[tuple[Action, Attempt]] = []
        for step, answers in self.done:
            if step.action in ("switch", "go back"):
                made.append((step.action, Attempt(step.deployment, answers[0])))
            elif step.action == "accept" and not answers[0].ok:
                wanted = next(iter(self.order.ladder), "")
                unfit = not answers[0].of_release
                made.append(("switch", Attempt(wanted, answers[0], unfit=unfit)))
            elif made and (step.action == "attest" or _failed_score(step, answers)):
                made[-1] = (made[-1][0], replace(made[-1][1], attested=answers[0]))
        return made

    @property
    def ladder(self) -> Sequence[str]:
        """Return the deployments to try: from the one on that passed the rehearsal."""
        passed = [each.rehearsal.get("id", "") for each in self.answers("rehearse")]
        ladder = self.order.ladder
        return ladder[ladder.index(passed[0]) :] if passed and passed[0] in ladder else ladder

    @property
    def runs(self) -> Mapping[str, str]:
        """Return the deployment that was switched to last, {} if none was."""
        made = [*self.attempts("switch"), *self.attempts("go back")]
        return made[-1].switched.runs if made else {}


def neighbours_of(node: str, nodes: Sequence[str], most: int = 3) -> list[str]:
    """Return the nodes whose known answers a node's are compared with: the next ones in order.

    A majority of three decides. All of a big fleet would take longer to ask than the node itself.
    """
    at = nodes.index(node) + 1 if node in nodes else 0
    return [each for each in (*nodes[at:], *nodes[:at]) if each != node][:most]


def needs_acceptance(found: Mapping[str, Any], *, stays: bool) -> bool:
    """Tell whether a node proves its GPUs in its turn, from the module `acceptance`'s result.

    ``found`` is {} where nobody looked. A node that ``stays`` as it is, and serves, is not stopped
    for that, unless its boards are known not to pass.
    """
    needed = bool(found.get("needed")) and found.get("passed") is not True
    return needed and (not stays or bool(found.get("did_not_pass")))


def record(turn: Turn, step: Step, answers: Sequence[Answer]) -> Turn:
    """Return the turn with one more step that was done."""
    return replace(turn, done=(*turn.done, (step, tuple(answers))))


def next_step(turn: Turn) -> Step | None:
    """Return what to do next, None when the turn is over."""
    if not turn.done:
        return _begin(turn.order)
    step, answers = turn.done[-1]
    return _AFTER[step.action](turn, all(each.ok for each in answers))


def _begin(order: Order) -> Step | None:
    if order.purpose == "return":
        return Step("attest")
    return Step("read ahead") if order.read_ahead else _take_out(Turn(order))


def _take_out(turn: Turn) -> Step | None:
    order = turn.order
    out = order.purpose == "leave" or order.restart or order.moved
    return Step("drain") if out else _accept(turn)


def _after_read_ahead(turn: Turn, _ok: bool) -> Step | None:
    return None if turn.answers("read ahead")[0].lost else _take_out(turn)


def _after_drain(turn: Turn, ok: bool) -> Step | None:
    if not ok:
        return _let_back(turn)
    if turn.order.purpose == "leave":
        return Step("hold")
    return Step("score before") if turn.order.score_before else _accept(turn)


def _after_score_before(turn: Turn, ok: bool) -> Step | None:
    return _accept(turn) if ok else _let_back(turn)


def _accept(turn: Turn) -> Step | None:
    return Step("accept") if turn.order.accept else _rehearse(turn)


def _after_accept(turn: Turn, ok: bool) -> Step | None:
    return _rehearse(turn) if ok else _after_failure(turn)


def _rehearse(turn: Turn) -> Step | None:
    order = turn.order
    rehearses = order.rehearse and order.restart and order.ladder
    return Step("rehearse", order.ladder[0]) if rehearses else _switch(turn)


def _after_rehearse(turn: Turn, ok: bool) -> Step | None:
    """Go on if it passed, else back to what was stopped for it: the node is drained already."""
    if ok:
        return _switch(turn)
    lost = turn.answers("rehearse")[0].lost
    return Step("go back", turn.order.back) if turn.order.back and not lost else None


def _after_hold(turn: Turn, ok: bool) -> Step | None:
    return Step("empty") if ok else _let_back(turn)


def _after_switch(turn: Turn, ok: bool) -> Step | None:
    return Step("attest") if ok else _after_failure(turn)


def _after_attest(turn: Turn, ok: bool) -> Step | None:
    if turn.order.purpose == "return":
        return Step("unhold") if ok else None
    if not turn.answers("attest")[0].passed:
        return _after_failure(turn)
    if turn.order.score and not turn.attempts("go back"):
        return Step("score")
    return _join(turn)


def _after_score(turn: Turn, ok: bool) -> Step | None:
    return _join(turn) if ok else _after_failure(turn)


def _join(turn: Turn) -> Step | None:
    return None if turn.order.held else Step("join")


def _after_failure(turn: Turn) -> Step | None:
    """A deployment does not run: the next rung, or out of service before anything else."""
    if turn.attempts("go back"):
        return None
    # A node that only had to prove itself was not drained, and goes back through a start that
    # nobody may ask before it is attested.
    return _switch(turn) or Step("keep out")


def _after_keep_out(turn: Turn, _ok: bool) -> Step | None:
    failed = turn.attempts("switch")[-1]
    # A gateway that is gone sends nobody to the node; one that refuses may go on doing so.
    refused = any(not each.ok and not each.lost for each in turn.answers("keep out"))
    if failed.last.lost or failed.unfit or refused or not turn.order.back:
        return None
    return Step("go back", turn.order.back)


def _after_unhold(_turn: Turn, ok: bool) -> Step | None:
    return Step("join") if ok else None


def _end(_turn: Turn, _ok: bool) -> Step | None:
    return None


_AFTER: Mapping[Action, Callable[[Turn, bool], Step | None]] = {
    "read ahead": _after_read_ahead,
    "drain": _after_drain,
    "hold": _after_hold,
    "empty": _end,
    "score before": _after_score_before,
    "accept": _after_accept,
    "rehearse": _after_rehearse,
    "switch": _after_switch,
    "attest": _after_attest,
    "score": _after_score,
    "unhold": _after_unhold,
    "join": _end,
    "keep out": _after_keep_out,
    "go back": _after_switch,
    "let back": _end,
}


def _switch(turn: Turn) -> Step | None:
    """Return the switch to the next rung: only a crash that a lower one avoids is a reason."""
    made, ladder = turn.attempts("switch"), turn.ladder
    if made and (made[-1].last.lost or not made[-1].last.step_down):
        return None
    return Step("switch", ladder[len(made)]) if len(made) < len(ladder) else None


def _let_back(turn: Turn) -> Step | None:
    """Return the way back of a node that took requests and was not touched."""
    return (
        Step("let back") if any(each.before == "ready" for each in turn.answers("drain")) else None
    )
