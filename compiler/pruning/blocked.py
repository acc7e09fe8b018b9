"""Pruning of layers with too many inputs for the exact form: block after block of columns, at the same objective.

With U^T U = H^-1, the inverse over the columns from a block on, seen by the block, is G = U_bb^T U_bb. Inside the block
the order of removal is exact with all later columns free (compiler/pruning/greedy.py), and what is removed changes

    w_b -= c G,        w_j -= c U_bb^T U_bj for all later columns j,        c_E = w_E (G_EE)^-1,  0 for what stays

Columns before the block stay as they are: `polished` of compiler/pruning/restoration.py takes up what that costs. How
many weights each block loses is decided first, by w_p^2 / G_pp of the whole layer (SparseGPT, arXiv 2301.00774, gives
all of its blocks the same share and takes the cheapest weights at once, without an order).

The changes of LAZY columns reach all columns behind them by one product: block by block, each of these would go through
memory as often as there are blocks (1280 x 11,520 in blocks of 16, two threads: 18 s, and 11 s).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from ..rounding.downdated import at_once
from ..rounding.matrix import Kept, Matrix, Root
from .greedy import removed, trace
from .patterns import PruningPattern

LAZY = 256  # columns


def swept(weight: Matrix, root: Root, count: int, pattern: PruningPattern, width: int) -> tuple[Kept, Matrix]:
    """Return (the mask of the weights that stay, their values), both `[rows, d]`, after `count` removals.

    `root` has the columns in their own order; a block has at most `width` of them, or one unit of the pattern.
    """
    upper = root.upper
    values = np.array(weight, upper.dtype)
    kept = np.ones(weight.shape, bool)
    blocks = _blocks(weight.shape[1], width, pattern.unit)
    counts = _shares(values, upper, blocks, count, pattern)
    lazy = max(LAZY // width, 1)
    for start in range(0, len(blocks), lazy):
        together = slice(start, start + lazy)
        _sweep(values, kept, upper, blocks[together], counts[together], pattern)
    return kept, values


def _sweep(
    values: Matrix,
    kept: Kept,
    upper: Matrix,
    blocks: Sequence[slice],
    counts: npt.NDArray[np.int64],
    pattern: PruningPattern,
) -> None:
    """Prune successive blocks, in place; the columns behind all of them change once."""
    first, stop = blocks[0].start, blocks[-1].stop
    changes = np.empty((len(values), stop - first), values.dtype)
    for part, wanted in zip(blocks, counts, strict=True):
        corner = np.ascontiguousarray(upper[part, part])
        inverse = corner.T @ corner
        block = values[:, part]
        if pattern.group:  # all rows lose as many: the trace ends with their values, and c G is what they changed by
            found = trace(block, inverse, pattern.removals((1, block.shape[1]), 0), pattern).values
            passed = solve_triangular(corner, (block - found).T, trans="T").T
            mask = found != 0
        else:
            mask = removed(block, inverse, wanted, pattern)
            factors = _factors(block, inverse, mask)
            found, passed = np.where(mask, block - factors @ inverse, 0), factors @ corner.T
        near = slice(part.stop, stop)
        values[:, near] -= passed @ upper[part, near]
        values[:, part], kept[:, part] = found, mask
        changes[:, part.start - first : part.stop - first] = passed
    values[:, stop:] -= changes @ upper[first:stop, stop:]


def _blocks(inputs: int, width: int, unit: int) -> list[slice]:
    step = max(width // unit, 1) * unit
    return [slice(start, min(start + step, inputs)) for start in range(0, inputs, step)]


def _shares(
    values: Matrix, upper: Matrix, blocks: list[slice], count: int, pattern: PruningPattern
) -> npt.NDArray[np.int64]:
    """Return how many removals each block gets, if the cheapest of the layer are taken at once."""
    diagonal = np.einsum("ij,ij->j", upper, upper)
    costs = (values * values / diagonal).reshape(len(values), -1, pattern.block).sum(axis=2)
    chosen = np.zeros(costs.size, bool)
    chosen[np.argpartition(costs.reshape(-1), max(count - 1, 0))[:count]] = True
    by_unit = np.count_nonzero(chosen.reshape(costs.shape), axis=0)
    starts = [part.start // pattern.block for part in blocks]
    return np.add.reduceat(by_unit, starts)


def _factors(block: Matrix, inverse: Matrix, kept: Kept) -> Matrix:
    """Return c `[rows, b]`; the systems of the rows, in which what stays is an equation c = 0, are solved together."""
    found = np.empty_like(block)
    together = at_once(inverse)
    for start in range(0, len(block), together):
        gone = ~kept[start : start + together]
        system = np.where(gone[:, :, None] & gone[:, None, :], inverse, 0).astype(np.float64)
        rows, places = np.nonzero(~gone)
        system[rows, places, places] = 1
        wanted = np.where(gone, block[start : start + together], 0).astype(np.float64)
        found[start : start + together] = np.linalg.solve(system, wanted[:, :, None])[:, :, 0]
    return found
