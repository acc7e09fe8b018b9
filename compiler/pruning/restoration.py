"""The best values of the weights that stay: least squares against the outputs of the whole row.

With the kept columns S of a row, the least of (w - w') H (w - w')^T over all w' on S is

    w'_S = (H_SS)^-1 (H w^T)_S            or, with E = all others,        w' = w - w_E (G_EE)^-1 G_E,:,    G = H^-1

the second one being what Optimal Brain Surgeon's steps add up to. Rows have masks of their own: each is solved alone.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from mezzotint.runtime.arrays import Doubles

from ..rounding.matrix import Kept, Matrix


def restored(weight: Matrix, gram: Matrix, kept: Kept) -> Doubles:
    """Return the best values `[rows, d]` on `kept` `[rows, d]`; `gram` `[d, d]` is H, already damped."""
    wide = gram.astype(np.float64)
    wanted = weight.astype(np.float64) @ wide
    found = np.zeros(weight.shape)
    for row, mask, target, original in zip(found, kept, wanted, weight, strict=True):
        if mask.all():
            row[:] = original
        elif mask.any():
            places = np.flatnonzero(mask)
            factor = cho_factor(wide[np.ix_(places, places)], lower=True, overwrite_a=True, check_finite=False)
            row[places] = cho_solve(factor, target[places], check_finite=False)
    return found


def polished(weight: Matrix, start: Matrix, gram: Matrix, kept: Kept, steps: int) -> Matrix:
    """Return values nearer to those of `restored`, by so many steps of conjugate gradients for all rows at once.

    `gram` is H, already damped; its diagonal is the preconditioner. The error of no row rises.
    """
    found = np.array(start, gram.dtype)
    diagonal = np.diagonal(gram)
    gradient = np.where(kept, (weight - found) @ gram, 0)
    direction = np.zeros_like(found)
    before = np.ones(len(found), np.float64)
    for step in range(steps):
        scaled = gradient / diagonal
        size = np.einsum("rd,rd->r", gradient, scaled, dtype=np.float64)
        direction = scaled if step == 0 else scaled + (size / before)[:, None].astype(gram.dtype) * direction
        moved = np.where(kept, direction @ gram, 0)
        curve = np.einsum("rd,rd->r", direction, moved, dtype=np.float64)
        length = np.where(curve > 0, size / np.where(curve > 0, curve, 1), 0)[:, None].astype(gram.dtype)
        found += length * direction
        gradient -= length * moved
        before = np.maximum(size, np.finfo(np.float64).tiny)
    return found
