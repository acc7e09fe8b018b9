"""Quantizers of weights: symmetric, one scale for each output channel, or the same one for all of them.

minmax  the largest magnitude of the channel
mse     the share of it, in 21 steps from 1 to 0.6, with the least squared error of rounding and clipping together (the
        shrink search that Q-Diffusion and PTQD inherit from BRECQ, with p = 2)

A symmetric grid of 1 bit has the point 0 alone. Weights of 1 bit wait for their levels (choose_levels) with the scale
that puts the largest magnitude of a channel on 127.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.formats import INT8, Format, dequantize, quantize, scale_for_range
from ..core.program import Quantizer
from ..graph.nodes import numpy_of
from ..graph.ops import Layer
from ..graph.require import required

WeightMethod = Literal["minmax", "mse"]
CACHE_BYTES = 1 << 17  # of the rows that are searched together: their steps stay in the processor's cache


def weight_format(bits: int) -> Format:
    """Return the format of weights of that many bits, 1 to 8."""
    return INT8 if bits == 8 else Format(bits, signed=True, symmetric=True)


def weight_quantizer(
    layer: Layer, fmt: Format, method: WeightMethod, by: str, *, per_channel: bool = True
) -> Quantizer:
    """Return the quantizer of a layer's weight along its output channels; `by` is the name of the pass.

    Without `per_channel` all channels have the scale of the whole weight. It is still written once for each of them:
    the form of the file, and so its kernels, are the same.
    """
    axis = required(layer.weight_axis, "the output axis of the weight", layer.node)
    weight = np.moveaxis(numpy_of(required(layer.weight, "the weight", layer.node)), axis, 0)
    rows = weight.reshape(len(weight) if per_channel else 1, -1)
    limit = np.broadcast_to(row_limits(rows, fmt, method), len(weight))
    return _symmetric(limit, fmt, by, axis)


def rows_quantizer(rows: npt.NDArray[np.float32], fmt: Format, method: WeightMethod, by: str, axis: int) -> Quantizer:
    """Return the quantizer of a weight whose rows are given, `[outputs, inputs]`; `axis` is that of its outputs."""
    return _symmetric(row_limits(rows, fmt, method), fmt, by, axis)


def _symmetric(limit: npt.NDArray[np.float32], fmt: Format, by: str, axis: int) -> Quantizer:
    scale, zero = scale_for_range(-limit, limit, fmt if fmt.bits > 1 else INT8)
    return Quantizer(fmt, scale, zero, by, axis=axis)


def row_limits(rows: npt.NDArray[np.float32], fmt: Format, method: WeightMethod) -> npt.NDArray[np.float32]:
    """Return the magnitude `[rows]` that each row of `[rows, inputs]` is cut off at: its grid ends there."""
    limit: npt.NDArray[np.float32] = np.abs(rows).max(axis=1)
    return limit * _best_shrinks(rows, limit, fmt) if method == "mse" and fmt.bits > 1 else limit


def rounded_weight(weight: npt.NDArray[np.float32], quantizer: Quantizer) -> Floats:
    """Return a weight rounded to the nearest grid points of its quantizer, in float."""
    q = quantize(weight, quantizer.scale, quantizer.zero_point, quantizer.grid, quantizer.axis)
    return dequantize(q, quantizer.scale, quantizer.zero_point, quantizer.axis)


def _best_shrinks(
    rows: npt.NDArray[np.float32], limit: npt.NDArray[np.float32], fmt: Format
) -> npt.NDArray[np.float32]:
    """Return, for each row, the share of its largest magnitude with the least error of rounding and clipping."""
    best = np.ones(len(rows), np.float32)
    error = np.full(len(rows), np.inf)
    together = max(CACHE_BYTES // max(rows[:1].nbytes, 1), 1)
    for start in range(0, len(rows), together):
        part = slice(start, start + together)
        some = rows[part]
        grid, left = np.empty_like(some), np.empty_like(some)
        for shrink in np.linspace(1.0, 0.6, 21):
            scale: Floats = np.maximum(limit[part] * shrink / fmt.qmax, 1e-30).astype(np.float32)[:, None]
            np.rint(np.divide(some, scale, out=grid), out=grid)
            np.multiply(np.clip(grid, fmt.qmin, fmt.qmax, out=grid), scale, out=grid)
            np.subtract(grid, some, out=left)
            loss = np.einsum("ij,ij->i", left, left)
            better = loss < error[part]
            best[part][better], error[part][better] = shrink, loss[better]
    return best
