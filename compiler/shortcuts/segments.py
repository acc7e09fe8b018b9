"""Layers that read parts joined along their input channels, and how to give each part a grid of its own.

    layer(Concat(a, b), W, bias)  =  layer(a, W_a, bias) + layer(b, W_b)                       split_layer
                                  =  layer(Concat(a / f, b / g), [f W_a, g W_b], bias)         divide_channels

W_a and W_b are the columns of W that read a and b. The layers are found in the graph: between the Concat and the layer
there may be nodes that only move data; then a Split behind them makes the parts, else the layers read what was joined.
Other readers of the Concat keep it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats

from ..graph.nodes import Builder, Names, is_constant, is_op, known_ints, name_of, numpy_of, replace_value
from ..graph.ops import Layer, is_mover, layers
from ..graph.require import producer, shape_of
from ..graph.scopes import scope_of, within
from ..rescaling.refusal import Refusal
from ..rescaling.scaling import channel_axis, divide_value, input_channels, multiply_weight

Dim = int | ir.SymbolicDim


@dataclass(frozen=True, eq=False)
class Joined:
    """A layer whose input channels are what `concat` joins, parts of `sizes` channels one behind the other."""

    layer: Layer
    concat: ir.Node
    sizes: tuple[int, ...]

    @property
    def parts(self) -> tuple[ir.Value, ...]:
        """Return the current inputs of the Concat: a layer that made a part may have been split since."""
        return tuple(v for v in self.concat.inputs if v is not None)

    @property
    def moved(self) -> bool:
        """Return whether nodes between the Concat and the layer move the data."""
        return self.layer.activations[0] is not self.concat.outputs[0]

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def ends(self) -> list[tuple[int, int]]:
        """(first, behind the last) channel of each part."""
        behind = [int(n) for n in np.cumsum(self.sizes)]
        return list(zip([0, *behind[:-1]], behind, strict=True))

    def columns(self, part: int, weight: npt.NDArray[np.float32]) -> Floats:
        """Return the columns of the layer's weight, or of an array of its shape, that multiply a part."""
        first, behind = self.ends[part]
        layer = self.layer
        if layer.kind == "conv" or layer.weight_axis == 0:
            return np.ascontiguousarray(weight[:, first:behind])
        return np.ascontiguousarray(weight[first:behind])


@dataclass(frozen=True, eq=False)
class Pieces:
    """The nodes that split_layer wrote: one layer for each of `parts`, which compute `partial`, and their sum."""

    parts: tuple[ir.Value, ...]
    partial: tuple[ir.Value, ...]
    total: ir.Value


def find_joined(graph: ir.Graph, timely: Collection[ir.Value] = ()) -> tuple[list[Joined], dict[str, str]]:
    """Layers with a constant weight that read a Concat, and, by name, why others that do cannot be taken apart.

    `timely` values depend on the timestep alone: layers that read them become tables and are skipped.
    """
    found: list[Joined] = []
    reasons: dict[str, str] = {}
    for layer in layers(graph):
        x = layer.activations[0]
        if layer.weight is None or x in timely:
            continue
        concat, axis = _concat_above(x, None if x.shape is None else channel_axis(layer) % len(x.shape))
        if concat is None or len(concat.inputs) < 2:
            continue
        joined = _joined(layer, concat, axis)
        if isinstance(joined, Joined):
            found.append(joined)
        else:
            reasons[layer.name] = joined.reason
    return found, reasons


def split_layer(graph: ir.Graph, names: Names, joined: Joined) -> Pieces:
    """Write one layer for each part. Their sum replaces the output of the layer.

    The bias stays with the first of them, be it constant or of the timestep. The sum is a Sum, not an Add: it joins no
    two feature maps but the pieces of one (compiler/core/islands.py looks through one addition).
    """
    layer = joined.layer
    node, old = layer.node, layer.output
    last = layer.bias_add or node
    build = Builder(graph, names, last)
    weight = numpy_of(layer.require_weight())
    parts = _split(graph, build, joined, last) if joined.moved else joined.parts
    partial = []
    for i, part in enumerate(parts):
        own = build.constant(f"{name_of(layer.weight)}_part_{i}", joined.columns(i, weight))
        out = build.op(
            node.op_type,
            [part, own, *(node.inputs[2:] if i == 0 else ())],
            f"{name_of(node.outputs[0])}_part_{i}",
            like=node.outputs[0],
            attributes={name: a.value for name, a in node.attributes.items()},
            name=names.unique(f"{layer.name}_part_{i}"),
        )
        producer(out).metadata_props.update(node.metadata_props)
        if i == 0 and layer.bias_add is not None:
            out = build.op("Add", [out, layer.bias], f"{name_of(old)}_biased", like=old)
        partial.append(out)
    total = build.op("Sum", partial, f"{name_of(old)}_sum", like=old)
    replace_value(old, total)
    graph.remove(last, safe=True)
    if last is not node:
        graph.remove(node, safe=True)
    return Pieces(tuple(parts), tuple(partial), total)


