"""Integer formats and their arithmetic: scale of a range, quantize, dequantize.

Affine:     q = clamp(round(x / s) + z, qmin, qmax),   x' = s (q - z)
Symmetric:  z = 0 and the grid is [-(2^(b-1) - 1), 2^(b-1) - 1], so that -x is as representable as x.

Every range is widened to contain 0, for both scale and zero point, because the zero padding of a convolution must be
represented exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats, Integers

# The scale of a tensor of zeros. A smaller one would make int32 biases overflow.
SMALLEST_SCALE = np.float32(1e-10)
_POINTS = 1 << 14  # vectors that are compared with a codebook at once


@dataclass(frozen=True)
class Format:
    """An integer number format: `Format(8)` is uint8 (asymmetric), `Format(8, signed=True, symmetric=True)` int8."""

    bits: int = 8
    signed: bool = False
    symmetric: bool = False

    @property
    def name(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def qmin(self) -> int:
        return int(self.symmetric) - (1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def dtype(self) -> np.dtype[np.int8] | np.dtype[np.uint8]:
        """Return the storage type: one byte for every width up to 8 bits."""
        return np.dtype(np.int8) if self.signed else np.dtype(np.uint8)


SomeRows = slice | npt.NDArray[np.int64]
"""Some of a weight's output channels."""


@dataclass(frozen=True, eq=False)
class RowFormats:
    """Signed symmetric formats, one for each output channel of a weight: `bits` int8 `[rows]`."""

    bits: npt.NDArray[np.int8]

    @property
    def qmin(self) -> Floats:
        return -self.qmax

    @property
    def qmax(self) -> Floats:
        return np.asarray((1 << (self.bits.astype(np.int64) - 1)) - 1, np.float32)

    @property
    def dtype(self) -> np.dtype[np.int8]:
        return np.dtype(np.int8)

    def __getitem__(self, rows: SomeRows) -> RowFormats:
        return RowFormats(self.bits[rows])


@dataclass(frozen=True, eq=False)
class Levels:
    """A codebook: the int8 integers of a weight, ascending, `[count]` for all of it or `[rows, count]`.

    A row with fewer levels repeats some. A value rounds to the nearest level, halfway to the lower one.
    """

    table: npt.NDArray[np.int8]

    @property
    def qmin(self) -> Floats:
        return self.table[..., 0].astype(np.float32)

    @property
    def qmax(self) -> Floats:
        return self.table[..., -1].astype(np.float32)

    @property
    def dtype(self) -> np.dtype[np.int8]:
        return np.dtype(np.int8)

    def __getitem__(self, rows: SomeRows) -> Levels:
        return self if self.table.ndim == 1 else Levels(self.table[rows])

    def nearest(self, steps: npt.NDArray[Any], axis: int | None) -> npt.NDArray[Any]:
        """Return the nearest levels of values in units of the scale, in their own type."""
        levels = self.table.astype(steps.dtype)
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        if levels.ndim == 1:
            return levels[np.searchsorted(middles, steps)]
        found = np.array(np.broadcast_to(along(levels[:, 0], axis, steps.ndim), steps.shape))
        for k, gap in enumerate(np.diff(levels).T):  # integers: the sum is exact
            found += (steps > along(middles[:, k], axis, steps.ndim)) * along(gap, axis, steps.ndim)
        return found


@dataclass(frozen=True, eq=False)
class Vectors:
    """A codebook of vectors: int8 `[count, size]` for all rows of a weight, `size` neighbours of a row at once."""

    table: npt.NDArray[np.int8]

    @property
    def qmin(self) -> Floats:
        return np.asarray(self.table.min(), np.float32)

    @property
    def qmax(self) -> Floats:
        return np.asarray(self.table.max(), np.float32)

    @property
    def dtype(self) -> np.dtype[np.int8]:
        return np.dtype(np.int8)

    def __getitem__(self, rows: SomeRows) -> Vectors:
        return self

    def nearest(self, steps: npt.NDArray[Any], axis: int | None) -> npt.NDArray[Any]:
        """Return the vectors nearest to those of the rows along `axis`, in units of the scale."""
        first = np.moveaxis(steps, axis or 0, 0)
        points = first.reshape(-1, self.table.shape[1])
        chosen = self.table.astype(steps.dtype)[nearest_vectors(points, self.table)]
        return np.ascontiguousarray(np.moveaxis(chosen.reshape(first.shape), 0, axis or 0))


