"""Equally spaced levels with a zero point: near the best of a fine grid of all, and exact on the int8 grid."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.scales.affine_levels import affine_grid, affine_levels


@pytest.mark.parametrize("bits", [2, 3])
def test_they_are_near_the_best_scale_and_zero_point(bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows, h = rng.gamma(2.0, size=(6, 24)) - 0.5, rng.uniform(0.05, 2, 24)
    top = (1 << bits) - 1
    scales, offsets = affine_grid(rows, h, bits)
    for row, scale, offset in zip(rows, scales, offsets, strict=True):

        def error(s: float, z: float, row: np.ndarray = row) -> float:
            codes = np.clip(np.rint((row - z) / s), 0, top)
            return float(np.square(row - s * codes - z) @ h)

        width = np.ptp(row)
        tried = [error(f * width / top, z) for f in np.linspace(0.2, 1, 41) for z in np.linspace(-1, row.max(), 61)]
        symmetric = min(error(f * np.abs(row).max() * 2 / top, -f * np.abs(row).max()) for f in np.linspace(0.2, 1, 41))
        assert error(float(scale), float(offset)) < min(tried) * 1.15
        assert error(float(scale), float(offset)) < symmetric * 0.8  # these weights are not around zero


def test_levels_are_equally_spaced_on_the_int8_grid() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.standard_normal((3, 40)) + 1, np.full((1, 40), 0.25), np.zeros((1, 40))])
    table, scale = affine_levels(rows.astype(np.float32), np.ones(40, np.float32), 3)
    assert table.shape == (5, 8) and table.dtype == np.int8
    steps = np.diff(table[:3].astype(np.int64), axis=1)
    assert (np.ptp(steps, axis=1) <= 1).all() and (steps > 0).all()
    assert (np.abs(table[:4].astype(np.int64)).max(axis=1) == 127).all()
    values = table * scale[:, None]
    assert np.abs(values[3] - 0.25).min() <= 0.5 / 254 and np.abs(values[4]).min() == 0
