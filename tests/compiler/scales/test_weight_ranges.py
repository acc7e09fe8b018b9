"""Ranges of weights by the least squared error, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.scales import weights
from mezzotint.compiler.scales.weights import row_limits, weight_format


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("cache_bytes", [1, 4 * 40 * 3, 1 << 20])
def test_the_range_has_the_least_error(monkeypatch: pytest.MonkeyPatch, bits: int, cache_bytes: int) -> None:
    """Of 21 shares of the largest magnitude, whatever rows are searched together."""
    monkeypatch.setattr(weights, "CACHE_BYTES", cache_bytes)
    rows = np.random.default_rng(bits).standard_t(3, (10, 40)).astype(np.float32)
    rows[4] = 0
    grid, wanted = weight_format(bits), []
    for row in rows:
        largest = np.abs(row).max()
        errors = {}
        for share in np.linspace(1, 0.6, 21):
            scale = max(largest * np.float32(share) / grid.qmax, np.float32(1e-30))
            left = np.clip(np.rint(row / scale), grid.qmin, grid.qmax) * scale - row
            errors[share] = float((left.astype(np.float64) ** 2).sum())
        wanted.append(largest * min(errors, key=lambda share: (errors[share], -share)))
    found = row_limits(rows, grid, "mse")
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert bits > 3 or (found < np.abs(rows).max(axis=1) * 0.99).sum() >= 5, "ranges are cut where that is better"
