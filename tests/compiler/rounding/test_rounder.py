"""A weight rounded as a piece of work: the bytes of one process, with its threads of BLAS."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.core import blas_threads as module
from mezzotint.compiler.core.blas_threads import blas_threads, with_blas_threads
from mezzotint.compiler.core.context import Context
from mezzotint.compiler.core.formats import Format, Grid, Levels, RowFormats
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.rounding.gram import Gram
from mezzotint.compiler.rounding.report import RoundingReport
from mezzotint.compiler.rounding.rounder import WeightMatrix, WeightRounder, rounded_in_order
from tests.helpers.spreads import Backwards

ROWS, INPUTS = 12, 40
LEVELS = np.sort(np.random.default_rng(2).integers(-127, 128, (ROWS, 8)).astype(np.int8), axis=1)
OPTIONS: dict[str, Any] = {
    "scales": "output",
    "damp": 0.01,
    "act_order": True,
    "block": 16,
    "alpha": 0.25,
    "sweeps": 2,
    "exact_inputs": 16,
}


def matrices(grid: Grid, count: int = 3) -> list[WeightMatrix]:
    """Weights with inputs that are correlated; one input of the last is always 0."""
    rng = np.random.default_rng(4)
    found = []
    for i in range(count):
        columns = (rng.standard_normal((200, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))).astype(np.float32)
        if i == count - 1:
            columns[:, 3] = 0
        gram = Gram(1, INPUTS)
        gram.add(columns[:, None])
        floats = rng.standard_normal((ROWS, INPUTS)).astype(np.float32)
        top = np.abs(np.asarray(grid.qmax, np.float32))
        found.append(WeightMatrix(f"layer{i}", floats, np.abs(floats).max(axis=1) / top, True, grid, gram.matrix()))
    return found


@pytest.mark.parametrize(
    ("method", "refits", "grid"),
    [
        ("gptq", 0, RowFormats(np.array([4] * 6 + [8] * 6, np.int8))),
        ("gptq", 2, Levels(LEVELS)),
        ("comq", 0, Format(4, signed=True, symmetric=True)),
        ("obq", 0, Format(3, signed=True, symmetric=True)),
    ],
)
def test_another_process_rounds_to_the_same_bytes(method: Any, refits: int, grid: Grid, tmp_path: Path) -> None:
    rounder = WeightRounder(method=method, refits=refits, **OPTIONS)
    here = list(rounded_in_order(rounder, matrices(grid), Context(tmp_path), "round_weights"))
    there = list(rounded_in_order(rounder, matrices(grid), Context(tmp_path, spread=Backwards()), "round_weights"))

    assert len(here) == len(there) == 3 and not list(tmp_path.iterdir())
    reports = RoundingReport(), RoundingReport()
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.scale, other.scale)
        assert (one.grid is None) == (other.grid is None) == (refits == 0)
        if isinstance(one.grid, Levels) and isinstance(other.grid, Levels):
            np.testing.assert_array_equal(one.grid.table, other.grid.table)
        for report, each in zip(reports, (one, other), strict=True):
            report.add(each.report)
    assert reports[0].note(3, 1) == reports[1].note(3, 1)
    assert reports[0].count == 3 * ROWS and set(reports[0].errors) == {"layer0", "layer1", "layer2"}


def test_blas_has_the_threads_of_the_process_that_hands_out() -> None:
    own = blas_threads()
    assert own is not None, "numpy and scipy of the package index have OpenBLAS"
    other = 3 - min(own, 2)
    with with_blas_threads(other):
        assert blas_threads() == other != own
    assert blas_threads() == own
    with pytest.raises(PassError, match="BLAS computes with"), with_blas_threads(10**6):
        pass
    assert blas_threads() == own


def test_without_openblas_it_stays_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = module._openblas().select(internal_api="mkl")
    monkeypatch.setattr(module, "_openblas", lambda: nothing)
    workers = Backwards()
    rounder = WeightRounder(method="gptq", refits=0, **OPTIONS)
    weights = matrices(Format(4, signed=True, symmetric=True), count=1)
    with pytest.warns(match="no OpenBLAS"):
        (found,) = rounded_in_order(rounder, weights, Context(tmp_path, spread=workers), "round_weights")
    assert found.rows.shape == (ROWS, INPUTS) and not workers.pieces
    with pytest.raises(PassError, match="an unknown number of"), with_blas_threads(1):
        pass
    assert pickle.loads(pickle.dumps(weights[0])).where == str(weights[0]) == "layer0"
