"""Optimal Brain Surgeon for whole input channels of a layer: all rows lose the same columns, so they share one inverse.

Removing the columns P of a channel (one for each position of a kernel) from all rows W, at the least error, costs

    e_P = tr(W_P (G_PP)^-1 W_P^T)          W -= W_P (G_PP)^-1 G_P,:          G -= G_:,P (G_PP)^-1 G_P,:

with G the inverse of H over the columns that are left. (OBC, arXiv 2208.11580, removes weights; this is the same step
for a group of columns of all rows, as in ZipLM, arXiv 2302.04089.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from mezzotint.runtime.arrays import Doubles

from ..rounding.matrix import Matrix


def channel_order(weight: Matrix, inverse: Matrix, positions: int, depth: int) -> tuple[npt.NDArray[np.int64], Doubles]:
    """Return (the first `depth` channels to remove, the squared error that each one adds).

    `weight` is `[rows, channels * positions]`, `inverse` H^-1.
    """
    values, left = weight.astype(np.float64), inverse.astype(np.float64)
    channels = weight.shape[1] // positions
    columns = np.arange(channels * positions).reshape(channels, positions)
    open_ = np.ones(channels, bool)
    order, errors = np.empty(depth, np.int64), np.empty(depth)
    for step in range(depth):
        own = columns[open_]
        squares = left[own[:, :, None], own[:, None, :]]
        parts = values[:, own].transpose(1, 2, 0)  # [channels, positions, rows]
        costs = np.einsum("cpr,cpr->c", parts, np.linalg.solve(squares, parts))
        best = int(costs.argmin())
        chosen = own[best]
        order[step], errors[step] = np.flatnonzero(open_)[best], costs[best]
        share = np.linalg.solve(squares[best], left[chosen])
        values -= values[:, chosen] @ share
        left -= left[:, chosen] @ share
        open_[order[step]] = False
    return order, errors


def without_channels(weight: Matrix, gram: Matrix, positions: int, kept: npt.NDArray[np.int64]) -> Doubles:
    """Return the best weight `[rows, kept * positions]` on the channels that are kept; `gram` is H, damped."""
    wide = gram.astype(np.float64)
    columns = (kept[:, None] * positions + np.arange(positions)).reshape(-1)
    factor = cho_factor(wide[np.ix_(columns, columns)], lower=True)
    found: Doubles = cho_solve(factor, (weight.astype(np.float64) @ wide)[:, columns].T).T
    return found


def removals(errors: list[Doubles], share: float, channels: list[int], multiple: int) -> list[int]:
    """Return how many channels each site loses, if a heap over all sites takes the cheapest first.

    `errors` are relative to the outputs of their readers. What stays is a multiple of `multiple`, as kernels like it.
    """
    price = np.concatenate([np.maximum.accumulate(found) for found in errors])
    owner = np.repeat(np.arange(len(errors)), [len(found) for found in errors])
    taken = owner[np.argsort(price, kind="stable")[: round(share * sum(channels))]]
    counts = np.bincount(taken, minlength=len(errors))
    return [n - min(-(-(n - int(gone)) // multiple) * multiple, n) for gone, n in zip(counts, channels, strict=True)]
