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
from scipy.linalg import cholesky, eigh, solve_triangular

from mezzotint.runtime.arrays import Floats

from ..errors import PassError
from ..rounding.matrix import Matrix, row_errors

FitWeighting = Literal["output", "inputs", "none"]
Rounder = Callable[[Floats], Floats]
"""Returns a residual `[rows, d]` on its grid, as float32."""

CHECKED_ROWS = 512
SMALLEST_NOISE = 1e-6  # of the mean diagonal of H, where M needs an inverse
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

    def error(self, left: Matrix, residual: Matrix, moved: Matrix | None = None) -> tuple[float, float]:
        """Return (tr(left H left^T) + noise |residual|^2, the first term), with `moved` = left H where it is known."""
        if moved is None:
            alone = float(row_errors(left, self.gram).sum())
        else:
            alone = float(np.einsum("ij,ij->", left, moved, dtype=np.float64))
        return alone + self.noise * float(np.vdot(residual, residual)), alone

    def power(self, weight: Matrix) -> float:
        """Return the squared outputs of a weight, and never 0."""
        return max(float(row_errors(weight, self.gram).sum()), 1e-30)


def alternated(
    weight: Floats, metric: LayerMetric, rank: int, rounder: Rounder, iterations: int, *, half: bool
) -> SplitWeight:
    """Return the split of a weight `[rows, d]` with the least E of at most so many iterations.

    `half`: the branch has the values of half precision, and the residual makes up for their rounding. Errors of layers
    with more than CHECKED_ROWS outputs are those of so many of them, spread evenly, unless the fit needs all.
    """
    fit = _Fit(weight, metric, half)
    checked = fit.checked
    power = metric.power(weight[checked])
    left = weight - rounder(weight)
    whole, alone = metric.error(left[checked], weight[checked])
    best = whole
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
    """The fits of branches to one weight. `checked` are the rows whose errors count."""

    def __init__(self, weight: Floats, metric: LayerMetric, half: bool) -> None:
        self._weight, self._metric, self._half, self._noise = weight, metric, half, metric.noise
        diagonal = np.diagonal(metric.gram).astype(np.float64)
        self._diagonal: Matrix | float | None = None
        if metric.weighting != "output":
            inputs = metric.weighting == "inputs"
            self._diagonal = diagonal.astype(np.float32) if inputs else max(float(diagonal.mean()), 1e-30)
        self.checked = slice(None, None, 1 if self._diagonal is None else -(-len(weight) // CHECKED_ROWS))
        self._wide = len(weight) > len(diagonal)
        self._lower: Matrix | None = None  # C C^T = M, where the fit needs it
        if self._diagonal is None and (self._noise > 0 or self._wide):
            self._noise = max(self._noise, SMALLEST_NOISE * float(diagonal.mean()))
            regular = metric.gram.astype(np.float64)
            np.einsum("ii->i", regular)[...] += self._noise
            try:
                self._lower = cholesky(regular, lower=True, overwrite_a=True, check_finite=False)
            except np.linalg.LinAlgError as error:
                hint = "choose the weighting inputs"
                raise PassError("the products of a layer's inputs have no inverse", hint=hint) from error

    def rounds(self, rank: int, rounder: Rounder) -> Iterator[_Round]:
        """Yield fits: the first to the weight, each further one to what the rounding of the one before left."""
        weight, metric = self._weight, self._metric
        target: Matrix = weight
        moved = None  # target H
        while True:
            branch = self.fitted(target, moved, rank)
            taken = branch.product
            residual = weight - taken
            left = residual - rounder(residual)
            product = left @ metric.gram if self._diagonal is None else None
            yield _Round(branch, *metric.error(left[self.checked], residual[self.checked], product))
            target = left + taken  # W - Q
            if product is not None:
                moved = product + branch.up @ (branch.down @ metric.gram)

    def fitted(self, target: Matrix, moved: Matrix | None, rank: int) -> Branch:
        """Return L of the module's docstring for `target` = W - Q, with `moved` = (W - Q) H where it is known.

        A weight with more outputs than inputs is projected on the right, L = T C V V^T C^-1: the smaller eigenproblem.
        """
        weight, noise = self._weight, self._noise
        if self._diagonal is not None:
            return self._by_diagonal(target, self._diagonal, rank)
        pulled = target @ self._metric.gram if moved is None else moved
        if self._lower is None:
            return self._left(target, pulled @ target.T, rank)
        lower, pulled = self._lower, pulled.astype(np.float64) + noise * weight
        half_way = solve_triangular(lower, pulled.T, lower=True, check_finite=False)  # (T C)^T

        def back(rows: Matrix) -> Matrix:
            solved: Matrix = solve_triangular(lower, rows.T, lower=True, trans="T", check_finite=False).T
            return solved

        if self._wide:
            return self._right(half_way.T, back, rank)
        vectors = _first_vectors(half_way.T @ half_way, rank)
        return self._branch(vectors, back((half_way @ vectors).T))

    def _by_diagonal(self, target: Matrix, diagonal: Matrix | float, rank: int) -> Branch:
        """Return L for an H that is diagonal, or a multiple of the unit matrix, in single precision."""
        if isinstance(diagonal, np.ndarray):
            sums = np.maximum(diagonal + self._noise, 1e-30)
            root: Matrix | float = np.sqrt(sums)
            values = target * (diagonal / sums) + self._weight * (self._noise / sums)
        else:
            root, share = 1.0, diagonal / (diagonal + self._noise)  # one factor for all inputs turns no vector
            values = target * share + self._weight * (1 - share)
        scaled = values * root
        if self._wide:
            return self._right(scaled, lambda rows: rows / root, rank)
        return self._left(values, scaled @ scaled.T, rank)

    def _left(self, values: Matrix, scatter: Matrix, rank: int) -> Branch:
        """Return U U^T T for `values` = T and `scatter` = T M T^T."""
        vectors = _first_vectors(scatter, rank)
        return self._branch(vectors, vectors.T @ values)

    def _right(self, scaled: Matrix, back: Callable[[Matrix], Matrix], rank: int) -> Branch:
        """Return T C V V^T C^-1 for `scaled` = T C; `back` multiplies rows by C^-1."""
        vectors = _first_vectors(scaled.T @ scaled, rank)
        return self._branch(scaled @ vectors, back(vectors.T))

    def _branch(self, up: Matrix, down: Matrix) -> Branch:
        """Return the branch with columns and rows of equal length, of one sign, and of half precision if wanted."""
        lengths = np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1)
        ratio = np.sqrt(np.maximum(lengths[1], 1e-30) / np.maximum(lengths[0], 1e-30))
        largest = np.take_along_axis(up, np.abs(up).argmax(axis=0)[None], axis=0)[0]
        ratio *= np.where(largest < 0, -1, 1)  # an eigenvector has no sign: the same file everywhere needs one
        up, down = up * ratio, down / ratio[:, None]
        if self._half:
            up, down = up.astype(np.float16), down.astype(np.float16)
        return Branch(up.astype(np.float32), down.astype(np.float32))


def _first_vectors(scatter: Matrix, rank: int) -> Matrix:
    """Return the eigenvectors `[n, rank]` of a symmetric matrix with the largest eigenvalues, the first in front."""
    size = len(scatter)
    even = (scatter.astype(np.float64) + scatter.T) / 2
    _, vectors = eigh(even, subset_by_index=(size - rank, size - 1), overwrite_a=True, check_finite=False)
    first: Matrix = np.ascontiguousarray(vectors[:, ::-1])
    return first
