"""Fixed codebooks of weights: int8 levels that need no fit, ascending.

normal    the levels with the least mean square error for N(0, 1) (Lloyd and Max), as HIGGS (arXiv 2411.17525) has them:
          each is the mean of its cell, t = (phi(a) - phi(b)) / (Phi(b) - Phi(a)), a and b halfway to its neighbours
float     every value of a small float format with a sign, in units of its smallest one, so that the table is exact:
          E2M1 is 0, 1, 2, 3, 4, 6, 8, 12. No code stands for infinity or NaN
twin log  (LRQ-DiT, arXiv 2508.03485) each sign has half of the levels, equally spaced in log2(|w| + eta)

signs     -64 and 64, the normal levels of 1 bit. Processors without VNNI sum pairs of products in 16 bits, which
          2 x 255 x 64 does not exceed

The scale of a row turns levels into weights; the largest level of `normal` is 127, to 0.4 % of it exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles, Floats

LARGEST_LEVEL = 127
LEVEL_BITS = 4  # of the widest weight with a codebook
FLOAT_FORMS: Mapping[int, Mapping[str, tuple[int, int]]] = {
    3: {"e2m0": (2, 0), "e1m1": (1, 1)},
    4: {"e2m1": (2, 1), "e1m2": (1, 2), "e3m0": (3, 0)},
}
"""Bits -> name -> bits of the exponent and of the mantissa. One bit of exponent gives the integers."""

_TOLERANCE = 1e-12
_Levels = npt.NDArray[np.int8]

SIGNS: _Levels = np.array([-64, 64], np.int8)
"""The levels of signs; with the scale mean |w| / 64 they are the best symmetric pair for a row."""


def normal_grid(count: int) -> Doubles:
    """Return the `count` levels with the least mean square error for N(0, 1), ascending, in float64.

    The iteration converges linearly, and its fixed point is the only one for this density.
    """
    normal = NormalDist()
    density, below = np.vectorize(normal.pdf), np.vectorize(normal.cdf)
    levels = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    while True:
        ends = (levels[1:] + levels[:-1]) / 2
        cells = np.diff(np.concatenate([[0.0], below(ends), [1.0]]))
        new = -np.diff(np.concatenate([[0.0], density(ends), [0.0]])) / cells
        if np.abs(new - levels).max() < _TOLERANCE:
            return np.asarray((new - new[::-1]) / 2)  # symmetric, as the density
        levels = new


def normal_levels(bits: int) -> _Levels:
    """Return the normal levels of so many bits, the largest one as 127."""
    grid = normal_grid(1 << bits)
    levels: _Levels = np.rint(grid * (LARGEST_LEVEL / grid[-1])).astype(np.int8)
    return levels


def float_levels(exponent: int, mantissa: int) -> _Levels:
    """Return the values of a float format with these bits and a sign, in units of the smallest one.

    Exponents of 0 are subnormal: fraction m of 2^mantissa; others e are (2^mantissa + m) 2^(e - 1).
    """
    whole = 1 << mantissa
    powers = [(whole + m) << (e - 1) for e in range(1, 1 << exponent) for m in range(whole)]
    positive = np.array([*range(whole), *powers])
    return np.concatenate([-positive[:0:-1], positive]).astype(np.int8)


def twin_log_levels(rows: Floats, eta: float, share: float, bits: int) -> tuple[_Levels, Floats]:
    """Return (levels `[rows, 2^bits]`, scales `[rows]`) of weights `[rows, d]`.

    The magnitudes of each sign end at their quantile `share` and begin at their smallest one. `eta` is relative to the
    row's larger end. A sign without weights has levels of 0.
    """
    half = 1 << (bits - 1)
    sides: list[tuple[Floats, Floats]] = []
    for sign in (-1.0, 1.0):
        magnitudes = np.sort(np.where(rows * sign > 0, rows * sign, np.nan), axis=1)  # NaN goes last
        counts = np.isfinite(magnitudes).sum(axis=1)
        last = np.maximum(np.ceil(share * counts).astype(np.int64) - 1, 0)
        top = np.take_along_axis(magnitudes, last[:, None], axis=1)[:, 0]
        sides.append((np.nan_to_num(magnitudes[:, 0]), np.nan_to_num(top)))
    largest = np.maximum(sides[0][1], sides[1][1])
    largest = np.where(largest > 0, largest, 1.0)
    shares = np.linspace(0.0, 1.0, half)
    found = []
    for low, high in ((low / largest, high / largest) for low, high in sides):
        start, stop = np.log2(low + eta)[:, None], np.log2(high + eta)[:, None]
        found.append(np.maximum(2 ** (start + (stop - start) * shares) - eta, 0))
    levels = np.concatenate([-found[0][:, ::-1], found[1]], axis=1)
    return np.rint(levels * LARGEST_LEVEL).astype(np.int8), (largest / LARGEST_LEVEL).astype(np.float32)
