"""Searches of configurations: the regression finds what matters, proposals fill the budget, the best measured stays."""

from __future__ import annotations

import numpy as np

from mezzotint.compiler.bits.configurations import SearchState, fitted

UNITS = 12
RNG = np.random.default_rng(4)
RHO = RNG.uniform(1, 3, (UNITS, 3)) * 4.0 ** -np.array([3, 4, 8])
COSTS = [[3 * n, 4 * n, 8 * n] for n in RNG.integers(50, 400, UNITS).tolist()]
LIMIT = int(sum(row[0] for row in COSTS) / 3 * 4.5)
MATTERS = RNG.lognormal(0, 2, UNITS)


def state() -> SearchState:
    return SearchState(RHO.tolist(), COSTS, LIMIT, seed=1)


def images(configuration: tuple[int, ...]) -> float:
    """What the model assumes, for factors that the search does not know."""
    return float(sum(m * row[c] for m, row, c in zip(MATTERS, RHO, configuration, strict=True)))


def test_the_regression_finds_the_factors_of_noisy_images() -> None:
    chosen = np.random.default_rng(0).integers(0, 3, (200, UNITS))
    rho = np.take_along_axis(RHO[None], chosen[..., None], axis=2)[..., 0]
    noise = np.random.default_rng(1).lognormal(0, 0.05, 200)
    found = fitted(rho, rho @ MATTERS * noise)
    assert (found >= 0).all()
    differences = np.ptp(RHO, axis=1) * MATTERS  # what a unit's choice can do
    loud = np.argsort(differences)[-2:]
    np.testing.assert_allclose(found[loud], MATTERS[loud], rtol=0.15)
    few = fitted(rho[:1], rho[:1] @ MATTERS)
    assert np.ptp(few) / few.mean() < 0.9  # one image tells little: the ridge holds them together


def test_a_search_comes_near_the_best_configuration() -> None:
    known = state()
    best = known.search(images, 24, 4)
    assert 18 <= len(known.found) <= 24 and known.found[best] == min(known.found.values())
    for configuration in known.found:
        cost = sum(row[c] for row, c in zip(COSTS, configuration, strict=True))
        assert cost <= LIMIT and LIMIT - cost < max(row[2] - row[0] for row in COSTS)
    least = images(known.optimum(MATTERS))  # of all configurations: the model is exact here
    assert images(best) <= 1.1 * least
    assert images(best) < 0.8 * images(next(iter(known.found)))  # what is best without the images
    again = state()
    assert again.search(images, 24, 4) == best and list(again.found) == list(known.found)


def test_a_budget_with_one_configuration_has_one() -> None:
    lone = SearchState([[1.0, 0.5], [1.0, 0.5]], [[4, 8], [4, 8]], 9, seed=0)
    assert lone.search(lambda c: 1.0 + sum(c), 10, 2) == (0, 0)
    assert len(lone.found) == 1
