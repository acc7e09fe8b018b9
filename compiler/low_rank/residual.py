"""One weight W `[rows, d]` as a residual R = W - L that is quantized, and L = up down of rank r that stays in float.

What the layer's outputs lose, over inputs X with H = X X^T, where the branch reads X and the residual reads X + noise:

    E(Q, L) = tr((W - Q - L) H (W - Q - L)^T) + noise |W - L|^2,        Q: R on its grid

`noise` is the summed square of the rounding errors of one input, s^2 / 12 for each column of X: what the branch takes
over is not multiplied by it (SVDQuant, arXiv 2411.05007, bounds the error by |X| |R| and takes the largest singular
values out of R for that reason). For a given Q the best L of rank r is, with M = H + noise I and
T = ((W - Q) H + noise W) M^-1, the weighted approximation of T:

    L = U U^T T,        U `[rows, r]`: the first eigenvectors of T M T^T

because the singular vectors on the left of T C, C C^T = M, are those eigenvectors. Without noise T = W - Q, and no
matrix is inverted. `alternated` begins with Q = 0 (the SVD of W), rounds R, fits L to what is left, and so on, until E
falls no more (SVDQuant's loop; LoftQ, arXiv 2310.08659). With Q = 0 and M = I this is the SVD of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve, eigh

from mezzotint.runtime.arrays import Floats

from ..errors import PassError
from ..rounding.matrix import Matrix

FitWeighting = Literal["output", "inputs", "none"]
Rounder = Callable[[Floats], Floats]
"""Returns a residual `[rows, d]` on its grid, as float32."""

GAIN = 1e-3  # an iteration that lowers the error by a smaller share is the last one


@dataclass(frozen=True, eq=False)
class Branch:
    """`up` `[rows, r]` and `down` `[r, d]`, whose product is taken out of a weight."""

    up: Floats
    down: Floats

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def product(self) -> Floats:
        """Return the part of the weight, `[rows, d]` float32, as the sum in float64 has it."""
        whole: Floats = (self.up.astype(np.float64) @ self.down.astype(np.float64)).astype(np.float32)
        return whole


@dataclass(frozen=True, eq=False)
class SplitWeight:
    """The branch of a weight (None: the weight alone was no worse), and E as a share of the outputs' power.

    `whole` is E without a branch, `weights` the first term of E alone. `iterations` is the number of fits.
    """

    branch: Branch | None
    error: float
    whole: float
    weights: float
    iterations: int


@dataclass(frozen=True, eq=False)
class LayerMetric:
    """H `[d, d]` and the noise of the inputs, as the fit of a branch sees them.

    `weighting` is what of H counts in the fit: all of it, its diagonal, or its mean diagonal. The error that decides
    when to stop is always that of the outputs.
    """

    gram: Matrix
    noise: float
    weighting: FitWeighting = "output"

    def error(self, left: Matrix, residual: Matrix) -> tuple[float, Matrix]:
        """Return (tr(left H left^T) + noise |residual|^2, left H)."""
        moved = left @ self.gram
        return self.weight_error(left, moved) + self.noise * float(np.vdot(residual, residual)), moved

    @staticmethod
    def weight_error(left: Matrix, moved: Matrix) -> float:
        """Return tr(left H left^T), with left H known."""
        return float(np.einsum("ij,ij->", left, moved, dtype=np.float64))

    def power(self, weight: Matrix) -> float:
        """Return the squared outputs of a weight, and never 0."""
        return max(self.error(weight, weight * 0)[0], 1e-30)


def alternated(
    weight: Floats, metric: LayerMetric, rank: int, rounder: Rounder, iterations: int, *, half: bool
) -> SplitWeight:
    """Return the split of a weight `[rows, d]` with the least E of at most so many iterations.

    `half`: the branch has the values of half precision, and the residual makes up for their rounding.
    """
    fit = _Fit(weight, metric, half)
    power = metric.power(weight)
    left = weight - rounder(weight)
    error, moved = metric.error(left, weight)
    whole = best = error
    alone = metric.weight_error(left, moved)
    branch, done = None, 0
    for found in fit.rounds(rank, rounder):
        done += 1
        if not found.error < best * (1 - GAIN):
            break
        branch, best, alone = found.branch, found.error, found.weights
        if done == iterations:
            break
    return SplitWeight(branch, best / power, whole / power, alone / power, done)


@dataclass(frozen=True, eq=False)
class _Round:
    branch: Branch
    error: float
    weights: float


class _Fit:
    """The fits of branches to one weight."""

    def __init__(self, weight: Floats, metric: LayerMetric, half: bool) -> None:
        self._weight, self._metric, self._half = weight, metric, half
        diagonal = np.diagonal(metric.gram).astype(np.float64)
        self._diagonal: Matrix | None = None
        if metric.weighting != "output":
            self._diagonal = diagonal if metric.weighting == "inputs" else np.full_like(diagonal, diagonal.mean())
        self._factor = None
        if self._diagonal is None and metric.noise > 0:
            regular = metric.gram.astype(np.float64)
            np.einsum("ii->i", regular)[...] += metric.noise
            try:
                self._factor = cho_factor(regular, lower=True, overwrite_a=True, check_finite=False)
            except np.linalg.LinAlgError as error:
                raise PassError(
                    "the products of a layer's inputs have no inverse", hint="choose another weighting"
                ) from error

    def rounds(self, rank: int, rounder: Rounder) -> Iterator[_Round]:
        """Yield fits: the first to the weight, each further one to what the rounding of the one before left."""
        weight, metric = self._weight, self._metric
        target: Matrix = weight
        moved = None  # target H
        while True:
            branch = self.fitted(target, moved, rank)
            residual = weight - branch.product
            left = residual - rounder(residual)
            error, product = metric.error(left, residual)
            yield _Round(branch, error, metric.weight_error(left, product))
            target = left + branch.product  # W - Q
            moved = product + branch.up @ (branch.down @ metric.gram)

    def fitted(self, target: Matrix, moved: Matrix | None, rank: int) -> Branch:
        """Return L of the module's docstring for `target` = W - Q, with `moved` = (W - Q) H where it is known."""
        weight, noise = self._weight, self._metric.noise
        if self._diagonal is not None:
            values = (target * self._diagonal + noise * weight) / np.maximum(self._diagonal + noise, 1e-30)
            scatter = (values * (self._diagonal + noise)) @ values.T
        else:
            pulled = target @ self._metric.gram if moved is None else moved
            if self._factor is None:
                values, scatter = target, pulled @ target.T
            else:
                pulled = pulled.astype(np.float64) + noise * weight
                values = cho_solve(self._factor, pulled.T, check_finite=False).T
                scatter = pulled @ values.T
        return self._projected(values, scatter, rank)

    def _projected(self, values: Matrix, scatter: Matrix, rank: int) -> Branch:
        rows = len(scatter)
        even = (scatter.astype(np.float64) + scatter.T) / 2
        _, vectors = eigh(even, subset_by_index=(rows - rank, rows - 1), overwrite_a=True)
        up = np.ascontiguousarray(vectors[:, ::-1])
        largest = np.take_along_axis(up, np.abs(up).argmax(axis=0)[None], axis=0)
        up *= np.where(largest < 0, -1, 1)  # an eigenvector has no sign: the same file everywhere needs one
        down = up.T @ values
        length = np.sqrt(np.linalg.norm(down, axis=1))  # both factors get the same length: halves are relative
        length = np.where(length > 0, length, 1)
        up, down = up * length, down / length[:, None]
        if self._half:
            up, down = up.astype(np.float16), down.astype(np.float16)
        return Branch(up.astype(np.float32), down.astype(np.float32))
