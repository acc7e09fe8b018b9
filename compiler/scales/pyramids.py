"""Codebooks of integer points on pyramids: no table is fitted, and all weights have the same one.

    P(n, K) = { p integer, [n] : |p_1| + .. + |p_n| = K }

P(4, 4) has 192 points, so that a code of 8 bits stands for 4 weights. N(n, K), the number of points, follows Fischer's
recursion N(n, K) = N(n - 1, K) + N(n - 1, K - 1) + N(n, K - 1), with N(n, 0) = 1 and N(0, K) = 0 for K > 0.

In pyramid vector quantization (arXiv 2410.16926) a group of weights is a point of one pyramid, its direction, times a
magnitude of its own. An integer kernel has one scale for a row. `nested` pyramids P(n, K), P(n, K - 2), P(n, K - 4) ..
in its place are groups of several magnitudes: with n = 4 and K = 4 they are the 225 points of the lattice D4 inside of
the pyramid. Of the power of normally distributed weights an error of 0.148 is left on the 192 points, of 0.115 on the
225, and of 0.117 on the best four levels of single weights, which have 2 bits as well.

Points are multiplied by the largest integer that keeps the pyramid within int8: a table of small integers would be
stored in 4 bits a weight, not by code.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from .codebooks import LARGEST_LEVEL


def count_points(size: int, total: int) -> int:
    """Return N(size, total)."""
    row = [1] + [0] * total  # N(0, .)
    for _ in range(size):
        new = [1]
        for k in range(1, total + 1):
            new.append(row[k] + row[k - 1] + new[k - 1])
        row = new
    return row[total]


def pyramid(size: int, total: int) -> npt.NDArray[np.int64]:
    """Return the points `[N(size, total), size]` whose magnitudes sum to `total`, in ascending order."""
    heads = np.array(list(product(range(-total, total + 1), repeat=size - 1)), np.int64).reshape(-1, size - 1)
    rest = total - np.abs(heads).sum(axis=1)
    heads, rest = heads[rest >= 0], rest[rest >= 0]
    points = np.concatenate([np.column_stack([heads, -rest]), np.column_stack([heads, rest])])
    return np.unique(points, axis=0)


def largest_pyramid(size: int, bits: int, nested: bool) -> int:
    """Return the largest K whose points, or those of the nested pyramids, have codes of `bits`; 0 for none."""
    total = 0
    while sum(count_points(size, k) for k in _totals(total + 1, nested)) <= 1 << bits:
        total += 1
    return total


def pyramid_table(size: int, bits: int, nested: bool) -> npt.NDArray[np.int8]:
    """Return the int8 vectors `[count, size]` of the largest pyramid, or nested pyramids, with codes of `bits`."""
    total = largest_pyramid(size, bits, nested)
    points = np.concatenate([pyramid(size, k) for k in _totals(total, nested)])
    table: npt.NDArray[np.int8] = (points * (LARGEST_LEVEL // max(total, 1))).astype(np.int8)
    return table


def _totals(total: int, nested: bool) -> range:
    return range(total, -1, -2) if nested else range(total, total + 1)
