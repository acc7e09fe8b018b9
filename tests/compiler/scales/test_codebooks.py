"""Levels of codebooks: each table is the one of its formula, and k-means the best of all."""

from __future__ import annotations

import math
from itertools import combinations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from scipy.integrate import quad

from mezzotint.compiler.core.formats import Format, Levels, quantize, round_on
from mezzotint.compiler.scales.codebooks import float_levels, normal_grid, normal_levels, twin_log_levels
from mezzotint.compiler.scales.kmeans import best_levels, own_scales, shared_levels
from mezzotint.runtime.arrays import Doubles, Floats

EVERY = np.arange(-127, 128)


def weighted(u: Doubles, h: npt.NDArray[np.floating], levels: npt.NDArray[np.integer]) -> Doubles:
    """The error of values at the nearest of levels `[..., count]`, one number for each codebook."""
    near = np.abs(u[:, None] - np.asarray(levels, np.float64)[..., None, :]).min(axis=-1)
    return np.asarray((near**2) @ h)


@pytest.mark.parametrize(("inputs", "count"), [(9, 2), (4, 3)])
def test_kmeans_is_the_best_of_all_codebooks(inputs: int, count: int) -> None:
    rng = np.random.default_rng(count)
    rows = rng.standard_normal((3, inputs)).astype(np.float32)
    h = rng.uniform(0.01, 4, inputs).astype(np.float32)
    scale = own_scales(rows)
    every = EVERY if count < 3 else EVERY[::4]  # 41,664 triples
    books = np.array(list(combinations(every.tolist(), count)), np.int16)
    for row, s, levels in zip(rows, scale, best_levels(rows, scale, h, count), strict=True):
        u = row.astype(np.float64) / s
        least = min(float(weighted(u, h, part).min()) for part in np.array_split(books, 40))
        found = float(weighted(u, h, levels))
        assert found <= least * (1 + 1e-6) + 1e-6
        if count == 2:
            assert found == pytest.approx(least)  # of the whole grid
            plain = best_levels(row[None], np.array([s]), np.ones_like(h), count)[0]
            assert float(weighted(u, h, plain)) > found  # the weights count


def test_a_shared_table_weights_rows_by_their_scales() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((2, 6)).astype(np.float32) * np.array([[1.0], [5.0]], np.float32)
    h, scale = rng.uniform(0.1, 2, 6).astype(np.float32), np.array([0.03, 0.06], np.float32)
    u = np.concatenate([row.astype(np.float64) / s for row, s in zip(rows, scale, strict=True)])
    assert np.abs(u).max() > 127  # what lies beyond the grid counts in full
    both = np.concatenate([h * float(s) ** 2 for s in scale])
    books = np.array(list(combinations(EVERY.tolist(), 2)), np.int16)
    least = min(float(weighted(u, both, part).min()) for part in np.array_split(books, 40))
    assert float(weighted(u, both, shared_levels(rows, scale, h, 2))) == pytest.approx(least)
    assert float(weighted(u, np.tile(h, 2), shared_levels(rows, scale, h, 2))) != pytest.approx(least)


def test_a_row_of_few_values_repeats_levels() -> None:
    rows = np.array([[0.0, 0.0, 0.0], [1.0, -1.0, 1.0]], np.float32)
    levels = best_levels(rows, own_scales(rows), np.ones(3, np.float32), 4)
    assert 0 in levels[0] and {-127, 127} <= set(levels[1].tolist())
    assert (np.diff(levels.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_normal_levels_are_the_means_of_their_cells(bits: int, error: float) -> None:
    """Against integrals of the density, and the errors that Max (1960) tabulates."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    grid = normal_grid(1 << bits)
    ends = [-12.0, *((grid[1:] + grid[:-1]) / 2).tolist(), 12.0]
    total = 0.0
    for level, low, high in zip(grid.tolist(), ends[:-1], ends[1:], strict=True):
        mass = quad(density, low, high)[0]
        assert level == pytest.approx(quad(lambda x: x * density(x), low, high)[0] / mass, abs=1e-8)
        total += quad(lambda x, at=level: (x - at) ** 2 * density(x), low, high)[0]
    assert total == pytest.approx(error, rel=1e-3)
    assert np.abs(normal_levels(bits) / 127 * grid[-1] - grid).max() <= grid[-1] / 254 + 1e-12


def test_float_tables_are_those_of_the_formats() -> None:
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert float_levels(2, 1).tolist() == np.unique(every * 2).tolist()
    assert float_levels(3, 0).tolist() == [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64]
    assert float_levels(1, 2).tolist() == list(range(-7, 8))
    assert float_levels(2, 0).tolist() == [-4, -2, -1, 0, 1, 2, 4]


def test_twin_logarithms_are_equally_spaced_for_each_sign() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.lognormal(0, 1, (4, 200)) * rng.choice([-1, 1], (4, 200))).astype(np.float32)
    rows[3] = np.abs(rows[3])
    eta = 0.1
    levels, scale = twin_log_levels(rows, eta, 1.0, 4)
    for row, table, s in zip(rows, levels, scale, strict=True):
        largest = float(np.abs(row).max())
        for sign, side in ((1, table[8:]), (-1, -table[:8][::-1])):
            magnitudes = row[row * sign > 0] * sign / largest
            ends = [0.0, 0.0] if not magnitudes.size else [float(magnitudes.min()), float(magnitudes.max())]
            low, high = (math.log2(end + eta) for end in ends)
            want = 2 ** np.linspace(low, high, 8) - eta
            np.testing.assert_allclose(side * s, want * largest, atol=0.51 * s)
    assert not levels[3, :8].any()
    clipped, _ = twin_log_levels(rows, eta, 0.9, 4)
    assert (np.abs(clipped).max(axis=1) == 127).all() and not np.array_equal(clipped, levels)


@pytest.mark.parametrize("axis", [0, 1])
def test_values_go_to_the_nearest_level(axis: int) -> None:
    rng = np.random.default_rng(axis)
    table = np.sort(rng.integers(-127, 128, (5, 8)), axis=1).astype(np.int8)
    steps = rng.uniform(-140, 140, (5, 7, 3)).astype(np.float32)
    want = np.stack(
        [t[np.abs(row[..., None] - t.astype(float)).argmin(-1)] for t, row in zip(table, steps, strict=True)]
    )
    turned = np.moveaxis(steps, 0, axis)
    got = round_on(turned, Levels(table), axis)
    np.testing.assert_array_equal(np.moveaxis(got, axis, 0), want)
    one = Levels(table[0])
    np.testing.assert_array_equal(round_on(steps[0], one, None), want[0])
    assert round_on(np.array([0.5, -0.5]), Levels(np.array([-1, 0, 1], np.int8)), None).tolist() == [0, -1]
    s, zero = np.full(5, 0.5, np.float32), np.zeros(5, np.int8)
    np.testing.assert_array_equal(quantize(steps * 0.5, s, zero, Levels(table), 0), want)


def test_the_levels_of_a_format_round_as_it_does() -> None:
    x: Floats = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32) * 3
    levels = Levels(np.arange(-3, 4, dtype=np.int8))
    np.testing.assert_array_equal(round_on(x, levels, 0), round_on(x, Format(3, signed=True, symmetric=True), 0))