def divide_channels(graph: ir.Graph, names: Names, joined: Joined, factors: Sequence[float]) -> None:
    """Divide each part, or each channel, by its factor in front of the layer, and multiply the columns of the weight
    that read it."""
    layer = joined.layer
    each = np.asarray(factors, np.float64)
    if len(each) == len(joined.sizes):
        each = np.repeat(each, joined.sizes)
    multiply_weight(graph, names, layer, each)
    divide_value(graph, names, layer.activations[0], [layer.node], each, channel_axis(layer))


def _joined(layer: Layer, concat: ir.Node, axis: int | None) -> Joined | Refusal:
    """Return the parts that are joined in front of a layer, or why the layer cannot be taken apart."""
    out = concat.outputs[0]
    if axis is None or out.shape is None:
        return Refusal("its input is rearranged on the way")
    if concat.attributes["axis"].as_int() % len(out.shape) != axis:
        return Refusal("joined along another axis")
    if layer.kind == "conv" and "group" in layer.node.attributes and layer.node.attributes["group"].as_int() != 1:
        return Refusal("its channels are in groups")
    parts = [v for v in concat.inputs if v is not None]
    if any(is_constant(v) for v in parts):
        return Refusal("a part is constant")
    sizes = [known_ints(v.shape, [axis]) for v in parts]
    known = [size[0] for size in sizes if size is not None]
    if len(known) < len(parts) or sum(known) != input_channels(layer):
        return Refusal("the sizes of its parts are not known")
    return Joined(layer, concat, tuple(known))


def _concat_above(value: ir.Value, axis: int | None) -> tuple[ir.Node | None, int | None]:
    """The Concat that a value is, seen through data movers, and which of its axes became `axis`; None: none did."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None, None
    if is_op(node, "Concat"):
        return node, axis
    if not is_mover(node):
        return None, None
    return _concat_above(node.inputs[0], None if axis is None else _axis_before(node, axis))


def _axis_before(mover: ir.Node, axis: int) -> int | None:
    """Return which axis of a mover's input becomes `axis` of its output, untouched and whole."""
    before, after = (
        None if v is None or v.shape is None else list(v.shape) for v in (mover.inputs[0], mover.outputs[0])
    )
    if before is None or after is None:
        return None
    if is_op(mover, "Transpose"):
        order = mover.attributes["perm"].as_ints() if "perm" in mover.attributes else range(len(before))[::-1]
        return int(order[axis])
    if not isinstance(after[axis], int):
        return None
    # Sizes in front of it, or behind it, that stay as they are, keep it in its place among them.
    behind = len(after) - axis - 1
    if _same(before[: axis + 1], after[: axis + 1]):
        return axis
    if len(before) > behind and _same(before[len(before) - behind - 1 :], after[axis:]):
        return len(before) - behind - 1
    return None


def _same(some: Sequence[Dim], others: Sequence[Dim]) -> bool:
    """Return whether all sizes are numbers or named, and equal."""
    named = all(isinstance(n, int) or n.value is not None for n in (*some, *others))
    return named and list(some) == list(others)


def _split(graph: ir.Graph, build: Builder, joined: Joined, before: ir.Node) -> list[ir.Value]:
    """Return the parts of a value that was moved after the Concat."""
    value = joined.layer.activations[0]
    shape = shape_of(value)
    axis = channel_axis(joined.layer) % len(shape)
    stem = name_of(value)
    kind = None if value.dtype is None else ir.TensorType(value.dtype)
    shapes = [[size if d == axis else n for d, n in enumerate(shape)] for size in joined.sizes]
    parts = [
        ir.Value(name=build.names.unique(f"{stem}_part_{i}"), shape=ir.Shape(s), type=kind)
        for i, s in enumerate(shapes)
    ]
    lengths = build.constant(f"{stem}_sizes", np.array(joined.sizes, np.int64))
    node = ir.node("Split", [value, lengths], {"axis": axis}, outputs=parts)
    node.name = within(scope_of(before), build.names.unique(f"{stem}_split"))
    graph.insert_before(before, node)
    return parts
