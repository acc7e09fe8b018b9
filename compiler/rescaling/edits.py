"""Edits of the constants that take channel factors. Each node gets a constant of its own; other readers keep the old.

An edit changes the constant that its node adds or multiplies with, so that the value further down becomes

    v  ->  v m + a                  m and a: one number for each channel

`offset` o is added to the constant on the way to that value: (c + o) m + a - o replaces c. It is the 1 of
`x * (1 + scale)`: a scale b becomes (b + 1) m - 1, which for m = 1 / s is (b + 1 - s) / s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.nodes import Builder, Names, consumers, is_constant, is_op, name_of, numpy_of, replace_value
from ..graph.ops import Layer, layer_of, time_table
from ..graph.require import inputs, producer, required
from .axes import Layout
from .scaling import Factors, row_lengths, row_ranges

Change = Callable[[Factors], Factors]
Role = Literal["rows", "gain", "divisor", "term"]


@dataclass(frozen=True, eq=False)
class Edit:
    """One change. `rows`: of a layer's weight and bias; otherwise of input `index`, a constant that multiplies
    (`gain`), divides (`divisor`) or is added (`term`). `layout` is that of the rows, or of what the constant meets."""

    node: ir.Node
    index: int
    layout: Layout
    role: Role
    offset: float = 0.0
    additive: bool = False  # this edit takes the summands a


def apply_edit(graph: ir.Graph, names: Names, edit: Edit, multiply: Factors, add: Factors) -> None:
    """Change the constants of one edit. m and a have one number for each channel."""
    m = _placed(edit.layout, multiply, 1.0)
    a = _placed(edit.layout, add, 0.0) if edit.additive else np.zeros(1)
    a = a + edit.offset * (m - 1)
    build = Builder(graph, names, edit.node)
    if edit.role == "rows":
        _change_rows(graph, names, edit.node, m, a)
        return
    constant = required(edit.node.inputs[edit.index], "the constant of an edit", edit.node)
    old = numpy_of(constant).astype(np.float64)
    new = {"gain": old * m, "divisor": old / m, "term": old * m + a}[edit.role]
    while new.ndim > old.ndim and new.shape[0] == 1:
        new = new[0]
    folded = build.constant(f"{name_of(constant)}_folded", new.astype(np.float32))
    edit.node.replace_input_with(edit.index, folded)


def add_to_bias(graph: ir.Graph, names: Names, node: ir.Node, summand: Factors) -> None:
    """Add `[out]` to a layer's bias. A layer without a bias gets one."""
    layer = _layer(node)
    _set_bias(graph, names, layer, lambda bias: bias + summand, np.asarray(summand, np.float32))


def magnitudes(edit: Edit, channels: int, columns: Factors | None = None, *, lengths: bool = False) -> Factors:
    """Return the largest magnitude of the edited constant for each channel; of rows, with input channels multiplied by
    `columns`. With `lengths`, return the length of each row plus the magnitude of its bias, `offset` included."""
    if edit.role == "rows":
        layer = _layer(edit.node)
        found = row_lengths(layer) if lengths else row_ranges(layer, columns)
        if lengths and layer.bias is not None:
            table = time_table(layer.bias)
            bias = numpy_of(layer.bias if table is None else table[0]).astype(np.float64) + edit.offset
            found = found + np.abs(bias).reshape(-1, len(found)).max(axis=0)
    else:
        constant = required(edit.node.inputs[edit.index], "the constant of an edit", edit.node)
        found = np.abs(numpy_of(constant).astype(np.float64) + edit.offset)
        found = 1 / np.maximum(found, 1e-30) if edit.role == "divisor" else found
    index = _channels(edit.layout)
    index, found = np.broadcast_arrays(index, found)
    largest = np.zeros(channels)
    np.maximum.at(largest, index[index >= 0], found[index >= 0])
    return largest


def _change_rows(graph: ir.Graph, names: Names, node: ir.Node, m: Factors, a: Factors) -> None:
    layer = _layer(node)
    weight, axis = layer.require_weight(), layer.require_weight_axis()
    array = numpy_of(weight)
    along = m.reshape([-1 if d == axis else 1 for d in range(array.ndim)])
    build = Builder(graph, names, node)
    node.replace_input_with(1, build.constant(f"{name_of(weight)}_folded", (array * along).astype(np.float32)))
    if layer.bias is not None or a.any():
        fresh = np.broadcast_to(a, m.shape).astype(np.float32)
        _set_bias(graph, names, layer, lambda bias: bias * m + a, fresh)


def _layer(node: ir.Node) -> Layer:
    return required(layer_of(node), "the layer whose rows change", node)


def _set_bias(graph: ir.Graph, names: Names, layer: Layer, change: Change, fresh: npt.NDArray[np.float32]) -> None:
    """Apply `change` to a bias `[out]` or to the rows of its time table. A layer without a bias gets `fresh`."""
    node, bias = layer.node, layer.bias
    build = Builder(graph, names, node)
    if bias is not None:
        holder = layer.bias_add or node
        index = list(holder.inputs).index(bias)
        if is_constant(bias):
            new = change(numpy_of(bias).astype(np.float64)).astype(np.float32)
            holder.replace_input_with(index, build.constant(f"{name_of(bias)}_folded", new))
            return
        table = required(time_table(bias), "the time table of a bias that is not constant", bias)
        new = change(numpy_of(table[0]).astype(np.float64)).astype(np.float32)
        rows = build.constant(f"{name_of(table[0])}_folded", new)
        reshape = producer(bias)
        (gathered,) = inputs(reshape, 1)
        attributes = {"axis": 0}
        row = build.op("Gather", [rows, table[1]], f"{name_of(gathered)}_folded", like=gathered, attributes=attributes)
        flat = build.op("Reshape", [row, reshape.inputs[1]], f"{name_of(bias)}_folded", like=bias)
        holder.replace_input_with(index, flat)
    elif is_op(node, "MatMul"):
        raw = node.outputs[0]
        behind = Builder(graph, names, after=node)
        stem = name_of(raw)
        summed = behind.op("Add", [raw, behind.constant(f"{stem}_bias", fresh)], f"{stem}_sum", like=raw)
        replace_value(raw, summed)
        producer(summed).replace_input_with(0, raw)
    else:
        node.resize_inputs(3)
        node.replace_input_with(2, build.constant(f"{layer.name}_bias", fresh))


def _placed(layout: Layout, values: Factors, neutral: float) -> Factors:
    """Return the number of each channel at its places, and `neutral` elsewhere."""
    index = _channels(layout)
    placed: Factors = np.where(index >= 0, values[np.maximum(index, 0)], neutral)
    return placed


def _channels(layout: Layout) -> npt.NDArray[np.int64]:
    """Return the channel at each place. The tracer makes edits only where the places are known."""
    return required(layout.channels(), "the places of the channels")


def only_reads_sizes(node: ir.Node) -> bool:
    """Return whether a node reads the sizes of its input and not the contents."""
    return is_op(node, "Shape", "Size")


def other_readers(value: ir.Value, known: set[ir.Node]) -> list[ir.Node]:
    """Return the nodes outside of `known` that read the contents of a value."""
    return [n for n in consumers(value) if n not in known and not only_reads_sizes(n)]
