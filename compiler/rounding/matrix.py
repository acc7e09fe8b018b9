"""Rounding one weight matrix against its inputs: integers q for W `[rows, d]`, H = X X^T and a scale for each row.

All methods lower E(q) = tr((W - s q) H (W - s q)^T), whose rows are independent; q is a point of its row's grid, which
may be a codebook. Where a formula says rint, the nearest point of the grid is meant.

nearest   rint(w / s): the optimum if H is diagonal.
gptq      (arXiv 2210.17323) column after column; later columns compensate the error of each. With
          U^T U = H^-1, U upper triangular, and e = (w_i - s q_i) / U_ii:  w_j -= e U_ij for all j > i. Columns with
          much input go first (`order`), while many columns are left to compensate. Updates go to a block of
          columns at once, to the rest when the block is done. It is computed without the inverse: with
          R = U^-1, H = R R^T, and the final errors E = w - s q, column j has to round
          w_j + (sum over i < j of E_i R_ij) / R_jj, the nearest plane of a lattice (arXiv 2507.18553).
gptaq     (arXiv 2504.02692) gptq that also compensates the error of the quantized inputs X against the float inputs
          X_f: min ||W X_f - W' X||^2, with D = (X_f - X) X^T. The paper adds, column by column, the part of
          W D that later columns can carry; here the least squares target W + alpha W D H^-1 is computed at once, which
          needs W D `[rows, d]` in place of D `[d, d]` and of a second matrix of that size. `shifted_target` does it.
comq      (arXiv 2403.07134) coordinate descent without an inverse: q_i = rint((w_i + (r_i / H_ii)) / s), where
          r = (W - s q) H without column i's own part; several sweeps. Columns are visited by |x_i| mean |w_i|, largest
          first; the paper orders them for each row on its own, which would undo the blocks.
obq       in compiler/rounding/exact.py; gptq of vectors in compiler/rounding/vectors.py.

Weights outside a mask `kept` `[rows, d]` were pruned: gptq, comq and obq give them q = 0; the others make up for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve
from scipy.linalg.blas import get_blas_funcs
from scipy.linalg.lapack import get_lapack_funcs

from mezzotint.runtime.arrays import Floats

from ..core.formats import Grid, round_on
from ..errors import PassError

Matrix = npt.NDArray[np.floating]
ColumnOrder = npt.NDArray[np.int64]
Kept = npt.NDArray[np.bool_]
LARGEST_DAMP = 1.0
FIRST_RAISE = 1e-4


class Root:
    """R `[d, d]`, upper triangular, R R^T = H + damp mean(diag H) I with rows and columns in `order`, and U = R^-1.

    One of both is held, as LAPACK has it: with rows and columns reversed. The other one takes its place when it is
    asked for.
    """

    def __init__(self, factor: Matrix, order: ColumnOrder, damp: float) -> None:
        self.order, self.damp = order, damp
        self._lower, self._is_inverse = factor, False

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._lower.dtype

    @property
    def upper(self) -> Matrix:
        """U, with U^T U the inverse of H."""
        return self._held(inverse=True)[::-1, ::-1]

    @property
    def factor(self) -> Matrix:
        """R."""
        return self._held(inverse=False)[::-1, ::-1]

    def solved(self, rows: Matrix) -> Matrix:
        """Return rows H^-1 `[rows, d]` for rows and columns in `order`."""
        lower = self._held(inverse=False)
        found: Matrix = cho_solve((lower, True), rows[:, ::-1].T, check_finite=False).T[:, ::-1]
        return found

    def _held(self, *, inverse: bool) -> Matrix:
        if inverse != self._is_inverse:
            trtri = get_lapack_funcs("trtri", dtype=self._lower.dtype)
            self._lower, failed = trtri(self._lower, lower=1, overwrite_c=1)
            if failed:
                raise PassError("the products of a layer's inputs have no inverse", hint="raise round_weights.damp")
            self._is_inverse = inverse
        return self._lower


def check_gram(gram: Matrix, where: str) -> None:
    """Refuse inputs that are not finite; an input that is always 0 gets a diagonal of its own, in place."""
    diagonal = np.diagonal(gram)
    if not np.isfinite(diagonal).all():
        raise PassError("the inputs of a layer are not finite", where=where, hint="look at the passes before this one")
    dead = np.flatnonzero(diagonal <= 0)
    alive = float(diagonal.mean(dtype=np.float64))
    gram[dead, dead] = alive if alive > 0 else 1.0


def input_order(gram: Matrix, sort: bool) -> ColumnOrder:
    """Columns with the largest inputs first, or as they are."""
    diagonal = np.diagonal(gram)
    return np.argsort(-diagonal, kind="stable") if sort else np.arange(len(diagonal))


def inverse_root(gram: Matrix, order: ColumnOrder, damp: float, where: str) -> Root:
    """The factor of the damped inverse, with one matrix of working memory. Raises PassError.

    With P the reversal and L L^T = P H P, R = P L P is upper triangular and H = R R^T; so U = R^-1 = P L^-1 P, and
    the inverse itself is never made. Where the factorization fails the damping is raised tenfold.
    """
    potrf = get_lapack_funcs("potrf", dtype=gram.dtype)
    mean = float(np.diagonal(gram).mean(dtype=np.float64))
    turned = order[::-1]
    work = np.empty_like(gram)
    while True:
        for i, row in enumerate(turned):
            np.take(gram[row], turned, out=work[i])
        np.einsum("ii->i", work)[...] += damp * mean
        factor, failed = potrf(work.T, lower=1, clean=1, overwrite_a=1)
        if not failed and np.isfinite(1 / np.diagonal(factor)).all():
            return Root(factor, order, damp)
        damp = max(10 * damp, FIRST_RAISE)
        if damp > LARGEST_DAMP:
            raise PassError(
                "the products of a layer's inputs have no inverse, however much they are damped",
                where=where,
                hint="leave the layer out (round_weights.layers), or round with comq",
            )


def nearest(weight: Matrix, scale: Floats, grid: Grid) -> Floats:
    """Integers `[rows, d]`, as float32."""
    rounded: Floats = round_on(weight / scale[:, None], grid, 0).astype(np.float32)
    return rounded


def gptq(weight: Matrix, root: Root, scale: Floats, grid: Grid, *, block: int, kept: Kept | None = None) -> Floats:
    """Integers `[rows, d]`, as float32."""
    held = None if kept is None else np.ascontiguousarray(kept.T[root.order])
    factor = root.factor
    turned = np.ascontiguousarray(weight.T[root.order], dtype=factor.dtype)  # a column of weights lies together
    passed = np.zeros_like(turned)  # what the columns before have to be made up for
    integers = np.empty(turned.shape, np.float32)
    step = scale.astype(turned.dtype)
    for start in range(0, len(turned), block):
        stop = min(start + block, len(turned))
        rows = np.ascontiguousarray(factor[start:stop, start:])
        errors = np.empty((stop - start, turned.shape[1]), turned.dtype)
        for i in range(stop - start):
            column = turned[start + i] + passed[start + i] / rows[i, i]
            rounded = round_on(column / step, grid, 0)
            if held is not None:
                rounded *= held[start + i]
            integers[start + i] = rounded
            errors[i] = turned[start + i] - step * rounded
            passed[start + i + 1 : stop] += rows[i, i + 1 : stop - start, None] * errors[i]
        if stop < len(turned):
            passed[stop:] += rows[:, stop - start :].T @ errors
    return in_place_of(integers, root.order)


def shifted_target(weight: Matrix, shift: Matrix, root: Root, alpha: float) -> Matrix:
    """W + alpha (W D) H^-1 `[rows, d]`, from shift = W D `[rows, d]`."""
    kind = root.dtype
    target = np.array(weight, dtype=kind)
    target[:, root.order] += alpha * root.solved(shift[:, root.order].astype(kind))
    return target


def comq(
    weight: Matrix,
    gram: Matrix,
    scale: Floats,
    grid: Grid,
    *,
    sweeps: int,
    block: int,
    kept: Kept | None = None,
    sort: bool = True,
) -> Floats:
    """Integers `[rows, d]`, as float32. From the second sweep on no row gets worse. Without `sort` columns stay."""
    loud = np.sqrt(np.diagonal(gram)) * np.abs(weight).mean(axis=0)
    order = np.argsort(-loud, kind="stable") if sort else np.arange(len(loud))
    wanted = np.ascontiguousarray(weight.T[order], dtype=gram.dtype)
    held = None if kept is None else kept.T[order]
    step = scale.astype(gram.dtype)
    now = wanted.copy()
    integers = np.empty(wanted.shape, np.float32)
    residual = np.zeros_like(wanted)  # H (W - s q)^T, in that order
    for _ in range(sweeps):
        for start in range(0, len(wanted), block):
            part = slice(start, min(start + block, len(wanted)))
            columns = np.ascontiguousarray(gram[order[part]][:, order])
            moved = np.empty((part.stop - start, wanted.shape[1]), gram.dtype)
            for i in range(part.stop - start):
                j = start + i
                optimum = now[j] + residual[j] / columns[i, j]
                integers[j] = round_on(optimum / step, grid, 0)
                if held is not None:
                    integers[j] *= held[j]
                value = step * integers[j].astype(gram.dtype)
                moved[i] = value - now[j]
                now[j] = value
                residual[part] -= columns[i, part, None] * moved[i]
            residual[:start] -= columns[:, :start].T @ moved
            residual[part.stop :] -= columns[:, part.stop :].T @ moved
    return in_place_of(integers, order)


def row_errors(difference: Matrix, gram: Matrix) -> npt.NDArray[np.float64]:
    """Return E H E^T of each row of E = W - W' `[rows, d]`.

    With H = L + L^T - D, L its lower triangle and D its diagonal, that is 2 E L E^T - E D E^T: the product with a
    triangle takes half the time of that with all of H.
    """
    trmm = get_blas_funcs("trmm", dtype=gram.dtype)
    turned = np.array(difference.T, gram.dtype, order="F")  # BLAS reads columns: E^T, with L^T in front
    moved = trmm(2.0, gram.T, turned, lower=0, overwrite_b=1).T
    moved -= difference * np.diagonal(gram)
    errors: npt.NDArray[np.float64] = np.einsum("ij,ij->i", moved, difference, dtype=np.float64)
    return errors


def in_place_of(integers: Floats, order: ColumnOrder) -> Floats:
    """Return `[d, rows]` in an order as `[rows, d]` in the weights' own."""
    placed = np.empty_like(integers)
    placed[order] = integers
    return np.ascontiguousarray(placed.T)
