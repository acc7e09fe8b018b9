"""Rounding against a Kronecker product: the least tr(H_O E H_I E^T), E = W - W', with feedback along both sides.

YAQA (arXiv 2505.22988, section 3.2). GPTQ rounds column after column, and each column makes up for the errors of those
before it, by H_I. Here each row also makes up for those of the rows before it, by H_O. With H = R R^T, R upper
triangular, and M = R / diag(R), the error is the sum of D_O,i D_I,j n_ij^2, where n = M_O^T E M_I. A weight is rounded
where n_ij becomes least:

    w'_ij = nearest(w_ij + sum_{j'<j} e_ij' M_I,j'j + sum_{i'<i} M_O,i'i f_i'j),   f = E M_I

The first sum is GPTQ's own (matrix.py). With H_O = 1 the second one is 0. Elements of a tile whose indices have the
same sum do not depend on each other, so a tile of b x b weights takes 2 b - 1 steps; between tiles the sums are matrix
products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.formats import Grid, of_rows, round_on
from ..errors import PassError, RecipeError
from .matrix import FIRST_RAISE, LARGEST_DAMP, ColumnOrder, Kept, Matrix, Root, in_place_of, input_order, row_errors

TILE = 64
BETWEEN_ROWS = ("yaqa", "scores")  # weightings whose H_O gptq goes through


@dataclass(frozen=True, eq=False)
class RowFeedback:
    """M_O `[rows, rows]`, unit upper triangular, of H_O with rows and columns in `order`."""

    unit: Matrix
    order: ColumnOrder

    @staticmethod
    def of(side: Matrix, sort: bool, damp: float, where: str) -> RowFeedback:
        """Return that of H_O, damped as H_I is; with `sort` rows with large gradients come first. Raises PassError."""
        order = input_order(side, sort)
        matrix = side[np.ix_(order, order)].astype(np.float64)
        mean = float(np.diagonal(matrix).mean())
        while True:
            np.einsum("ii->i", matrix)[...] += damp * mean
            try:
                factor = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
            except np.linalg.LinAlgError:
                damp = max(10 * damp, FIRST_RAISE)
                if damp <= LARGEST_DAMP:
                    continue
                raise PassError(
                    "the products of a layer's output gradients have no inverse, however much they are damped",
                    where=where,
                    hint="leave the layer out (round_weights.layers)",
                ) from None
            return RowFeedback(factor / np.diagonal(factor), order)


def two_sided(
    weight: Matrix, root: Root, feedback: RowFeedback, scale: Floats, grid: Grid, *, kept: Kept | None = None
) -> Floats:
    """Return integers `[rows, d]`, as float32."""
    dtype, row_order = root.dtype, feedback.order
    upper, sides = root.upper, feedback.unit.astype(dtype)
    target = np.ascontiguousarray(weight[np.ix_(row_order, root.order)], dtype=dtype)
    held = None if kept is None else kept[np.ix_(row_order, root.order)]
    step = scale[row_order].astype(dtype)
    lifted = np.zeros_like(target)  # the second sum
    integers = np.empty(target.shape, np.float32)
    (rows, inputs), pivots = target.shape, np.diagonal(upper)
    for top in range(0, rows, TILE):
        bottom = min(top + TILE, rows)
        down = np.triu(sides[top:bottom, top:bottom], 1)
        strip = np.empty((bottom - top, inputs), dtype)  # f of these rows
        for left in range(0, inputs, TILE):
            right = min(left + TILE, inputs)
            along = np.triu(upper[left:right, left:right], 1)
            own, raised, errors = target[top:bottom, left:right], lifted[top:bottom, left:right], strip[:, left:right]
            for diagonal in range(bottom - top + right - left - 1):
                i = np.arange(max(0, diagonal - (right - left) + 1), min(bottom - top - 1, diagonal) + 1)
                j = diagonal - i
                s = step[top + i]
                rounded = round_on((own[i, j] + raised[i, j]) / s, of_rows(grid, row_order[top + i]), 0)
                if held is not None:
                    rounded *= held[top + i, left + j]
                integers[top + i, left + j] = rounded
                errors[i, j] = error = own[i, j] - s * rounded
                own[i] -= (error / pivots[left + j])[:, None] * along[j]
                raised[:, j] += down[i].T * error
            target[top:bottom, right:] -= (errors / pivots[left:right]) @ upper[left:right, right:]
        lifted[bottom:] += sides[top:bottom, bottom:].T @ strip
    placed = np.empty_like(integers)
    placed[row_order] = integers
    return in_place_of(np.ascontiguousarray(placed.T), root.order)


def errors_of_rows(difference: Matrix, gram: Matrix, side: Matrix | None) -> npt.NDArray[np.float64]:
    """Return the error of each row of E = W - W' `[rows, d]`: with H_O an equal share of tr(H_O E H_I E^T)."""
    if side is None:
        return row_errors(difference, gram)
    whole = float(np.sum((side @ difference) * (difference @ gram), dtype=np.float64))
    return np.full(len(difference), whole / len(difference))


def check_weighting(step: str, method: str, weighting: str, refits: int) -> None:
    """Raise RecipeError for a weighting of H that does not go with a method of rounding."""
    reasons = {
        "gptaq, whose shift of inputs has no weights": weighting != "none" and method == "gptaq",
        f"{method}: only gptq goes through rows in turn": weighting in BETWEEN_ROWS and method not in ("gptq", "gptaq"),
        "levels that are fitted for each row alone": weighting in BETWEEN_ROWS and refits > 0,
    }
    for reason in (why for why, wrong in reasons.items() if wrong):
        raise RecipeError(
            f"the weighting {weighting} does not go with {reason}",
            where=f"{step}.weighting",
            hint=f"set {step}.weighting to none, or {step}.method to gptq and {step}.refits to 0",
        )
