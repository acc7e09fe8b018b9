"""Whole channels by Optimal Brain Surgeon, against inverses computed afresh."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mezzotint.compiler.pruning.channel_order import channel_order, removals, without_channels
from mezzotint.compiler.rounding.matrix import row_errors
from tests.compiler.pruning.test_greedy import problem


@pytest.mark.parametrize("positions", [1, 3])
def test_the_order_is_that_of_least_squares_computed_afresh(positions: int) -> None:
    channels = 6
    weight, gram = problem(2, rows=5, inputs=channels * positions)
    order, errors = channel_order(weight, np.linalg.inv(gram), positions, channels - 1)
    left, before = list(range(channels)), 0.0

    def error(kept: list[int]) -> float:
        columns = (np.array(kept)[:, None] * positions + np.arange(positions)).reshape(-1)
        placed = np.zeros(weight.shape)
        placed[:, columns] = without_channels(weight, gram, positions, np.array(kept))
        return float(row_errors(weight - placed, gram).sum())

    for step, chosen in enumerate(order):
        costs = {c: error([k for k in left if k != c]) for c in left}
        assert chosen == min(costs, key=costs.__getitem__)
        assert errors[step] == pytest.approx(costs[chosen] - before, rel=1e-6)
        before = costs[chosen]
        left.remove(int(chosen))
    best = min(error(list(kept)) for kept in itertools.combinations(range(channels), channels - 1))
    assert errors[0] == pytest.approx(best, rel=1e-9)


def test_sites_compete_and_keep_whole_multiples() -> None:
    cheap, dear = np.full(14, 0.01), np.full(14, 0.5)
    assert removals([cheap, dear], 0.25, [16, 16], 2) == [8, 0]
    assert removals([cheap, dear], 0.25, [16, 16], 16) == [0, 0]
    assert removals([cheap, dear], 0.7, [16, 16], 4) == [12, 8]
