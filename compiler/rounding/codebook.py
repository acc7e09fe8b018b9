"""The levels of a codebook fitted again to codes that are known, as GANQ (arXiv 2501.12956) does in turns.

With S `[levels, d]`, S_ki = 1 where weight i of a row has the code k, the row is s l S, and

    E(l) = (w - s l S) H (w - s l S)^T       is least for       l (S H S^T) = w H S^T / s

The solution is rounded to the int8 grid, which has 127 steps to a row's largest level; a level without weights stays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..core.formats import Levels
from ..errors import RecipeError
from .matrix import Matrix, row_errors

_LARGEST = 127
_RIDGE = 1e-6  # of the mean diagonal of S H S^T
_AT_ONCE = 1 << 24  # numbers of S


def fitted_in_turns(
    weight: Matrix,
    gram: Matrix,
    scale: Floats,
    grid: Levels,
    rounded: Callable[[Levels], Floats],
    refits: int,
    where: str,
) -> tuple[Levels, Floats]:
    """Return the levels and the integers of each row's best round: `rounded` gives the integers for levels."""
    integers = rounded(grid)
    table, found = grid.table.copy(), integers
    error = row_errors(weight - scale[:, None] * found, gram)
    for _ in range(refits):
        grid = refit_levels(weight, integers, gram, scale, grid, where)
        integers = rounded(grid)
        loss = row_errors(weight - scale[:, None] * integers, gram)
        better = loss < error
        table[better], error[better] = grid.table[better], loss[better]
        found = np.where(better[:, None], integers, found)
    return Levels(table), found


def refit_levels(weight: Matrix, integers: Floats, gram: Matrix, scale: Floats, grid: Levels, where: str) -> Levels:
    """Return the best levels of each row for the codes that `integers` `[rows, d]` have in `grid`, ascending.

    Raise RecipeError for a table that all rows share.
    """
    if grid.table.ndim == 1:
        raise RecipeError(
            "all rows of a weight share one table of levels",
            where=where,
            hint="set round_weights.refits to 0, or choose_levels.tables to row",
        )
    count = grid.table.shape[1]
    new = np.empty_like(grid.table)
    every = max(_AT_ONCE // (count * weight.shape[1]), 1)
    for start in range(0, len(weight), every):
        part = slice(start, start + every)
        table = grid.table[part].astype(gram.dtype)
        # Equal levels at the end of a table: the first of them has the weights.
        first = np.concatenate([np.ones((len(table), 1), bool), np.diff(table, axis=1) > 0], axis=1)
        coded = (integers[part][:, None, :] == table[:, :, None]) & first[:, :, None]
        seen = coded.astype(gram.dtype) @ gram
        products = np.einsum("rkd,rjd->rkj", seen, coded.astype(gram.dtype), dtype=np.float64)
        wanted = np.einsum("rkd,rd->rk", seen, weight[part] / scale[part, None], dtype=np.float64)
        used = coded.any(axis=2)
        diagonal = np.einsum("rkk->rk", products)
        diagonal += np.where(used, _RIDGE * diagonal.mean(axis=1, keepdims=True), 1.0)
        wanted += np.where(used, 0.0, table)
        solved = np.linalg.solve(products, wanted[:, :, None])[:, :, 0]
        new[part] = np.sort(np.clip(np.rint(solved), -_LARGEST, _LARGEST).astype(np.int8), axis=1)
    return Levels(new)
