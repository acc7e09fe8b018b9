"""One candidate for each unit, at the least total error that a budget allows: an exact integer program.

    minimise sum_u e[u, c(u)]   subject to   sum_u k[u, c(u)] <= budget,   one c(u) for each unit u

HiGHS solves it by branch and bound (scipy.optimize.milp), single-threaded, so that the same numbers give the same
choice. It stops where no allocation can be better by more than a ten thousandth of the error (0.0004 dB): errors span
many powers of ten, and to prove more takes minutes with three hundred layers. Costs are integers and are checked
exactly: a solver's tolerance must not overdraw a budget.

A first answer comes from the relaxation: for a price p of a unit of cost every unit takes its least e + p k, and the
lowest price that meets the budget is found by bisection. Its error scales the numbers that the solver sees, and it is
the answer where the solver finds none that is better.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

ErrorTable = Sequence[Sequence[float]]
CostTable = Sequence[Sequence[int]]
TIME_LIMIT_S = 20.0
RELATIVE_GAP = 1e-4
_TIGHTER = 1e-6  # how much of the budget is held back when rounding inside the solver overdrew it


@dataclass(frozen=True)
class Allocation:
    """`chosen` is the candidate of each unit; `gap` how much better, relatively, an optimum could still be."""

    chosen: tuple[int, ...]
    error: float
    cost: int
    gap: float


def smallest(costs: CostTable) -> int:
    """Return the smallest cost of any allocation."""
    return sum(min(row) for row in costs)


def allocate(
    errors: ErrorTable, costs: CostTable, budget: int, *, time_limit: float = TIME_LIMIT_S
) -> Allocation | None:
    """Return the candidates `[units]` of least total error whose costs sum to at most `budget`, or None.

    `errors` (not negative) and `costs` have one row for each unit, of one number for each of its candidates. A gap
    above RELATIVE_GAP means that the time limit, in seconds, stopped the search.
    """
    if smallest(costs) > budget:
        return None
    first = _priced(errors, costs, budget)
    if first.error == 0:
        return first
    allowed = float(budget)
    for _ in range(3):
        found = _solved(errors, costs, allowed, first.error, time_limit)
        if found is None:
            break
        if found.cost <= budget:
            return min(replace(first, gap=found.gap), found, key=lambda a: a.error)
        allowed = min(allowed, budget) * (1 - _TIGHTER)
    return first


def _of(errors: ErrorTable, costs: CostTable, chosen: Sequence[int], gap: float) -> Allocation:
    error = float(sum(row[c] for row, c in zip(errors, chosen, strict=True)))
    return Allocation(tuple(chosen), error, sum(int(row[c]) for row, c in zip(costs, chosen, strict=True)), gap)


def _priced(errors: ErrorTable, costs: CostTable, budget: int) -> Allocation:
    """Return the relaxation's answer. Its gap is the distance to the bound that the price proves."""

    def at(price: float) -> tuple[Allocation, float]:
        chosen, bound = [], -price * budget
        for wrong, row in zip(errors, costs, strict=True):
            sums = [e + price * k for e, k in zip(wrong, row, strict=True)]
            bound += min(sums)
            chosen.append(_first_least(list(zip(sums, row, strict=True))))
        return _of(errors, costs, chosen, 0.0), bound

    free, _ = at(0.0)
    if free.cost <= budget:
        return free
    most = max((max(row) for row in errors if row), default=0.0)
    low, high = 0.0, max(most, 1e-300)  # a cost is a whole number: at this price nothing dearer is worth it
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0].cost <= budget else (middle, high)
    best, bound = at(high)
    if best.cost > budget:
        cheapest = [_first_least(list(zip(k, e, strict=True))) for k, e in zip(costs, errors, strict=True)]
        best = _of(errors, costs, cheapest, 0.0)
    return replace(best, gap=max(0.0, 1 - bound / best.error) if best.error > 0 else 0.0)


def _first_least(pairs: Sequence[tuple[float, float]]) -> int:
    """Return the index of the least pair, the first of equals."""
    return min(range(len(pairs)), key=pairs.__getitem__)


def _solved(errors: ErrorTable, costs: CostTable, budget: float, scale: float, time_limit: float) -> Allocation | None:
    """Return the integer program's answer, or None. It may overdraw the budget by the solver's rounding."""
    sizes = [len(row) for row in errors]
    ends = np.cumsum([0, *sizes])
    flat = np.concatenate([np.asarray(row, np.float64) for row in errors])
    weights = np.concatenate([np.asarray(row, np.float64) for row in costs])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    members = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(sizes), len(flat)))
    room = max(float(weights.max()), 1.0)
    with _silent():
        found = milp(
            np.minimum(flat / scale, 10.0) * 1e3,  # what errs ten times as much as a whole answer is in no better one
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(members, 1, 1),
                LinearConstraint(csr_array(weights[None, :] / room), -np.inf, budget / room),
            ],
            options={"time_limit": time_limit, "mip_rel_gap": RELATIVE_GAP},
        )
    if found.x is None:
        return None
    chosen = [int(np.argmax(found.x[a:b])) for a, b in pairwise(ends)]
    return _of(errors, costs, chosen, float(found.mip_gap or 0.0))


@contextmanager
def _silent() -> Iterator[None]:
    """Redirect file descriptor 1. HiGHS prints to it when it repairs a solution, in spite of its options, and standard
    output is reserved for the result of a command."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # a process without one
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
