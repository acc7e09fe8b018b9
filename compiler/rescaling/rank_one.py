"""Signs with two vectors: the magnitudes of a weight as a product of one number for each output and one for each input.

    W is about sign(W) * (a b^T),        min over a, b of  sum_ij (|W_ij| - a_i b_j)^2

Source: OneBit (arXiv 2402.11295), whose SVID takes a and b from the largest singular value of |W|. Of a matrix without
negative numbers both are not negative, and the power iteration finds them: far fewer products than a whole SVD.

Layers that read one value share b, so that their rows are one matrix. For convolutions b_j belongs to an input channel,
and |W_ij| is its mean over the places of the kernel. Each group of a convolution has a problem of its own.
"""

from __future__ import annotations

import numpy as np

from mezzotint.runtime.arrays import Doubles

from .scaling import Factors
from .smoothing import GroupedWeight

MOST_PRODUCTS = 500
CLOSE = 1e-10
SMALLEST_FACTOR = 1e-5  # of the largest number of b: an input without weights would have 0


def rank_one(matrix: Doubles) -> tuple[Doubles, Doubles]:
    """Return a `[rows]` and b `[columns]`, |b| = 1, with the least sum of (matrix - a b^T)^2; no number is negative."""
    b = np.full(matrix.shape[1], matrix.shape[1] ** -0.5)
    for _ in range(MOST_PRODUCTS):
        new = matrix.T @ (matrix @ b)
        length = float(np.linalg.norm(new))
        if not length:
            break
        new /= length
        moved = float(np.abs(new - b).max())
        b = new
        if moved < CLOSE:
            break
    return matrix @ b, b


def input_vector(weights: list[GroupedWeight]) -> Factors:
    """Return b `[C]` of the layers that read one value, with the geometric mean 1 in each group, and never 0.

    Layers with different groups share no matrix: all of b is 1.
    """
    groups = {len(weight.array) for weight in weights}
    if len(groups) > 1:
        return np.ones(weights[0].channels)
    found = []
    for group in range(groups.pop()):
        means = [np.abs(weight.array[group]).mean(axis=2, dtype=np.float64) for weight in weights]
        _, b = rank_one(np.concatenate(means))
        b = np.maximum(b, SMALLEST_FACTOR * max(float(b.max()), 1e-30))
        found.append(b / np.exp(np.mean(np.log(b))))
    return np.concatenate(found)
