"""The best int8 levels for weights: k-means in one dimension, exact, with the levels on the int8 grid.

    min over levels l_1 < .. < l_k in -127 .. 127 of   sum_i h_i min_j (u_i - l_j)^2,        u = w / s

is found by dynamic programming over the last level so far (as Wang and Song, 2011, do over points): between two
neighbours i < j, values up to (i + j) / 2 go to i, the others to j, so that

    D_1(j) = cost of all values below j at level j
    D_n(j) = min_i D_(n-1)(i) + C(i, j),        answer: min_j D_k(j) + cost of all values above j at level j

C comes from sums of h, h u and h u^2 up to each half integer. No start matters, and no other codebook on the int8 grid
is better. A row takes 255^2 k additions, whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles, Floats

from ..core.formats import SMALLEST_SCALE
from .codebooks import LARGEST_LEVEL

_LEVELS = np.arange(-LARGEST_LEVEL, LARGEST_LEVEL + 1)
_COUNT = len(_LEVELS)
_OWN = 2 * np.arange(_COUNT)  # the half integer of each level, counted from -127
_HALVES = 2 * _COUNT - 1
_BETWEEN = np.add.outer(np.arange(_COUNT), np.arange(_COUNT))  # the half integer between two levels
_UPPER = np.triu(np.ones((_COUNT, _COUNT), bool))


def own_scales(rows: Floats) -> Floats:
    """Return the scale `[rows]` that puts the largest magnitude of each row on 127."""
    scale: Floats = np.maximum(np.abs(rows).max(axis=1) / LARGEST_LEVEL, SMALLEST_SCALE).astype(np.float32)
    return scale


def best_levels(rows: Floats, scale: Floats, importance: Floats, count: int) -> npt.NDArray[np.int8]:
    """Return the best `count` levels of each row `[rows, count]`; `importance` `[d]` or `[rows, d]` weights the errors.

    A row of fewer different values repeats some levels.
    """
    return np.stack([_best(sums, count) for sums in _moments(rows, scale, importance)])


def shared_levels(rows: Floats, scale: Floats, importance: Floats, count: int) -> npt.NDArray[np.int8]:
    """Return the best `count` levels that all rows share `[count]`, for these scales `[rows]`."""
    squares = scale.astype(np.float64) ** 2  # errors of a row are in units of its scale
    total = np.zeros((3, _HALVES))
    for square, sums in zip(squares, _moments(rows, scale, importance), strict=True):
        total += square * sums
    return _best(total, count)


def _moments(rows: Floats, scale: Floats, importance: Floats) -> Iterator[Doubles]:
    """Yield the sums of h, h u and h u^2 of each row up to each half integer `[3, halves]`."""
    for i, row in enumerate(rows.astype(np.float64)):
        u = row / scale[i]
        h = np.asarray(importance if importance.ndim == 1 else importance[i], np.float64)
        bins = np.clip(np.ceil(2 * (u + LARGEST_LEVEL)), 0, _HALVES - 1).astype(np.int64)
        yield np.stack([np.bincount(bins, h * u**n, _HALVES) for n in range(3)]).cumsum(axis=1)


def _best(sums: Doubles, count: int) -> npt.NDArray[np.int8]:
    zeroth, first, second = sums
    own = sums[:, _OWN]
    below = own[2] - 2 * _LEVELS * own[1] + _LEVELS**2 * own[0]  # cost of all values up to a level, at it
    above = second[-1] - 2 * _LEVELS * first[-1] + _LEVELS**2 * zeroth[-1] - below
    middle = second[_BETWEEN] + 0.0
    # Each half: the cost up to the middle at i, less that up to i; and that up to j at j, less that up to the middle.
    first_mid, zeroth_mid = first[_BETWEEN], zeroth[_BETWEEN]
    left = middle - 2 * _LEVELS[:, None] * first_mid + _LEVELS[:, None] ** 2 * zeroth_mid - below[:, None]
    right = below[None] - (middle - 2 * _LEVELS * first_mid + _LEVELS**2 * zeroth_mid)
    between = np.where(_UPPER, left + right, np.inf)
    cost, parents = below, []
    for _ in range(count - 1):
        tried = cost[:, None] + between
        parents.append(tried.argmin(axis=0))
        cost = tried.min(axis=0)
    chosen = [int((cost + above).argmin())]
    for parent in reversed(parents):
        chosen.append(int(parent[chosen[-1]]))
    return _LEVELS[chosen[::-1]].astype(np.int8)
