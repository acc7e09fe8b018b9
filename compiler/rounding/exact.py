"""obq: the greedy order of Optimal Brain Quantization (arXiv 2208.11580), exact for each row, for small layers.

A row keeps the inverse G = H^-1 of the columns that are still free. Until none is left,

    p  = the free column with the least (w_p - s q_p)^2 / G_pp
    w -= (w_p - s q_p) / G_pp G_p,        G -= G_p G_p^T / G_pp,        p is done

and a weight more than half a step (of a codebook: half of its widest gap) beyond the grid is taken first, before it
moves further. Every row has an order of its own, so that d inputs cost d^3 for each row; many rows go at once, and what
is done leaves the matrices now and then, which saves two thirds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.formats import Grid, of_rows, round_on, widest_gap
from .matrix import Matrix, Root

ROOM = 1 << 26  # bytes of inverses that are worked on at once
COMPACTIONS = 8  # how often finished columns are removed from the matrices


def obq(weight: Matrix, root: Root, scale: Floats, grid: Grid) -> Floats:
    """Return integers `[rows, d]`, as float32."""
    upper = root.upper.astype(np.float64)
    inverse = np.empty_like(upper)
    inverse[np.ix_(root.order, root.order)] = upper.T @ upper
    at_once = max(ROOM // inverse.nbytes, 1)
    parts = [slice(i, i + at_once) for i in range(0, len(weight), at_once)]
    found = [_rows(weight[part], inverse, scale[part], of_rows(grid, part)) for part in parts]
    return np.concatenate(found)


def _rows(weight: Matrix, inverse: npt.NDArray[np.float64], scale: Floats, grid: Grid) -> Floats:
    count, inputs = weight.shape
    gap = widest_gap(grid, 0, 2)
    values, step = weight.astype(np.float64), scale.astype(np.float64)[:, None]
    inverses = np.repeat(inverse[None], count, axis=0)
    columns = np.tile(np.arange(inputs), (count, 1))  # which column of the weight each one is
    free = np.ones((count, inputs), bool)
    integers = np.empty((count, inputs), np.float32)
    rows = np.arange(count)
    every = max(inputs // COMPACTIONS, 1)
    for done in range(inputs):
        if done and done % every == 0:
            kept = np.nonzero(free)[1].reshape(count, -1)
            inverses = inverses[rows[:, None, None], kept[:, :, None], kept[:, None, :]]
            values, columns = np.take_along_axis(values, kept, 1), np.take_along_axis(columns, kept, 1)
            free = np.ones(kept.shape, bool)
        rounded = round_on(values / step, grid, 0)
        error = values - step * rounded
        diagonal = np.where(free, np.einsum("rii->ri", inverses), 1.0)
        beyond = np.where(free & (np.abs(error) > 0.5001 * gap * step), np.abs(error), 0.0)
        cost = np.where(free, error**2 / diagonal, np.inf)
        chosen = np.where(beyond.any(axis=1), beyond.argmax(axis=1), cost.argmin(axis=1))
        integers[rows, columns[rows, chosen]] = rounded[rows, chosen]
        column = inverses[rows, chosen]  # [rows, columns]: the matrices are symmetric
        pivot = diagonal[rows, chosen][:, None]
        values -= error[rows, chosen][:, None] / pivot * column
        inverses -= column[:, :, None] * (column / pivot)[:, None, :]
        free[rows, chosen] = False
    return integers
