"""The inverses of many rows that lose their columns one by one, each row in an order of its own.

Without column p, the inverse of H over the columns that are left is G - g g^T / G_pp, where G is the inverse with p and
g its column p. The rows start from one G. A row keeps its matrix and the last few columns g / sqrt(G_pp) next to it: a
column of the present inverse is one of the matrix less what those say, and a product of matrices takes them in together
when there are PANEL of them. Columns that are gone leave the matrices now and then, which saves half of the work.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import get_blas_funcs

from .matrix import Matrix

PANEL = 32  # columns that are taken into the matrices at once
COMPACTIONS = 8  # how often columns that are gone leave the matrices
ROOM = 1 << 24  # bytes of matrices that are worked on at once: they stay in a cache
PRECISE = 512  # columns up to which obq and obs work in float64

Chosen = npt.NDArray[np.int64]


class DowndatedInverses:
    """One inverse for each of `rows`, from `inverse` `[d, d]`; the values of the rows `[rows, d]` change with it.

    Places are columns that are left: `columns` `[rows, places]` says which. `live` marks those that are not gone. All
    have the type of `inverse`. With `block`, columns go in blocks of that size, and `squares` has the diagonal blocks
    `[rows, blocks, b, b]`.
    """

    def __init__(self, values: Matrix, inverse: Matrix, block: int = 1) -> None:
        count, width = values.shape
        kind = inverse.dtype
        self.values = np.array(values, kind)
        self._matrices = np.repeat(inverse[None], count, axis=0)
        self._panel = np.empty((count, PANEL, width), kind)
        self._held = 0
        self._gone = 0
        self._every = max(width // COMPACTIONS, PANEL)
        self._rows = np.arange(count)
        self._gemm = get_blas_funcs("gemm", dtype=kind)
        self.block = block
        self.columns = np.tile(np.arange(width), (count, 1))
        self.live = np.ones((count, width), bool)
        pieces = np.arange(width).reshape(-1, block)
        self.squares = self._matrices[:, pieces[:, :, None], pieces[:, None, :]]

    @property
    def diagonal(self) -> Matrix:
        """The diagonal of every inverse `[rows, places]`, for a block of 1."""
        diagonal: Matrix = self.squares[:, :, 0, 0]
        return diagonal

    def remove(self, place: Chosen, amount: Matrix | None = None) -> None:
        """Remove one column of each row.

        `amount` `[rows]` is by how much the value falls there, all of it where that is None; the others make up for it.
        """
        rows, held = self._rows, self._held
        column: Matrix = self._matrices[rows, place]
        if held:
            known = self._panel[:, :held]
            column = column - np.matmul(known[rows, :, place][:, None], known)[:, 0]
        pivot = np.maximum(column[rows, place], np.finfo(np.float32).tiny)
        moved = self.values[rows, place] if amount is None else amount
        self.values -= (moved / pivot)[:, None] * column
        column /= np.sqrt(pivot)[:, None]
        self._panel[:, held] = column
        self._held += 1
        self.live[rows, place] = False
        pieces = column.reshape(len(rows), -1, self.block)
        self.squares -= pieces[..., :, None] * pieces[..., None, :]
        if self._held == PANEL:
            self._take_in()

    def compact(self) -> npt.NDArray[np.int64] | None:
        """Drop the places that are gone if there are enough of them, and return the blocks that are kept, else None.

        Every row must have lost as many columns.
        """
        self._gone += self.block
        if self._gone < self._every:
            return None
        self._gone = 0
        self._take_in()
        count = len(self._rows)
        kept = np.nonzero(self.live)[1].reshape(count, -1)
        every_row = self._rows[:, None]
        self.values, self.columns = self.values[every_row, kept], self.columns[every_row, kept]
        self._matrices = self._matrices[self._rows[:, None, None], kept[:, :, None], kept[:, None, :]]
        self._panel = np.empty((count, PANEL, kept.shape[1]), self._panel.dtype)
        self.live = np.ones(kept.shape, bool)
        blocks = kept[:, :: self.block] // self.block
        self.squares = self.squares[every_row, blocks]
        return blocks

    def _take_in(self) -> None:
        for matrix, panel in zip(self._matrices, self._panel, strict=True):
            known = panel[: self._held].T  # BLAS reads rows as columns
            self._gemm(-1.0, known, known, beta=1.0, c=matrix.T, trans_b=1, overwrite_c=1)
        self._held = 0


def at_once(inverse: Matrix) -> int:
    """Return how many rows are worked on together."""
    return max(ROOM // inverse.nbytes, 1)


def precise(matrix: Matrix) -> Matrix:
    """Return a matrix in float64, or in float32 where it has more than PRECISE columns."""
    return matrix.astype(np.float64 if matrix.shape[1] <= PRECISE else np.float32)
