"""Rounding to vectors: gptq of one input at a time where vectors have one, the best vector for each pair otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.cluster.vq import kmeans2

from mezzotint.compiler.core.formats import Levels, Vectors, nearest_vectors, quantize, round_on
from mezzotint.compiler.rounding import matrix
from mezzotint.compiler.rounding.row_scales import search
from mezzotint.compiler.rounding.vectors import gptq_vectors, vector_order
from mezzotint.compiler.scales.vector_codebooks import vector_table
from mezzotint.runtime.arrays import Floats

ROWS, INPUTS = 5, 12
Case = tuple[Floats, npt.NDArray[np.float64], Floats, Vectors]


@pytest.fixture
def case() -> Case:
    """(weights, H, scales, table)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((INPUTS, INPUTS)) @ rng.standard_normal((INPUTS, 60)) + 0.5
    weight = rng.standard_normal((ROWS, INPUTS)).astype(np.float32)
    scale = (np.abs(weight).max(axis=1) / 100).astype(np.float32)
    return weight, x @ x.T, scale, Vectors(rng.integers(-100, 101, (16, 2)).astype(np.int8))


def near(points: Floats, table: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    differences = points[:, None].astype(np.float64) - table[None]
    return np.asarray(np.square(differences).sum(axis=2).argmin(axis=1))


@pytest.mark.parametrize("axis", [0, 1])
def test_nearest_vectors(case: Case, axis: int) -> None:
    weight, _, scale, grid = case
    steps = weight / scale[:, None]
    want = grid.table[near(steps.reshape(-1, 2), grid.table)].reshape(weight.shape)
    got = round_on(steps if axis == 0 else steps.T.copy(), grid, axis)
    np.testing.assert_array_equal(got if axis == 0 else got.T, want)
    zero = np.zeros(ROWS, np.int8)
    np.testing.assert_array_equal(quantize(weight, scale, zero, grid, 0), want)
    found = search(weight, scale, grid, np.ones(INPUTS, np.float32))
    assert (found > 0).all() and not np.array_equal(found, scale)


def test_vectors_of_one_input_are_rounded_as_levels(case: Case) -> None:
    weight, gram, scale, _ = case
    levels = np.arange(-100, 101, 25, dtype=np.int8)
    root = matrix.inverse_root(gram, vector_order(gram, 1, True), 0.01, "here")
    np.testing.assert_array_equal(root.order, matrix.input_order(gram, True))
    want = matrix.gptq(weight, root, scale, Levels(levels), block=4)
    got = gptq_vectors(weight, root, scale, Vectors(levels[:, None]), block=4)
    np.testing.assert_array_equal(got, want)


def test_each_vector_costs_least_and_the_rest_compensates(case: Case) -> None:
    """Against the plain form: a vector at a time, the rest of the row solved anew by least squares."""
    weight, gram, scale, grid = case
    root = matrix.inverse_root(gram, vector_order(gram, 2, True), 0.01, "here")
    pairs = root.order.reshape(-1, 2)
    assert (pairs[:, 1] == pairs[:, 0] + 1).all() and not pairs[0, 0] % 2
    got = gptq_vectors(weight, root, scale, grid, block=5)
    damped = gram + 0.01 * np.diagonal(gram).mean() * np.eye(INPUTS)
    for row, s, integers in zip(weight.astype(np.float64), scale.astype(np.float64), got, strict=True):
        left, now = list(root.order), row.copy()
        for pair in pairs:
            left = [j for j in left if j not in pair]
            errors = np.zeros((len(grid.table), INPUTS))
            errors[:, pair] = now[pair] - s * grid.table
            if left:
                solved = np.linalg.solve(damped[np.ix_(left, left)], damped[np.ix_(left, pair)] @ errors[:, pair].T)
                errors[:, left] = -solved.T
            best = int(np.einsum("ki,ij,kj->k", errors, damped, errors).argmin())
            assert integers[pair].tolist() == grid.table[best].tolist()
            now[left] -= errors[best, left]


def test_the_table_fits_better_than_others(case: Case) -> None:
    weight, _, scale, grid = case
    rng = np.random.default_rng(1)
    h = np.tile(rng.uniform(0.1, 3, INPUTS).astype(np.float32), (ROWS, 1))

    def error(table: npt.NDArray[np.int8], importance: Floats = h) -> float:
        difference = weight - scale[:, None] * round_on(weight / scale[:, None], Vectors(table), 0)
        return float((np.square(difference) * importance).sum())

    table = vector_table(weight, scale, h, 8, 2)
    assert (table == 0).all(axis=1).any()  # silent channels have a value
    assert error(table) < 0.75 * error(grid.table[:8])
    again = vector_table(weight, scale, h, 8, 2)
    np.testing.assert_array_equal(again, table)
    assert error(vector_table(weight, scale, h, ROWS * INPUTS // 2, 2)) < 0.2 * error(table)


def test_kmeans_is_as_good_as_that_of_scipy() -> None:
    """On many points of weight 1, beside the best of five random starts; with weights, better than without."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((20, 200)) * 30).clip(-120, 120).astype(np.float32)
    scale, ones = np.ones(20, np.float32), np.ones((20, 200), np.float32)
    points = rows.reshape(-1, 2)

    def error(table: npt.NDArray[Any], weights: Floats) -> float:
        chosen = nearest_vectors(points, table, weights.reshape(-1, 2))
        return float((np.square(points - table[chosen]) * weights.reshape(-1, 2)).sum())

    centers = [kmeans2(points, 16, iter=40, minit="++", rng=seed)[0] for seed in range(5)]
    assert error(vector_table(rows, scale, ones, 16, 2), ones) < 1.06 * min(error(c, ones) for c in centers)
    h = np.tile(np.array([0.1, 4.0], np.float32), (20, 100))
    assert error(vector_table(rows, scale, h, 16, 2), h) < 0.7 * error(vector_table(rows, scale, ones, 16, 2), h)
