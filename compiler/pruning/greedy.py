"""Optimal Brain Surgeon's order of removal for each row of a weight, exact (ExactOBS of OBC, arXiv 2208.11580).

The rows of W have independent errors E = (w - w') H (w - w')^T. Removing the weights P of a row at the least error,
with G the inverse of H over the columns that are left, costs and changes

    e_P = w_P (G_PP)^-1 w_P^T            w -= w_P (G_PP)^-1 G_P,:

so each row removes its cheapest weight (or block), again and again. A trace is that order with the errors. In a pattern
N:M a group that has N columns left is closed.

The rows of a layer compete: a heap always takes the row whose next removal is the cheapest. What it has taken after n
removals are the n smallest of max(e_1 .. e_j), over all rows and their j-th removals, and no row need be traced beyond
the n-th of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles

from ..rounding.downdated import DowndatedInverses, at_once
from ..rounding.matrix import Kept, Matrix
from .patterns import PruningPattern

DEEPER = 1.3  # how much deeper than the last time a row is traced that must be


@dataclass(frozen=True, eq=False)
class RemovalTrace:
    """`order` `[rows, depth]`: the column, or block of columns, of each removal; `errors` `[rows, depth]`: its e.

    `values` `[rows, d]` are the weights after all of a row's removals.
    """

    order: npt.NDArray[np.int64]
    errors: Doubles
    values: Matrix

    @property
    def highest(self) -> Doubles:
        """The highest error so far `[rows, depth]`: the price at which the heap takes a removal."""
        highest: Doubles = np.maximum.accumulate(self.errors, axis=1)
        return highest


def trace(weight: Matrix, inverse: Matrix, depth: int, pattern: PruningPattern) -> RemovalTrace:
    """Return the first `depth` removals of each row of `weight` `[rows, d]`; `inverse` is H^-1 `[d, d]`."""
    together = at_once(inverse)
    starts = range(0, len(weight), together)
    parts = [_traced(weight[i : i + together], inverse, depth, pattern) for i in starts]
    return RemovalTrace(*(np.concatenate(found) for found in zip(*parts, strict=True)))


def _traced(
    weight: Matrix, inverse: Matrix, depth: int, pattern: PruningPattern
) -> tuple[npt.NDArray[np.int64], Doubles, Matrix]:
    count, block = len(weight), pattern.block
    state = DowndatedInverses(weight, inverse, block)
    order = np.empty((count, depth), np.int64)
    errors = np.zeros((count, depth))
    left = np.full((count, weight.shape[1] // pattern.unit), pattern.group - pattern.kept if pattern.group else 0)
    rows = np.arange(count)
    for step in range(depth):
        open_ = state.live[:, ::block]
        if pattern.group:
            open_ = open_ & (left[rows[:, None], state.columns // pattern.group] > 0)
        cost = np.where(open_, _costs(state, open_), np.inf)
        chosen = cost.argmin(axis=1)
        order[:, step] = state.columns[rows, chosen * block] // block
        errors[:, step] = cost[rows, chosen]
        if pattern.group:
            left[rows, order[:, step] // pattern.group] -= 1
        for i in range(block):
            state.remove(chosen * block + i)
        state.compact()
    values = np.zeros(weight.shape, state.values.dtype)
    np.put_along_axis(values, state.columns, np.where(state.live, state.values, 0), axis=1)
    return order, errors, values


def _costs(state: DowndatedInverses, live: Kept) -> Matrix:
    """Return e of each block of each row `[rows, blocks]`, by the Cholesky factor of its square of the inverse."""
    block = state.block
    values = state.values.reshape(*live.shape, block)
    if block == 1:
        plain: Matrix = values[..., 0] ** 2 / np.where(live, state.squares[..., 0, 0], values.dtype.type(1))
        return plain
    squares = np.where(live[..., None, None], state.squares, np.eye(block, dtype=values.dtype))
    factor = np.zeros_like(squares)
    solved = np.zeros_like(values)
    smallest = np.finfo(np.float32).tiny
    for i in range(block):
        for j in range(i + 1):
            rest = squares[..., i, j] - np.einsum("rbk,rbk->rb", factor[..., i, :j], factor[..., j, :j])
            factor[..., i, j] = np.sqrt(np.maximum(rest, smallest)) if i == j else rest / factor[..., j, j]
        known = np.einsum("rbk,rbk->rb", factor[..., i, :i], solved[..., :i])
        solved[..., i] = (values[..., i] - known) / factor[..., i, i]
    costs: Matrix = np.einsum("rbk,rbk->rb", solved, solved)
    return costs


def cheapest(highest: Doubles, count: int) -> npt.NDArray[np.int64]:
    """Return how many removals of each row are among the `count` first of a heap over all rows `[rows]`."""
    flat = highest.reshape(-1)
    taken = np.zeros(len(flat), bool)
    taken[np.argsort(flat, kind="stable")[:count]] = True
    found: npt.NDArray[np.int64] = taken.reshape(highest.shape).sum(axis=1)
    return found


def removed(
    weight: Matrix, inverse: Matrix, count: int, pattern: PruningPattern, traced: RemovalTrace | None = None
) -> Kept:
    """Return the mask of the weights that stay `[rows, d]` after `count` removals by the heap over all rows.

    `traced` may have the traces of all removals. Groups of N:M all close, whatever `count`.
    """
    rows, width = weight.shape
    most = width // pattern.block
    if pattern.group:
        most = width // pattern.group * (pattern.group - pattern.kept)
        count = rows * most
    depth = most if pattern.group else min(most, int(np.ceil(DEEPER * count / rows)))
    traced = traced or trace(weight, inverse, depth, pattern)
    while True:
        highest = traced.highest
        taken = cheapest(highest, count)
        short = taken == highest.shape[1]
        if not short.any() or highest.shape[1] == most:
            return mask_of(traced, taken, width, pattern)
        traced = _deeper(traced, weight, inverse, short, min(most, int(np.ceil(DEEPER * highest.shape[1]))), pattern)


def _deeper(
    known: RemovalTrace, weight: Matrix, inverse: Matrix, short: Kept, depth: int, pattern: PruningPattern
) -> RemovalTrace:
    """Return traces of that depth, in which only the rows that were too `short` have further removals."""
    rows, before = known.order.shape
    order, errors = np.zeros((rows, depth), np.int64), np.full((rows, depth), np.inf)
    order[:, :before], errors[:, :before] = known.order, known.errors
    longer, values = trace(weight[short], inverse, depth, pattern), known.values.copy()
    order[short], errors[short], values[short] = longer.order, longer.errors, longer.values
    return RemovalTrace(order, errors, values)


def mask_of(traced: RemovalTrace, taken: npt.NDArray[np.int64], width: int, pattern: PruningPattern) -> Kept:
    """Return the mask of the weights that stay when each row has made its first `taken` `[rows]` removals."""
    kept = np.ones((len(taken), width // pattern.block), bool)
    for row, order, count in zip(kept, traced.order, taken, strict=True):
        row[order[:count]] = False
    return np.repeat(kept, pattern.block, axis=1)
