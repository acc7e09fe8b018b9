"""How much the error of each weight of a layer moves the network's prediction, from inputs x and output gradients g.

With y = W x at each position p and g_p the gradient of a projection of the prediction by y (probed_network.py), an
error E = W - W' moves the projection by sum_p g_p^T E x_p. The expectation of its square over projections is what
rounding should lower. Three approximations of that matrix of all weights of a layer:

guided   GuidedQuant (arXiv 2505.07004, eq. 4 to 6): positions and rows are taken as independent. Row i has
         H_i = sum_p g_pi^2 x_p x_p^T; the rows are cut into consecutive groups, whose members share the mean of theirs:

             H_k = sum_p (mean over i in k of g_pi^2) x_p x_p^T

oac      OAC (arXiv 2405.15025): with the gradient of one sample by the weight itself, G = sum_p g_p x_p^T `[rows, d]`,
         rows are independent and share the sum of their matrices: H = sum over samples of G^T G. Positions of a sample
         are not independent here: where they pull a weight into opposite directions, they cancel.
yaqa     YAQA (arXiv 2505.22988, its sketch B): a Kronecker product of both sides, from one round of power iteration
         that starts at the identity: H_I = sum G^T G and H_O = sum G G^T `[rows, rows]`. The error is
         tr(H_O E H_I E^T); its scale does not matter to rounding.

Each call's share is divided by the mean squares of its inputs and of its gradients where `balance` is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..rounding.gram import Gram, Positions, Unfold

CurvatureForm = Literal["guided", "oac", "yaqa"]


def groups_of_rows(rows: int, most: int) -> int:
    """Return the number of equal groups that rows are cut into: the largest divisor that is at most `most`."""
    return max(k for k in range(1, min(rows, most) + 1) if rows % k == 0)


def at_positions(gradient: Floats, unfold: Unfold, chosen: Positions) -> Floats:
    """Return the gradient of a layer's output at these positions, `[positions, groups, rows of a group]`."""
    first, inner = chosen
    if unfold.kernel:
        rows = gradient.reshape(*gradient.shape[:2], -1)[first, :, inner]
    else:
        rows = gradient.reshape(len(gradient), -1, gradient.shape[-1])[first, inner]
    return np.ascontiguousarray(rows).reshape(len(first), unfold.groups, -1)


class GuidedGram:
    """H `[groups * shares, d, d]`: each group of a convolution has as many groups of rows."""

    def __init__(self, groups: int, shares: int, inputs: int) -> None:
        self._shares = shares
        self._gram = Gram(groups * shares, inputs)

    def add(self, columns: Floats, gradients: Floats) -> None:
        """Add inputs `[positions, groups, d]` with output gradients `[positions, groups, rows of a group]`."""
        count, groups, rows = gradients.shape
        power = np.square(gradients).reshape(count, groups, self._shares, rows // self._shares).mean(axis=3)
        weighted = np.sqrt(power)[..., None] * columns[:, :, None]
        self._gram.add(weighted.reshape(count, groups * self._shares, -1))

    def matrix(self) -> Floats:
        return self._gram.matrix()


class SampleGradients:
    """H_I `[groups, d, d]`, and with `sides` H_O `[groups, rows, rows]`, from gradients of samples by the weight."""

    def __init__(self, groups: int, rows: int, inputs: int, *, sides: bool) -> None:
        self._gram = Gram(groups, inputs)
        self._side = np.zeros((groups, rows, rows), np.float32) if sides else None

    def add(self, gradients: Floats) -> None:
        """Add the gradient of one sample, `[groups, rows of a group, d]`."""
        self._gram.add(np.ascontiguousarray(gradients.transpose(1, 0, 2)))
        if self._side is not None:
            self._side += gradients @ gradients.transpose(0, 2, 1)

    def matrix(self) -> Floats:
        return self._gram.matrix()

    def side(self) -> Floats | None:
        return self._side


def weight_gradient(x: Floats, gradient: Floats, unfold: Unfold, rows: Sequence[int]) -> Floats:
    """Return sum_p g_p x_p^T `[groups, rows of a group, d]` over all positions of these rows of a batch."""
    each = prod(unfold.positions(x.shape)[1:])
    chosen = (np.zeros(each, np.int64), np.arange(each))

    def of_one(row: int) -> Floats:
        columns = unfold.columns(x[row : row + 1], chosen)
        g = at_positions(gradient[row : row + 1], unfold, chosen)
        product: Floats = g.transpose(1, 2, 0) @ columns.transpose(1, 0, 2)
        return product

    first, *others = (of_one(row) for row in rows)
    for other in others:
        first += other
    return first
