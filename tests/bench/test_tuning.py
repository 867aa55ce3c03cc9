# SPDX-License-Identifier: Apache-2.0
"""How near a tune in a third of the starts comes to the best of a full grid."""

from __future__ import annotations

from glm_fleet.bench.tuning import Budget

from tests.simulated import Engine, full_grid, tune

from .conftest import Record

RUNS = 400
# Of 16.
STARTS = 5
NOISE = 0.02


def test_a_third_of_the_starts(record: Record) -> None:
    shares, starts = [], 0
    for seed in range(RUNS):
        engine = Engine(seed, noise=NOISE)
        found = tune(engine, Budget(starts=STARTS, limit_s=1e9))
        shares.append(engine.rate(found) / max(map(engine.rate, full_grid(engine.settings))))
        starts = max(starts, engine.starts)
    context = (
        f"{RUNS} simulated engines, four settings of two values, noise {NOISE:.0%}, at most "
        f"{starts} starts; worst {min(shares):.3f}, median {sorted(shares)[RUNS // 2]:.3f}"
    )
    within = sum(each >= 0.95 for each in shares) / RUNS
    record(
        "tuner: within 5 percent of the best of a grid of 16",
        within,
        goal=0.95,
        unit="of runs",
        context=context,
        better="higher",
    )
    assert starts <= 16 / 3