def nearest_vectors(
    points: npt.NDArray[np.floating], centers: npt.NDArray[Any], weights: npt.NDArray[np.floating] | None = None
) -> npt.NDArray[np.int64]:
    """Return the index of the nearest of `centers` `[count, size]` to each point `[n, size]`.

    `weights` `[n, size]` are those of the squares of the differences.
    """
    centers = centers.astype(points.dtype)
    chosen = np.empty(len(points), np.int64)
    for start in range(0, len(points), _POINTS):
        x = points[start : start + _POINTS]
        h = np.ones_like(x) if weights is None else weights[start : start + _POINTS]
        # |x - c|^2 without |x|^2, which is the same for all centers
        chosen[start : start + _POINTS] = (h @ (centers**2).T - 2 * (h * x) @ centers.T).argmin(axis=1)
    return chosen


Grid = Format | RowFormats | Levels | Vectors
"""One format for all of a tensor, one for each of its rows, or a codebook."""


def round_on(steps: npt.NDArray[Any], grid: Grid, axis: int | None) -> npt.NDArray[Any]:
    """Return the nearest points of a grid, of the same shape, for values in units of the scale around zero."""
    if isinstance(grid, Levels | Vectors):
        return grid.nearest(steps, axis)
    rounded: npt.NDArray[Any] = np.clip(np.rint(steps), *ends(grid, axis, steps.ndim))
    return rounded


def widest_gap(grid: Grid, axis: int | None, rank: int) -> Floats:
    """Return the largest distance of two neighbours of the grid, shaped to broadcast along `axis`."""
    if not isinstance(grid, Levels):
        return np.ones((), np.float32)
    return along(np.diff(grid.table.astype(np.float32)).max(axis=-1), axis, rank)


def reach(grid: Grid) -> Floats:
    """Return the magnitude that the largest weight of a row is put on: `[]`, or `[rows]`."""
    top = np.asarray(grid.qmax, np.float32)
    return np.maximum(np.maximum(top, -grid.qmin), 1) if isinstance(grid, Levels | Vectors) else top


def ends(grid: Grid, axis: int | None, rank: int) -> tuple[Floats, Floats]:
    """Return the lowest and the highest integer, shaped to broadcast along `axis` of a tensor of that rank."""
    low, high = np.asarray(grid.qmin, np.float32), np.asarray(grid.qmax, np.float32)
    return along(low, axis, rank), along(high, axis, rank)


def of_rows(grid: Grid, rows: SomeRows) -> Grid:
    """Return the grid of some rows."""
    return grid if isinstance(grid, Format) else grid[rows]


UINT8 = Format(8)
INT8 = Format(8, signed=True, symmetric=True)


def scale_for_range(low: npt.ArrayLike, high: npt.ArrayLike, fmt: Format) -> tuple[Floats, Integers]:
    """Return scale (float32) and zero point (storage type) for values in [low, high], elementwise over arrays."""
    lo = np.minimum(np.asarray(low, np.float64), 0.0)
    hi = np.maximum(np.asarray(high, np.float64), 0.0)
    width = np.maximum(-lo, hi) / fmt.qmax if fmt.symmetric else (hi - lo) / (fmt.qmax - fmt.qmin)
    scale = np.maximum(width, SMALLEST_SCALE).astype(np.float32)
    zero = np.zeros_like(scale) if fmt.symmetric else np.clip(np.rint(fmt.qmin - lo / scale), fmt.qmin, fmt.qmax)
    return scale, zero.astype(fmt.dtype)


def along(values: npt.NDArray[Any], axis: int | None, rank: int) -> npt.NDArray[Any]:
    """Return per-channel values `[C]`, reshaped to broadcast along `axis` of a tensor of that rank."""
    if values.ndim == 0 or axis is None:
        return values
    return values.reshape([-1 if d == axis % rank else 1 for d in range(rank)])


def quantize(x: Floats, scale: Floats, zero_point: Integers, grid: Grid, axis: int | None = None) -> Integers:
    """Return integers of the same shape: rounded to the nearest (ties to even, like QuantizeLinear) and clamped."""
    s, z = along(scale, axis, x.ndim), along(zero_point, axis, x.ndim)
    if isinstance(grid, Levels | Vectors):  # of weights, whose zero point is 0
        levels: Integers = round_on(x / s, grid, axis).astype(grid.dtype)
        return levels
    q = np.rint(x / s) + z.astype(np.float32)
    integers: Integers = np.clip(q, *ends(grid, axis, x.ndim)).astype(grid.dtype)
    return integers


def dequantize(q: Integers, scale: Floats, zero_point: Integers, axis: int | None = None) -> Floats:
    """Return the float32 values of integers, of the same shape."""
    s, z = along(scale, axis, q.ndim), along(zero_point, axis, q.ndim)
    values: Floats = ((q.astype(np.float32) - z.astype(np.float32)) * s).astype(np.float32)
    return values
