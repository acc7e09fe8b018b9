"""obq: the greedy order of Optimal Brain Quantization (arXiv 2208.11580), exact for each row.

A row keeps the inverse G = H^-1 of the columns that are still free. Until none is left,

    p  = the free column with the least (w_p - s q_p)^2 / G_pp
    w -= (w_p - s q_p) / G_pp G_p,        G -= G_p G_p^T / G_pp,        p is done

and a weight more than half a step (of a codebook: half of its widest gap) beyond the grid is taken first, before it
moves further. Every row has an order of its own, so that d inputs cost d^3 for each row (downdated.py).

More than `exact` inputs go in blocks of that many, those with the largest inputs first. Inside a block this is OBQ with
all later columns free: with U^T U = H^-1, the inverse over what is left is U_bb^T U_bb, whatever the order inside. When
a block is done, the later columns make up for all of it at once, w_j -= (w_b - s q_b) U_bb^-1 U_bj.

Weights that were pruned have q = 0 and are taken before all others of their block, so that those are rounded against H
restricted to what is left.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_triangular

from mezzotint.runtime.arrays import Floats

from ..core.formats import Grid, of_rows, round_on, widest_gap
from .downdated import DowndatedInverses, at_once, precise
from .matrix import Kept, Matrix, Root


def obq(weight: Matrix, root: Root, scale: Floats, grid: Grid, *, exact: int, kept: Kept | None = None) -> Floats:
    """Return integers `[rows, d]`, as float32; where `kept` `[rows, d]` is given, weights outside it become 0."""
    rows, inputs = weight.shape
    upper = root.upper
    turned = np.array(weight[:, root.order], upper.dtype)
    held = None if kept is None else kept[:, root.order]
    integers = np.empty((rows, inputs), np.float32)
    step = scale.astype(upper.dtype)[:, None]
    for start in range(0, inputs, exact):
        stop = min(start + exact, inputs)
        part = slice(start, stop)
        corner = np.ascontiguousarray(upper[part, part]).astype(np.float64)
        block = turned[:, part]
        rest = None if held is None else held[:, part]
        integers[:, part] = _in_parts(block, precise(corner.T @ corner), scale, grid, rest)
        if stop < inputs:
            wrong = block - step * integers[:, part]
            passed = solve_triangular(corner, wrong.T.astype(np.float64), trans="T").T.astype(upper.dtype)
            turned[:, stop:] -= passed @ upper[part, stop:]
    placed = np.empty_like(integers)
    placed[:, root.order] = integers
    return placed


def _in_parts(weight: Matrix, inverse: Matrix, scale: Floats, grid: Grid, kept: Kept | None) -> Floats:
    together = at_once(inverse)
    parts = [slice(i, i + together) for i in range(0, len(weight), together)]
    return np.concatenate(
        [_rows(weight[p], inverse, scale[p], of_rows(grid, p), None if kept is None else kept[p]) for p in parts]
    )


def _rows(weight: Matrix, inverse: Matrix, scale: Floats, grid: Grid, kept: Kept | None) -> Floats:
    count, inputs = weight.shape
    gap = widest_gap(grid, 0, 2)
    state = DowndatedInverses(weight, inverse)
    step = scale.astype(state.values.dtype)[:, None]
    pruned = np.zeros((count, inputs), bool) if kept is None else ~kept
    integers = np.empty((count, inputs), np.float32)
    rows = np.arange(count)
    for _ in range(inputs):
        values = state.values
        rounded = round_on(values / step, grid, 0)
        rounded[pruned] = 0
        error = values - step * rounded
        beyond = np.where(state.live & ~pruned & (np.abs(error) > 0.5001 * gap * step), np.abs(error), 0.0)
        cost = np.where(state.live, error**2 / np.where(state.live, state.diagonal, 1.0), np.inf)
        first = state.live & pruned
        best = np.where(beyond.any(axis=1), beyond.argmax(axis=1), cost.argmin(axis=1))
        chosen = np.where(first.any(axis=1), first.argmax(axis=1), best)
        integers[rows, state.columns[rows, chosen]] = rounded[rows, chosen]
        state.remove(chosen, error[rows, chosen])
        if (blocks := state.compact()) is not None:
            pruned = pruned[rows[:, None], blocks]
    return integers
