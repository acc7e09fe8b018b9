"""Uniform levels of weights with a zero point of their own: w is about s (q + z), q = 0 to 2^bits - 1, z a real number.

A row whose weights are not spread evenly around zero leaves part of a symmetric grid unused: at 2 and 3 bits up to half
of its few levels. NeUQI (arXiv 2505.17595) looks for the scale and the zero point with the least

    L(s, z) = sum_i h_i (w_i - s (q_i + z))^2,        q_i = clip(rint(w_i / s - z), 0, 2^bits - 1)

where h_i is the diagonal of the layer's H, with a z that need not be an integer. Here s starts at `SHRINKS` shares of
the width of the row, with what is cut off at its lower end, at its upper end, or half at both. From each start, q and
(s, z) are fitted in `FITS` turns, (s, z) by the weighted regression of w on q, which never raises L, and the best of
all is kept. The paper searches z exactly for each of its candidates of s.

The levels are written on the int8 grid of the row's largest one, where they are off by 1/254 of it at most.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles, Floats

from .codebooks import LARGEST_LEVEL

SHRINKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ENDS = (0.0, 0.5, 1.0)  # the share of what is cut off that lies below the levels
FITS = 3


def affine_levels(rows: Floats, importance: Floats, bits: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Return (levels `[rows, 2^bits]`, scales `[rows]`) for weights `[rows, d]` whose inputs have the weights `[d]`."""
    scale, offset = affine_grid(rows.astype(np.float64), importance.astype(np.float64), bits)
    levels = scale[:, None] * np.arange(1 << bits) + offset[:, None]
    unit = np.abs(levels).max(axis=1) / LARGEST_LEVEL
    unit = np.where(unit > 0, unit, 1.0)
    return np.rint(levels / unit[:, None]).astype(np.int8), unit.astype(np.float32)


def affine_grid(rows: Doubles, importance: Doubles, bits: int) -> tuple[Doubles, Doubles]:
    """Return the scale s and the offset s z of each row, both `[rows]`."""
    top = (1 << bits) - 1
    low, high = rows.min(axis=1), rows.max(axis=1)
    width = np.where(high > low, high - low, np.maximum(np.abs(low), 1e-10))
    best_scale, best_offset = width / top, low
    best = _error(rows, _codes(rows, best_scale, best_offset, top), importance, best_scale, best_offset)
    for share, end in product(SHRINKS, ENDS):
        scale, offset = share * width / top, low + end * (1 - share) * width
        for _ in range(FITS):
            codes = _codes(rows, scale, offset, top)
            scale, offset = _regression(rows, codes, importance, scale, offset)
            error = _error(rows, codes, importance, scale, offset)
            better = error < best
            best_scale = np.where(better, scale, best_scale)
            best_offset = np.where(better, offset, best_offset)
            best = np.where(better, error, best)
    return best_scale, best_offset


def _codes(rows: Doubles, scale: Doubles, offset: Doubles, top: int) -> Doubles:
    return np.asarray(np.clip(np.rint((rows - offset[:, None]) / scale[:, None]), 0, top))


def _error(rows: Doubles, codes: Doubles, importance: Doubles, scale: Doubles, offset: Doubles) -> Doubles:
    return np.asarray(np.square(rows - scale[:, None] * codes - offset[:, None]) @ importance)


def _regression(
    rows: Doubles, codes: Doubles, importance: Doubles, scale: Doubles, offset: Doubles
) -> tuple[Doubles, Doubles]:
    """Return s and s z of w = s q + s z by least squares; those of before where all codes of a row are equal."""
    total = importance.sum()
    code, weight = codes @ importance / total, rows @ importance / total
    spread = np.square(codes - code[:, None]) @ importance
    shared = ((codes - code[:, None]) * (rows - weight[:, None])) @ importance
    fine = (spread > 0) & (shared > 0)
    new = np.where(fine, shared / np.where(fine, spread, 1.0), scale)
    return new, np.where(fine, weight - new * code, offset)
