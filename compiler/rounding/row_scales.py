"""Scales for rounded weights: a shrink search for each row, and the best scale for integers that are known.

search    among a list of fractions of the largest magnitude, and the present scale, the one with the least
          sum_i h_i (w_i - s q_i)^2; h = 1 (mean square) or the diagonal of H = X X^T (the layer's output, as if inputs
          were uncorrelated). OBC and GPTQ search in the same way, on 100 points and with the power 2.4.
refit     with q fixed, E(s) = (w - s q) H (w - s q)^T is a parabola: s = (w H q) / (q H q).
in turns  q to nearest and s = (sum h w q) / (sum h q^2) in turns, until s stays; a row keeps its scale where they raise
          the error of `search` (nearest vectors know no h). For levels -l and l, whose q does not depend on s, the
          first turn gives the best scale, (sum h |w|) / (l sum h).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.formats import SMALLEST_SCALE, Grid, Levels, Vectors, ends, of_rows, reach, round_on
from .matrix import Matrix

SCALE_FACTORS = np.linspace(1.0, 0.3, 29)
MOST_TURNS = 8
CACHED = 1 << 16  # weights whose scales are searched at once


def search(weight: Matrix, scale: Floats, grid: Grid, importance: Matrix) -> Floats:
    """Return a scale for each row `[rows]`; `importance` `[d]` weights the inputs."""
    at_once = max(CACHED // weight.shape[1], 1)
    parts = (slice(i, i + at_once) for i in range(0, len(weight), at_once))
    return np.concatenate([_search(weight[part], scale[part], of_rows(grid, part), importance) for part in parts])


def _search(weight: Matrix, scale: Floats, grid: Grid, importance: Matrix) -> Floats:
    limit = np.abs(weight).max(axis=1) / reach(grid)
    best = scale.astype(np.float32)
    error = _error(weight, best, grid, importance)
    for shrink in SCALE_FACTORS:
        tried: Floats = np.maximum(limit * shrink, SMALLEST_SCALE).astype(np.float32)
        loss = _error(weight, tried, grid, importance)
        best, error = np.where(loss < error, tried, best), np.minimum(loss, error)
    return best


def scales_in_turns(weight: Matrix, scale: Floats, grid: Grid, importance: Matrix) -> Floats:
    """Return a scale for each row `[rows]`, from `scale` on; a row whose next one is not positive keeps its own."""
    new = scale.astype(np.float64)
    for _ in range(MOST_TURNS):
        old = new
        integers = round_on(weight / old[:, None], grid, 0).astype(np.float64)
        square, product = np.square(integers) @ importance, (integers * weight) @ importance
        fits = (square > 0) & (product > 0)
        new = np.where(fits, np.maximum(product / np.where(square > 0, square, 1.0), SMALLEST_SCALE), old)
        if np.allclose(new, old, rtol=1e-6, atol=0):
            break
    fitted = new.astype(np.float32)
    better = _error(weight, fitted, grid, importance) <= _error(weight, scale, grid, importance)
    return np.where(better, fitted, scale)


def refit(weight: Matrix, integers: Floats, gram: Matrix, scale: Floats) -> Floats:
    """Return the best scale of each row for its integers. A row whose best scale is not positive keeps its own."""
    seen = integers.astype(gram.dtype) @ gram
    square = np.einsum("ij,ij->i", seen, integers, dtype=np.float64)
    product = np.einsum("ij,ij->i", seen, weight, dtype=np.float64)
    fits = (square > 0) & (product > 0)
    ratio = product / np.where(square > 0, square, 1.0)
    return np.where(fits, np.maximum(ratio, SMALLEST_SCALE), scale).astype(np.float32)


def _error(weight: Matrix, scale: Floats, grid: Grid, importance: Matrix) -> npt.NDArray[np.float64]:
    difference = weight / scale[:, None]
    if isinstance(grid, Levels | Vectors):
        difference = grid.nearest(difference, 0)
    else:  # without copies
        np.rint(difference, out=difference)
        np.clip(difference, *ends(grid, 0, 2), out=difference)
    difference *= scale[:, None]
    difference -= weight
    np.square(difference, out=difference)
    return np.asarray(difference @ importance, np.float64)
