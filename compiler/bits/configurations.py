"""A search for the best configuration: one choice for each unit under a budget, judged by images of few configurations.

A configuration c gives unit u the choice c_u. What a choice does to the outputs of its own layers is known: rho_u(c_u),
relative to their power. How much that matters to the images is not. The error of the images is taken as

    y(c) = sum_u m_u rho_u(c_u),        m_u >= 0

and the m_u are fitted to the configurations that were measured, by non-negative least squares of relative errors, with
a ridge towards equal m_u (`fitted`). Each round draws configurations near the best ones by the model so far: the exact
optimum (compiler/bits/allocation.py) for m_u times a random factor, exp of a normal number, so that each fills the
budget (`SearchState.propose`). The best measured configuration is the result, not the best predicted one.

Searches of this kind are Qua2SeDiMo (arXiv 2412.14628) with a graph network as the model, FLIQS (arXiv 2308.03290) with
one shared network and a policy, QuantNAS and APQ with a predictor of accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Doubles

from ..graph.require import required
from .allocation import allocate

Configuration = tuple[int, ...]
RIDGE = 0.02
REPEATS = 4  # of the regression, each with a ridge around the one before
LEAST_FACTOR = 0.02  # of the common factor: what a ridge is laid around at least
SPREADS = (1.5, 0.8, 0.4)
"""The standard deviation of the logarithm of the random factors, in the first, the second and all later rounds."""
TRIES = 4  # draws for each configuration that is wanted: some come to one that was measured


@dataclass(eq=False)
class SearchState:
    """What is known of a search: `errors` rho and `costs` of each choice of each unit, and the measured images."""

    errors: Sequence[Sequence[float]]
    costs: Sequence[Sequence[int]]
    limit: int
    seed: int
    found: dict[Configuration, float] = field(default_factory=dict)
    factors: Doubles = field(init=False)

    def __post_init__(self) -> None:
        self.factors = np.ones(len(self.errors))

    def optimum(self, factors: Doubles) -> Configuration:
        """Return the best configuration for these m_u. The budget must allow one."""
        rows = [[float(m) * e for e in row] for m, row in zip(factors, self.errors, strict=True)]
        return required(allocate(rows, self.costs, self.limit), "a configuration within the budget").chosen

    def propose(self, round_number: int, count: int) -> list[Configuration]:
        """Return up to `count` configurations that were not measured: the optimum of the model, and random ones."""
        spread = SPREADS[min(round_number, len(SPREADS) - 1)]
        new = dict.fromkeys([self.optimum(self.factors)])
        for k in range(TRIES * count):
            if len(new.keys() - self.found.keys()) >= count:
                break
            rng = streams.CONFIGURATIONS.generator(self.seed, round_number, k)
            new[self.optimum(self.factors * np.exp(spread * rng.standard_normal(len(self.factors))))] = None
        return [configuration for configuration in new if configuration not in self.found][:count]

    def learn(self) -> None:
        """Fit the m_u to all that was measured."""
        rho = np.array([[row[c] for row, c in zip(self.errors, chosen, strict=True)] for chosen in self.found])
        self.factors = fitted(rho, np.array(list(self.found.values())))

    def search(self, measured: Callable[[Configuration], float], count: int, rounds: int) -> Configuration:
        """Measure `count` configurations in so many rounds, and return the best."""
        for number, share in enumerate(np.array_split(np.arange(count), rounds)):
            for configuration in self.propose(number, len(share)):
                self.found[configuration] = measured(configuration)
            self.learn()
        return min(self.found, key=self.found.__getitem__)


def fitted(rho: Doubles, measured: Doubles) -> Doubles:
    """Return m `[units]`, none negative, for rho `[configurations, units]` and the errors y `[configurations]`.

    Minimises sum_c (sum_u m_u rho_cu / y_c - 1)^2 + RIDGE sum_u (m_u / n_u - 1)^2. n is the best common factor at
    first, then the m of the fit before: factors may differ by orders of magnitude, and a unit that the images tell
    nothing about keeps its own.
    """
    relative = rho / measured[:, None]
    sums, units = relative.sum(axis=1), rho.shape[1]
    common = float(sums.sum() / max(float(sums @ sums), 1e-300))
    wanted = np.concatenate([np.ones(len(measured)), np.full(units, np.sqrt(RIDGE))])
    factors = np.full(units, common)
    for _ in range(REPEATS):
        around = np.maximum(factors, LEAST_FACTOR * common)
        rows = np.concatenate([relative * around, np.sqrt(RIDGE) * np.eye(units)])
        shares, _ = nnls(rows, wanted, maxiter=50 * units)
        factors = np.asarray(shares * around)
    return factors
