"""Pyramids: every integer point of the sum and no other, as many as Fischer's recursion says."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mezzotint.compiler.core.formats import Vectors
from mezzotint.compiler.rounding.level_fits import LevelFit, level_errors
from mezzotint.compiler.scales.pyramids import count_points, largest_pyramid, pyramid, pyramid_table


@pytest.mark.parametrize(("size", "total"), [(2, 4), (2, 16), (3, 3), (4, 1), (4, 4), (4, 0)])
def test_points_are_those_of_the_definition(size: int, total: int) -> None:
    want = [p for p in product(range(-total, total + 1), repeat=size) if sum(map(abs, p)) == total]
    assert [tuple(p) for p in pyramid(size, total).tolist()] == want
    assert len(want) == count_points(size, total)


def test_the_largest_pyramid_that_a_code_has_room_for() -> None:
    found = {
        (n, b, nested): largest_pyramid(n, b, nested) for n, b in ((4, 8), (4, 4), (2, 4)) for nested in (False, True)
    }
    assert found == {(4, 8, 0): 4, (4, 8, 1): 4, (4, 4, 0): 1, (4, 4, 1): 1, (2, 4, 0): 4, (2, 4, 1): 3}
    assert count_points(4, 4) == 192 and count_points(4, 5) > 256
    for nested, count in ((False, 192), (True, 225)):
        table = pyramid_table(4, 8, nested).astype(int)
        assert len(np.unique(table, axis=0)) == len(table) == count
        assert not (table % 31).any() and set(np.abs(table // 31).sum(axis=1)) == ({0, 2, 4} if nested else {4})


def test_errors_of_normal_weights() -> None:
    """The figures of the module: one pyramid is worse than levels of single weights, nested ones are better."""
    rows = np.random.default_rng(0).standard_normal((8, 4096)).astype(np.float32)
    ones = np.ones((1, 4096), np.float32)
    found = {}
    for nested in (False, True):
        table, scale = LevelFit("pyramid", size=4, nested=nested).fit(rows, ones, 2, "here")
        found[nested] = float(level_errors(rows, scale, Vectors(table), ones).sum() / np.square(rows).sum())
        best = min(float(level_errors(rows, scale * np.float32(f), Vectors(table), ones).sum()) for f in (0.97, 1.03))
        assert best > found[nested] * np.square(rows).sum()
    assert found[False] == pytest.approx(0.148, rel=0.02)
    assert found[True] == pytest.approx(0.115, rel=0.02)
