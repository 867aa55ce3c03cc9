# SPDX-License-Identifier: Apache-2.0
"""Which settings make a node fastest, found in few starts: what to try next, and what was best.

Every try of other settings costs a start, which takes minutes. A full grid of four settings with
two values each is 16 starts. Here each comparison halves what is left of the grid: the settings
are taken one after the other, in the order of the operator, and the value that gave less is
dropped in every combination, so that 4 starts decide among 16. Where the values are numbers, a
step that gave less drops all values behind it too. When all settings were taken and something
changed, they are taken again around the best, while starts and time are left.

A figure is not exact. Each try is measured several times, and the spread of those says what is
noise. Comparisons on the way go to the higher figure; at the end the best is started a second
time, and counts only if it is better than what ran before by more than noise.

A try that does not start, or does not answer right, is one that lost. Nothing here does anything:
what comes next follows from the tries so far alone, so that a run that was killed goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Union

from ..core.decode import Range, Words
from ..core.errors import FleetError

Value = Union[None, bool, int, float, str]
# What differs from the inventory, by the name of the setting; {} is the inventory itself.
Settings = dict[str, Value]
_LOST = -math.inf
# So many standard deviations apart is no noise.
_SURE = 2.0


@dataclass(frozen=True)
class Setting:
    """A setting with the values to try; ``now`` is what the inventory gives, None if nothing."""

    name: str
    values: tuple[Value, ...]
    now: Value = None


@dataclass(frozen=True)
class Try:
    """Settings that were started and measured.

    ``rates`` has a measurement each, {load: tokens a second}. ``started`` is False where the node
    ran them already. Times are seconds: ``start_s`` until it was attested, ``measure_s`` after
    that. ``problem`` says why it lost, '' if it was measured. ``confirms`` marks the second start
    of what was best.
    """

    settings: dict[str, Value]
    rates: tuple[dict[str, Annotated[float, Range(0.0, 1e9)]], ...] = ()
    started: bool = True
    start_s: Annotated[float, Range(0.0, 1e7)] = 0.0
    measure_s: Annotated[float, Range(0.0, 1e7)] = 0.0
    problem: Words = ""
    confirms: bool = False

    @property
    def score(self) -> float:
        """Return the mean of the logarithms of its rates; minus infinity if it lost."""
        if self.problem or not self.rates:
            return _LOST
        return sum(_of_one(each) for each in self.rates) / len(self.rates)


@dataclass(frozen=True)
class Budget:
    """What a run may cost: starts, and seconds out of service with the way back.

    ``start_s`` and ``measure_s`` are what one is expected to take before any was seen.
    """

    starts: int
    limit_s: float
    start_s: float = 600.0
    measure_s: float = 120.0


@dataclass(frozen=True)
class Step:
    """What comes next: settings to try, or to start again, or the end and why."""

    kind: Literal["try", "confirm", "end"]
    settings: Settings
    why: str = ""


@dataclass(frozen=True)
class Verdict:
    """The best settings; ``gain`` is their speed over that of the inventory, 1.0 the same.

    ``noise`` is how far apart two equal ones can be, as a share. Only what is ``better`` is
    worth a change.
    """

    settings: Settings
    gain: float
    noise: float
    better: bool


def check_settings(settings: Sequence[Setting]) -> None:
    """Refuse settings that no search can be made of."""
    twice = {each.name for each in settings if len(set(map(_key, each.values))) < len(each.values)}
    empty = {each.name for each in settings if not each.values}
    if twice or empty or not settings:
        found = [f"{name} has a value twice" for name in sorted(twice)]
        found += [f"{name} has no value" for name in sorted(empty)]
        raise FleetError(
            "There is nothing to tune with",
            expected="tune_settings to name settings, each with a list of different values",
            found="; ".join(found) or "no setting that this release has",
        )


def next_step(
    settings: Sequence[Setting], tries: Sequence[Try], budget: Budget, gone_s: float
) -> Step:
    """Return what to do after ``tries``, ``gone_s`` seconds after the node was drained."""
    if tries and not tries[0].rates:
        return Step("end", {}, f"what runs now could not be measured: {tries[0].problem}")
    wanted = _wanted(settings, tries)
    if wanted == {}:
        return Step("try", {})
    best = best_of(tries)
    confirmed = any(each.confirms for each in tries)
    starts = budget.starts - sum(each.started for each in tries)
    start, measure = typical(tries, budget)
    # The way back is a start too, and so is the second one of the best.
    left = (budget.limit_s - gone_s - start) / max(start + measure, 1.0)
    if wanted is not None and not confirmed and starts >= 2 and left >= 2:
        return Step("try", wanted)
    over = "every setting was tried" if wanted is None else "no starts are left"
    if left < 2 and wanted is not None:
        over = "no time is left"
    if best and not confirmed:
        if starts >= 1 and left >= 1:
            return Step("confirm", best, over)
        over += ", not even to confirm the best"
    return Step("end", {}, over)


def typical(tries: Sequence[Try], budget: Budget) -> tuple[float, float]:
    """Return the seconds to expect of a start and of its measurement: the longest so far."""
    starts = [each.start_s for each in tries if each.started]
    measured = [each.measure_s for each in tries if each.rates]
    return max(starts, default=budget.start_s), max(measured, default=budget.measure_s)


def most_left(settings: Sequence[Setting], tries: Sequence[Try], budget: Budget) -> int:
    """Return how many starts are left at most, while each setting is taken once."""
    others = sum(sum(not _same(value, each.now) for value in each.values) for each in settings)
    done = sum(each.started for each in tries)
    return max(0, min(budget.starts, others + 1) - done)


def wants_more(
    tries: Sequence[Try], rates: Sequence[Mapping[str, float]], *, least: int, most: int
) -> bool:
    """Tell whether settings that run now should be measured once more before they are judged.

    They are measured ``least`` times, and up to ``most`` times while noise could decide whether
    they or the best of ``tries`` are faster.
    """
    if len(rates) < least:
        return True
    rivals = [each for each in tries if each.score > _LOST]
    if len(rates) >= most or not rivals:
        return False
    now = Try({}, tuple(dict(each) for each in rates))
    rival = max(rivals, key=lambda each: each.score)
    return abs(now.score - rival.score) < _uncertain(spread([*tries, now]), now, rival)


def spread(tries: Sequence[Try]) -> float:
    """Return the standard deviation of one measurement, as a share, from all that were repeated."""
    squares, freedom = 0.0, 0
    for each in tries:
        if each.score > _LOST:
            squares += sum((_of_one(rates) - each.score) ** 2 for rates in each.rates)
            freedom += len(each.rates) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def best_of(tries: Sequence[Try]) -> Settings:
    """Return the settings with the highest figures, {} if nothing was faster than the inventory."""
    measured = [each for each in tries if each.score > _LOST]
    return max(measured, key=lambda each: each.score).settings if measured else {}


def verdict(tries: Sequence[Try], least_gain: float) -> Verdict | None:
    """Say what was best, None where nothing could be measured.

    What was started twice is judged by the second start: the first was chosen because it was
    high. ``least_gain`` is the share below which nobody changes a setting.
    """
    before = next((each for each in tries if not each.settings), None)
    if before is None or before.score == _LOST:
        return None
    again = next((each for each in tries if each.confirms), None)
    if again is not None:
        after = again
    else:
        best = best_of(tries)
        after = next(each for each in tries if each.settings == best)
    noise = _uncertain(spread(tries), before, after)
    if after.score == _LOST:
        return Verdict(after.settings, 0.0, noise, better=False)
    gain = after.score - before.score
    better = again is not None and gain > max(noise, math.log1p(least_gain))
    return Verdict(after.settings, math.exp(gain), noise, better)


def ratio(each: Try, tries: Sequence[Try]) -> float | None:
    """Return the speed of a try over that of the inventory, None where one was not measured."""
    before = next((other.score for other in tries if not other.settings), _LOST)
    if _LOST in (before, each.score):
        return None
    return math.exp(each.score - before)


def _of_one(rates: Mapping[str, float]) -> float:
    return sum(math.log(max(each, 1e-9)) for each in rates.values()) / max(len(rates), 1)


def _uncertain(deviation: float, one: Try, other: Try) -> float:
    return _SURE * deviation * math.sqrt(1 / max(len(one.rates), 1) + 1 / max(len(other.rates), 1))


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _same(one: Value, other: Value) -> bool:
    return _key(one) == _key(other)


def _wanted(settings: Sequence[Setting], tries: Sequence[Try]) -> Settings | None:
    """Return the first settings that the search asks for and nobody tried, None at its end."""
    known = {_key(each.settings): each.score for each in tries if not each.confirms}
    now = {each.name: each.now for each in settings}
    search = _search(settings)
    asked = next(search)
    try:
        while True:
            asked = {name: value for name, value in asked.items() if not _same(value, now[name])}
            if _key(asked) not in known:
                return asked
            asked = search.send(known[_key(asked)])
    except StopIteration:
        return None


_Asking = Generator[Settings, float, tuple[Settings, float]]


def _search(settings: Sequence[Setting]) -> _Asking:
    """Ask for the score of one settings after the other, until a round changes nothing."""
    best: Settings = {}
    score = yield best
    # What crashed once is not tried again in other company.
    lost: set[tuple[str, str]] = set()
    while True:
        before = score
        for setting in settings:
            best, score = yield from _take(setting, best, score, lost)
        if score == before:
            return best, score


def _take(setting: Setting, best: Settings, score: float, lost: set[tuple[str, str]]) -> _Asking:
    """Find the best value of one setting, all others as they are; add to ``lost`` what crashed."""
    name, begun, begun_score = setting.name, best, score
    current = best.get(name, setting.now)
    words = [each for each in setting.values if not _number(each) and not _same(each, current)]
    for value in words:
        if (name, _key(value)) not in lost:
            found = yield {**begun, name: value}
            if found == _LOST:
                lost.add((name, _key(value)))
            if found > score:
                best, score = {**begun, name: value}, found
    for way in _ways(setting, current):
        # Without a place among the numbers, a step is compared with the one before it.
        last = begun_score if _number(current) else _LOST
        improved = False
        for value in way:
            if (name, _key(value)) in lost:
                break
            found = yield {**begun, name: value}
            if found == _LOST:
                lost.add((name, _key(value)))
            if found > score:
                best, score, improved = {**begun, name: value}, found, True
            if found < last or found == _LOST:
                break
            last = found
        if improved:
            break
    return best, score


def _ways(setting: Setting, current: Value) -> list[list[Value]]:
    """Return the numbers above the current one, upwards, and those below it, downwards."""
    numbers = sorted((each for each in setting.values if _number(each)), key=_size)
    if not _number(current):
        return [list(numbers)]
    above = [each for each in numbers if _size(each) > _size(current)]
    below = [each for each in reversed(numbers) if _size(each) < _size(current)]
    return [above, below]


def _number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _size(value: Value) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
