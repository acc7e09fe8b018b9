"""Quantized layers of the graph that insert_qdq wrote, and their biases as the int32 accumulator takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Doubles

from ..core.program import Program
from ..graph.nodes import consumers, is_constant, is_op, numpy_of
from ..graph.ops import time_table
from ..graph.require import inputs
from ..scales.timetable import group_of_row, rows_and_index
from .qdq import dequantizer, middle_of


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer between its DequantizeLinear nodes; the Add behind a MatMul, if there is one, adds its bias."""

    node: ir.Node
    x: ir.Node
    w: ir.Node
    bias: ir.Value | None
    bias_add: ir.Node | None

    @property
    def output_quantizer(self) -> ir.Node | None:
        """Return the QuantizeLinear that is the only reader of the node's output, or None."""
        out = self.node.outputs[0]
        readers = consumers(out)
        alone = len(readers) == 1 and is_op(readers[0], "QuantizeLinear") and not out.is_graph_output()
        return readers[0] if alone else None


def integer_layer(node: ir.Node) -> IntegerLayer | None:
    """Return the layer of a Conv, Gemm or MatMul with dequantized input and constant weight, else None.

    The weight may be integers already (fold_weights), or a float constant behind its QuantizeLinear.
    """
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return None
    x, w = (dequantizer(v) for v in node.inputs[:2])
    if x is None or w is None or not _is_weight(w.inputs[0]):
        return None
    if not is_op(node, "MatMul"):
        return IntegerLayer(node, x, w, node.inputs[2] if len(node.inputs) > 2 else None, None)
    readers = consumers(node.outputs[0])
    if len(readers) == 1 and is_op(readers[0], "Add") and not node.outputs[0].is_graph_output():
        bias = next((v for v in readers[0].inputs if v is not node.outputs[0]), None)
        width = w.inputs[0].shape[-1] if w.inputs[0] is not None and w.inputs[0].shape is not None else None
        if bias is not None and is_constant(bias) and bias.shape is not None and list(bias.shape) == [width]:
            return IntegerLayer(node, x, w, bias, readers[0])
    return IntegerLayer(node, x, w, None, None)


def _is_weight(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if is_op(node, "Clip") and node is not None and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if is_op(node, "QuantizeLinear") and node is not None:
        return is_constant(node.inputs[0])
    return is_constant(value)


@dataclass(frozen=True, eq=False)
class AccumulatorBias:
    """What a layer adds to its sum: `values` `[rows, C]` in the output's unit, `x_scale` `[rows, 1]`.

    The kernel gets round(values / (x_scale w_scale)). `row` is the row index, None where there is one row.
    """

    values: Doubles
    x_scale: Doubles
    row: ir.Value | None


def accumulator_bias(program: Program, layer: IntegerLayer) -> AccumulatorBias | None:
    """Return what a layer adds to its sum, or None if that is nothing.

    An output that is quantized per channel adds (zero_point - middle) * scale of each channel, because the kernel has
    one zero point (compiler/lowering/integer.py).
    """
    shift = None
    quantize = layer.output_quantizer if is_op(layer.node, "Conv") else None
    if quantize is not None:
        _, y_scale, y_zero = inputs(quantize, 3)
        if list(y_scale.shape or ()) not in ([], [1]):
            shift = _shift(y_scale, y_zero)
    timed = None if layer.bias is None else time_table(layer.bias)
    constant = layer.bias is None or is_constant(layer.bias)
    if (layer.bias is None and shift is None) or not (timed or constant):
        return None
    if timed:
        table, row = numpy_of(timed[0]).astype(np.float64), timed[1]
    else:
        table, row = np.zeros((1, 1)) if layer.bias is None else numpy_of(layer.bias)[None].astype(np.float64), None
    scales, index = rows_and_index(inputs(layer.x, 2)[1])
    terms = [(scales[:, None].astype(np.float64), index), shift or (np.zeros((1, 1)), None)]
    if timed:
        terms = [(r if index is None else r[group_of_row(program)], None) for r, index in terms]
    else:
        row = next((index for _, index in terms if index is not None), None)
    return AccumulatorBias(table + terms[1][0], terms[0][0], row)


def _shift(scale: ir.Value, zero: ir.Value) -> tuple[Doubles, ir.Value | None]:
    """Return (`[groups, C]`, row index): (zero_point - middle) * scale, which a bias adds to make up for one zero."""
    rows, index = rows_and_index(scale)
    zeros, _ = rows_and_index(zero)
    return (zeros.astype(np.float64) - float(middle_of(zero))) * rows.astype(np.float64), index
