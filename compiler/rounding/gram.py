"""Columns of a layer's input and their products H = sum x x^T, against which its weights are rounded.

With y = W x for every output position, rounding W to W' costs ||(W - W') X||^2 = tr((W - W') H (W - W')^T), so only
H has to be kept of the inputs: d^2 numbers for d inputs of an output, one such matrix for each group of a
convolution. A convolution's columns are its input unfolded (kernel, stride, padding, dilation). Positions are sampled
before they are unfolded, which bounds memory: neighbouring pixels are nearly equal, and H needs only several
columns for each input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.linalg.blas import get_blas_funcs

from mezzotint.runtime.arrays import Floats

from ..errors import PassError
from ..graph.nodes import is_op, name_of

Positions = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""(indices along the first dimension, flat indices of a position in the remaining dimensions), of one shape."""

MIRROR = 1024  # rows at once


@dataclass(frozen=True)
class Unfold:
    """The unfolding of a layer's input into columns `[positions, groups, d]`; a linear layer has no kernel."""

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1

    @staticmethod
    def of(node: ir.Node, weight_shape: Sequence[int]) -> Unfold:
        """Return the unfolding of a Conv, Gemm or MatMul whose weight has this shape. Raise PassError."""
        if not is_op(node, "Conv"):
            return Unfold()
        automatic = node.attributes.get("auto_pad")
        if automatic is not None and automatic.as_string() != "NOTSET":
            raise PassError(
                f"the padding of a convolution is {automatic.as_string()}, not numbers",
                where=node.name or name_of(node.outputs[0]),
                hint="run normalize first",
            )
        kernel = tuple(weight_shape[2:])
        rank = len(kernel)

        def numbers(name: str, default: int, size: int = rank) -> tuple[int, ...]:
            attribute = node.attributes.get(name)
            return (default,) * size if attribute is None else tuple(int(n) for n in attribute.as_ints())

        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        return Unfold(kernel, numbers("strides", 1), numbers("pads", 0, 2 * rank), numbers("dilations", 1), int(groups))

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the number of outputs along each dimension, without channels, for an input of this shape."""
        if not self.kernel:
            return tuple(shape[:-1])
        rank = len(self.kernel)
        reach = (d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True))
        padded = (n + self.pads[i] + self.pads[rank + i] for i, n in enumerate(shape[2:]))
        outputs = ((n - r) // s + 1 for n, r, s in zip(padded, reach, self.strides, strict=True))
        return (shape[0], *outputs)

    def columns(self, x: Floats, chosen: Positions) -> Floats:
        """Return the inputs of the outputs at these positions, `[positions, groups, d]`, ordered as in the weights."""
        first, inner = chosen
        sizes = self.positions(x.shape)
        where: tuple[npt.NDArray[Any], ...] = np.unravel_index(inner, sizes[1:]) if len(sizes) > 1 else ()
        if not self.kernel:
            return np.ascontiguousarray(x[(first, *where)])[:, None]
        rank = len(self.kernel)
        ends = [(self.pads[i], self.pads[rank + i]) for i in range(rank)]
        padded = np.pad(x, [(0, 0), (0, 0), *ends])
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
        steps = tuple(slice(None, None, s) for s in self.strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        places: tuple[Any, ...] = (first, slice(None), *where)
        patches = windows[(slice(None), slice(None), *steps, *taps)][places]
        return np.ascontiguousarray(patches).reshape(len(first), self.groups, -1)


def choose_positions(sizes: Sequence[int], limit: int, rng: np.random.Generator) -> Positions:
    """Return at most `limit` positions of `sizes`, as many for each index of the first dimension (the samples)."""
    count, each = sizes[0], prod(sizes[1:])
    samples = np.arange(count) if count <= limit else np.sort(rng.choice(count, limit, replace=False))
    share = min(each, max(limit // len(samples), 1))
    rows = [np.arange(each) if share == each else np.sort(rng.choice(each, share, replace=False)) for _ in samples]
    return np.repeat(samples, share), np.concatenate(rows)


@dataclass(frozen=True)
class Extent:
    """The range of a layer's inputs, with 0 in it, and the sum of the squared factors of their columns in H."""

    factors: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def rounding_noise(self, bits: int) -> float:
        """Return the expected squared rounding error of an input on one grid of 2^bits points, as H sums it."""
        step = (self.high - self.low) / (2**bits - 1)
        noise: float = self.factors * step**2 / 12
        return noise


class Gram:
    """H `[groups, d, d]` float32, summed over columns `[positions, groups, d]` as they come."""

    def __init__(self, groups: int, inputs: int) -> None:
        self.extent = Extent()
        self._matrix = np.zeros((groups, inputs, inputs), np.float32)
        self._syrk = get_blas_funcs("syrk", dtype=np.float32)

    def add(self, columns: Floats, factor: float = 1.0) -> None:
        """Add columns that are `factor` times the layer's inputs."""
        low, high = float(columns.min()) / factor, float(columns.max()) / factor
        before = self.extent
        self.extent = Extent(before.factors + len(columns) * factor**2, min(before.low, low), max(before.high, high))
        if len(self._matrix) > 1:  # many small ones
            turned = columns.transpose(1, 2, 0)
            self._matrix += turned @ turned.transpose(0, 2, 1)
            return
        # One triangle, in place: BLAS reads rows as columns, so it gets transposed views.
        self._syrk(1.0, columns[:, 0].T, beta=1.0, c=self._matrix[0].T, overwrite_c=1)

    def matrix(self) -> Floats:
        """Return H with both triangles. Call it after the last add()."""
        if len(self._matrix) == 1:
            mirror(self._matrix[0])
        return self._matrix


def mirror(matrix: npt.NDArray[np.floating]) -> None:
    """Copy the lower triangle into the upper one, in place."""
    for start in range(0, len(matrix), MIRROR):
        stop = min(start + MIRROR, len(matrix))
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
        corner = matrix[start:stop, start:stop]
        corner[...] = np.tril(corner) + np.tril(corner, -1).T
