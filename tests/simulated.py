# SPDX-License-Identifier: Apache-2.0
"""An engine whose speed follows from its settings: each has an effect, pairs a small one more."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from glm_fleet.bench.tuning import (
    Budget,
    Setting,
    Settings,
    Try,
    next_step,
    verdict,
    wants_more,
)


class Engine:
    """Four settings of two values each; a seed gives the effects.

    Half of the effects are up to 65 percent, the others up to 5. ``noise`` is the standard
    deviation of one measurement, ``pairs`` that of what two values do together, as shares.
    """

    def __init__(
        self, seed: int, *, noise: float = 0.0, pairs: float = 0.01, flat: bool = False
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation
        self._noise, self._pairs, self._seed, self._flat = noise, pairs, seed, flat
        drawn = self._random
        self._effects = [
            drawn.choice([drawn.uniform(-0.5, 0.5), drawn.uniform(-0.05, 0.05)]) for _ in range(4)
        ]
        self.settings = [
            Setting(f"setting{place}", ("a", "b"), drawn.choice("ab")) for place in range(4)
        ]
        self.starts = 0

    def rate(self, settings: Settings) -> float:
        """Return the true tokens a second of some settings."""
        if self._flat:
            return 1000.0
        values = [settings.get(each.name, each.now) for each in self.settings]
        speed = sum(effect for effect, value in zip(self._effects, values) if value == "b")
        for one, other in itertools.combinations(range(4), 2):
            pair = f"{self._seed} {one}{values[one]} {other}{values[other]}"
            speed += random.Random(pair).gauss(0, self._pairs)  # noqa: S311 - a simulation
        return 1000.0 * math.exp(speed)

    def measure(self, settings: Settings) -> dict[str, float]:
        """Return what a benchmark would say of them."""
        return {"32": self.rate(settings) * math.exp(self._random.gauss(0, self._noise))}


def full_grid(settings: Sequence[Setting]) -> Iterator[Settings]:
    """Return every combination."""
    for values in itertools.product(*(each.values for each in settings)):
        yield {each.name: value for each, value in zip(settings, values)}


def tune(engine: Engine, budget: Budget) -> Settings:
    """Tune an engine that runs the settings of the inventory; return what it ends with."""
    tries: list[Try] = []
    while (step := next_step(engine.settings, tries, budget, 0)).kind != "end":
        engine.starts += bool(step.settings)
        rates: list[dict[str, float]] = []
        while wants_more(tries, rates, least=2, most=4):
            rates.append(engine.measure(step.settings))
        tries.append(
            Try(
                step.settings,
                tuple(rates),
                started=bool(step.settings),
                confirms=step.kind == "confirm",
            )
        )
    found = verdict(tries, 0.02)
    return found.settings if found and found.better else {}
