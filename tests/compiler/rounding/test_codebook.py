"""Levels fitted to known codes: the least squares solution of each row, and rounds that only improve."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.core.formats import Levels
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.rounding import matrix
from mezzotint.compiler.rounding.codebook import fitted_in_turns, refit_levels
from mezzotint.runtime.arrays import Floats

ROWS, INPUTS, COUNT = 6, 24, 5


@pytest.fixture
def case() -> tuple[Floats, npt.NDArray[np.float64], npt.NDArray[np.float64], Floats, Levels]:
    """(weights, inputs X, H, scales, levels)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((INPUTS, INPUTS)) @ rng.standard_normal((INPUTS, 100)) + 0.5
    weight = rng.standard_normal((ROWS, INPUTS)).astype(np.float32)
    scale = (np.abs(weight).max(axis=1) / 100).astype(np.float32)
    table = np.sort(rng.choice(np.arange(-90, 90), (ROWS, COUNT)), axis=1).astype(np.int8)
    table[0, -1] = table[0, -2]  # a row of fewer levels
    return weight, x, x @ x.T, scale, Levels(table)


def test_levels_are_the_least_squares_fit_to_the_outputs(
    case: tuple[Floats, npt.NDArray[np.float64], npt.NDArray[np.float64], Floats, Levels],
) -> None:
    weight, x, gram, scale, grid = case
    integers = matrix.nearest(weight, scale, grid)
    got = refit_levels(weight, integers, gram, scale, grid, "here").table
    for row, codes, s, old, new in zip(weight, integers, scale, grid.table, got, strict=True):
        used = np.unique(codes)
        members = (codes == used[:, None]).astype(float)
        want = np.linalg.lstsq((float(s) * members @ x).T, row.astype(np.float64) @ x, rcond=None)[0]
        fitted = np.clip(np.rint(want), -127, 127)
        unused = set(old.tolist()) if len(used) < COUNT else set()  # these stay
        assert set(fitted.astype(int).tolist()) <= set(new.tolist()) <= set(fitted.astype(int).tolist()) | unused


def test_rounds_only_improve(
    case: tuple[Floats, npt.NDArray[np.float64], npt.NDArray[np.float64], Floats, Levels],
) -> None:
    weight, _, gram, scale, grid = case
    root = matrix.inverse_root(gram, matrix.input_order(gram, True), 0.01, "here")

    def error(refits: int) -> npt.NDArray[np.float64]:
        def again(levels: Levels) -> Floats:
            return matrix.gptq(weight, root, scale, levels, block=8)

        levels, integers = fitted_in_turns(weight, gram, scale, grid, again, refits, "here")
        assert all(set(q) <= set(t) for q, t in zip(integers.tolist(), levels.table.tolist(), strict=True))
        return matrix.row_errors(weight - scale[:, None] * integers, gram)

    none, one, four = error(0), error(1), error(4)
    assert (one <= none).all() and (four <= one).all()
    assert four.sum() < 0.5 * none.sum()


def test_a_table_of_all_rows_is_not_fitted_row_by_row(
    case: tuple[Floats, npt.NDArray[np.float64], npt.NDArray[np.float64], Floats, Levels],
) -> None:
    weight, _, gram, scale, grid = case
    shared = Levels(grid.table[1])
    with pytest.raises(RecipeError, match="share one table"):
        refit_levels(weight, matrix.nearest(weight, scale, shared), gram, scale, shared, "here")
