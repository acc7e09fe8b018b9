"""Factors for each input channel of a layer: the value is divided by them, the weights are multiplied with them.

    layer(x, W)  =  layer(x / s, W s)         s > 0, one for each input channel

Here nodes divide x at run time (`divide_value`), which is always legal and costs a pass over the data.
compiler/rescaling/sites.py finds the values whose factors can move into their producers instead.

Zero padding stays exact: 0 / s is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats

from ..graph.nodes import Builder, Names, name_of, numpy_of, replace_use
from ..graph.ops import Layer

Factors = npt.NDArray[np.float64]
"""One number for each channel, `[C]`; positive where it divides or multiplies."""


def input_channels(layer: Layer) -> int:
    """The number of channels of the activation that a layer with a constant weight reads."""
    shape = _weight(layer).shape
    if layer.kind == "conv":
        return int(shape[1]) * _groups(layer)
    return int(shape[1 - _weight_axis(layer)])


def channel_axis(layer: Layer) -> int:
    """Which axis of a layer's activation counts channels: 1 for feature maps, the last one for tokens."""
    return 1 if layer.kind == "conv" else -1


def multiplied_weight(layer: Layer, factors: npt.NDArray[np.floating]) -> Floats:
    """A layer's weight with input channel c multiplied by factors[c], of the weight's shape.

    A convolution with groups has the channels of its groups one after another, each in the rows of its group.
    """
    weight = _weight(layer)
    s = np.asarray(factors, np.float64)
    if s.shape != (input_channels(layer),):
        raise ValueError(f"{layer.name} has {input_channels(layer)} input channels, not {s.shape}")
    if layer.kind == "conv":
        groups = _groups(layer)
        per_row = np.repeat(s.reshape(groups, -1), len(weight) // groups, axis=0)
        scaled = weight * per_row.reshape(*per_row.shape, *[1] * (weight.ndim - 2))
    else:
        scaled = weight * (s[None] if _weight_axis(layer) == 0 else s[:, None])
    result: Floats = scaled.astype(np.float32)
    return result


def multiply_weight(graph: ir.Graph, names: Names, layer: Layer, factors: npt.NDArray[np.floating]) -> None:
    """Give a layer a weight of its own whose input channels are multiplied by the factors `[C]`."""
    build = Builder(graph, names, layer.node)
    scaled = build.constant(f"{name_of(layer.weight)}_scaled", multiplied_weight(layer, factors))
    layer.node.replace_input_with(1, scaled)


def column_ranges(layer: Layer, rows: npt.NDArray[np.floating] | None = None) -> npt.NDArray[np.float64]:
    """The largest magnitude `[C]` of the weights that read each input channel, output channels multiplied by `rows`."""
    matrix = _magnitudes(layer)
    if rows is not None:
        matrix = matrix * rows.reshape(*matrix.shape[:2], 1)
    columns: npt.NDArray[np.float64] = matrix.max(axis=1).reshape(-1).astype(np.float64)
    return columns


def row_ranges(layer: Layer, columns: npt.NDArray[np.floating] | None = None) -> npt.NDArray[np.float64]:
    """The largest magnitude `[out]` of each output channel's weights, input channels multiplied by `columns`."""
    matrix = _magnitudes(layer)
    if columns is not None:
        matrix = matrix * columns.reshape(matrix.shape[0], 1, -1)
    rows: npt.NDArray[np.float64] = matrix.max(axis=2).reshape(-1).astype(np.float64)
    return rows


def row_lengths(layer: Layer) -> npt.NDArray[np.float64]:
    """The Euclidean length `[out]` of each output channel's weights."""
    weight = _weight(layer)
    out = _weight_axis(layer)
    squares = np.square(weight, dtype=np.float64).sum(axis=tuple(d for d in range(weight.ndim) if d != out))
    lengths: npt.NDArray[np.float64] = np.sqrt(squares)
    return lengths


def _magnitudes(layer: Layer) -> Floats:
    """|W| as `[groups, out of a group, in of a group]`, the largest of each kernel."""
    weight = np.abs(_weight(layer))
    if layer.kind == "conv":
        weight = weight.reshape(*weight.shape[:2], -1).max(axis=2)
        found: Floats = weight.reshape(_groups(layer), -1, weight.shape[1])
        return found
    return weight[None] if _weight_axis(layer) == 0 else weight.T[None]


def divide_value(
    graph: ir.Graph,
    names: Names,
    value: ir.Value,
    readers: Sequence[ir.Node],
    factors: npt.NDArray[np.floating],
    axis: int,
) -> ir.Value:
    """Insert a Mul by 1 / factors `[C]` along `axis` of a value, for these readers. Return its output."""
    if value.shape is None:
        raise ValueError(f"{name_of(value)} has no known rank")
    rank = len(value.shape)
    inverse = (1 / np.asarray(factors, np.float64)).astype(np.float32)
    shaped = inverse.reshape([-1 if d == axis % rank else 1 for d in range(rank)][axis % rank :])
    producer = value.producer()
    build = Builder(graph, names, readers[0]) if producer is None else Builder(graph, names, after=producer)
    stem = name_of(value)
    divided = build.op("Mul", [value, build.constant(f"{stem}_factors", shaped)], f"{stem}_divided", like=value)
    for node in readers:
        replace_use(node, value, divided)
    return divided


def _weight(layer: Layer) -> npt.NDArray[np.float32]:
    if layer.weight is None:
        raise ValueError(f"{layer.name} has no constant weight")
    return numpy_of(layer.weight)


def _weight_axis(layer: Layer) -> int:
    return layer.require_weight_axis()


def _groups(layer: Layer) -> int:
    return layer.node.attributes["group"].as_int() if "group" in layer.node.attributes else 1
