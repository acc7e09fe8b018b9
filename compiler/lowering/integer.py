"""Lowering `integer`: onnxruntime's integer operations written directly, with gathered scales and biases.

A QDQ convolution whose bias depends on the timestep would stay in float, and a QDQ matmul adds its bias in a separate
pass over its output. So the layers become

    DQ(q) -> Conv(., w, b) -> Q          QLinearConv(q, ..., w_int8, ..., b_int32)
    DQ(q) -> MatMul(., w) [-> Add b]     com.microsoft MatMulIntegerToFloat(q, w_int8, ..., b)
    DQ(q) -> Gemm(., w, b)               the same, w transposed if transB is set

An int32 bias is round(b / (x_scale w_scale)). Where x_scale comes from a table, or b depends on the timestep, the bias
is a table `[rows, C]` too, and one Gather reads all bias tables of a graph. MatMuls of two activations stay as they
are: their QDQ form also becomes an integer kernel with gathered scales (measured).

QLinearConv has one output scale. A convolution whose output is quantized per channel still uses it, at no cost: with
w_scale[c] / y_scale[c] in place of w_scale[c], 1 as its output scale, and the differences of the zero points in the
bias, it rounds channel c to the grid of y_scale[c] and zero_point[c]. The DequantizeLinear behind it has both.

Up to 1.27 onnxruntime silently drops a convolution's bias if it is not constant and the zero point of the input is
(measured: 1.23.2, 1.24.4, 1.27.0; 1.31.1 adds it). So a gathered bias comes with a gathered zero point.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.program import Program
from ..graph.nodes import MICROSOFT, Builder, Names, is_constant, is_op, name_of, numpy_of, remove_dead, replace_value
from ..graph.require import inputs as inputs_of
from ..graph.require import producer
from ..scales.timetable import lookup
from .layout import hide_ranks, split_biases, transpose_integers
from .qdq import check_int32, fold_weights, middle_of
from .quantized import IntegerLayer, accumulator_bias, integer_layer


def lower_integer(program: Program) -> ir.Model:
    """Return a lowered clone of the graph that insert_qdq wrote. The program is not changed."""
    model = program.model.clone()
    fold_weights(model.graph)
    writer = _Writer(program, model.graph)
    for node in list(model.graph):
        layer = integer_layer(node)
        if layer is not None:
            writer.lower(layer)
    writer.write_channel_scales()
    writer.write_biases()
    split_biases(model.graph)
    transpose_integers(model.graph)
    hide_ranks(model.graph, [node for node in model.graph if is_op(node, "QLinearConv")])
    remove_dead(model.graph)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    return model


class _Writer:
    """Writes integer nodes. Rows of biases are collected, to be looked up together in the end."""

    def __init__(self, program: Program, graph: ir.Graph) -> None:
        self.program, self.graph, self.names = program, graph, Names(graph)
        self._waiting: dict[str, list[tuple[ir.Node, npt.NDArray[np.int32]]]] = {}
        self._rows: dict[str, ir.Value] = {}
        self._divided: dict[ir.Node, list[tuple[ir.Node, int]]] = {}

    def lower(self, layer: IntegerLayer) -> None:
        if is_op(layer.node, "Conv"):
            self._conv(layer)
        else:
            self._matmul(layer)

    def _conv(self, layer: IntegerLayer) -> None:
        out, quantize = layer.node.outputs[0], layer.output_quantizer
        if quantize is None:
            return
        _, y_scale, y_zero = inputs_of(quantize, 3)
        per_channel = list(y_scale.shape or ()) not in ([], [1])
        bias = _int32_bias(self.program, layer)
        build = Builder(self.graph, self.names, layer.node)
        w_scale, out_scale = inputs_of(layer.w, 2)[1], [y_scale, y_zero]
        if per_channel:
            one, middle = np.array(1, np.float32), np.array(middle_of(y_zero))
            out_scale = [build.constant(f"{name_of(out)}_{n}", v) for n, v in (("one", one), ("middle", middle))]
        inputs = [*layer.x.inputs[:3], *layer.w.inputs[:3], *out_scale]
        attributes = {name: a.value for name, a in layer.node.attributes.items()}
        name = layer.node.name
        layer.node.name = self.names.unique(f"{name}_float")
        result = build.op(
            "QLinearConv", inputs, f"{name_of(out)}_integer", like=quantize.outputs[0], attributes=attributes, name=name
        )
        conv = producer(result)
        if bias is not None:
            self._attach(conv, *bias)
        if per_channel:
            split = y_scale.producer()
            if split is None:  # the same at every timestep
                scale = numpy_of(w_scale) / numpy_of(y_scale)
                conv.replace_input_with(4, build.constant(f"{name_of(out)}_factors", scale))
            else:
                self._divided.setdefault(split, []).append((conv, list(split.outputs).index(y_scale)))
        replace_value(quantize.outputs[0], result)
        self.graph.remove(quantize, safe=True)
        self.graph.remove(layer.node, safe=True)

    def _attach(self, conv: ir.Node, rows: npt.NDArray[np.int32], row: ir.Value | None) -> None:
        """Give a QLinearConv its bias: a constant, or a row of a table that write_biases() writes."""
        conv.resize_inputs(9)
        if row is None:
            build = Builder(self.graph, self.names, conv)
            conv.replace_input_with(8, build.constant(f"{conv.name}_bias_int32", rows[0]))
        else:
            self._rows[name_of(row)] = row
            self._waiting.setdefault(name_of(row), []).append((conv, rows))

    def _matmul(self, layer: IntegerLayer) -> None:
        weight, w_scale, w_zero = inputs_of(layer.w, 3)
        build = Builder(self.graph, self.names, layer.node)
        attributes = layer.node.attributes
        if "transB" in attributes and attributes["transB"].as_int():
            transposed = np.ascontiguousarray(numpy_of(weight).T)
            weight = build.constant(f"{name_of(weight)}_turned", transposed)
        width = None if weight.shape is None else weight.shape[-1]
        if layer.bias is not None and (layer.bias.shape is None or list(layer.bias.shape) != [width]):
            return  # the kernel takes only a bias `[out]`
        last = layer.bias_add or layer.node
        x, x_scale, x_zero = layer.x.inputs[:3]
        out = last.outputs[0]
        name = layer.node.name
        layer.node.name = self.names.unique(f"{name}_float")
        build = Builder(self.graph, self.names, last)
        result = build.op(
            "MatMulIntegerToFloat",
            [x, weight, x_scale, w_scale, x_zero, w_zero, layer.bias],
            f"{name_of(out)}_integer",
            like=out,
            domain=MICROSOFT,
            name=name,
        )
        replace_value(out, result)
        self.graph.remove(last, safe=True)
        if last is not layer.node:
            self.graph.remove(layer.node, safe=True)

    def write_channel_scales(self) -> None:
        """Write w_scale / y_scale of all convolutions whose scales come from one lookup with one Div."""
        for lookup_end, waiting in self._divided.items():
            columns = list(lookup_end.outputs) if is_op(lookup_end, "Split") else [lookup_end.outputs[0]]
            sizes = [int(n) for column in columns for n in (column.shape or []) if isinstance(n, int)]
            row = lookup_end.inputs[0] if len(columns) > 1 else columns[0]
            numerators = np.ones(sum(sizes), np.float32)
            for conv, index in waiting:
                first = sum(sizes[:index])
                numerators[first : first + sizes[index]] = numpy_of(inputs_of(conv, 5)[4])
            build = Builder(self.graph, self.names, after=lookup_end)
            stem = f"{name_of(row)}_factors"
            factors = build.op("Div", [build.constant(f"{stem}_weights", numerators), row], stem, like=row)
            divided = build.split(factors, sizes, f"{stem}_part") if len(columns) > 1 else [factors]
            for conv, index in waiting:
                conv.replace_input_with(4, divided[index])

    def write_biases(self) -> None:
        """Write one lookup for all bias tables that share a row index."""
        for key, waiting in self._waiting.items():
            row = self._rows[key]
            build = Builder(self.graph, self.names, after=producer(row))
            table = np.concatenate([rows for _, rows in waiting], axis=1)
            sizes = [rows.shape[1] for _, rows in waiting]
            biases = lookup(build, table, row, sizes, f"{key}_bias")
            for (conv, _), bias in zip(waiting, biases, strict=True):
                conv.replace_input_with(8, bias)
            constant = [conv for conv, _ in waiting if is_constant(conv.inputs[2])]
            self._gather_zero_points(build, constant, row, len(table))

    def _gather_zero_points(self, build: Builder, convs: list[ir.Node], row: ir.Value, rows: int) -> None:
        """Read the constant zero points of inputs from a table of equal rows (see the module's last paragraph)."""
        zeros = [numpy_of(value) for conv in convs if (value := conv.inputs[2]) is not None]
        if zeros:
            table = np.tile(np.array(zeros), (rows, 1))
            looked_up = lookup(build, table, row, [1] * len(zeros), f"{name_of(row)}_zero_points")
            for conv, zero in zip(convs, looked_up, strict=True):
                conv.replace_input_with(2, zero)


def _int32_bias(program: Program, layer: IntegerLayer) -> tuple[npt.NDArray[np.int32], ir.Value | None] | None:
    """Return (rows `[n, C]`, row index) of the int32 bias, or None if there is no bias.

    The row index is None when n is 1. Raises PassError for a bias that does not fit.
    """
    bias = accumulator_bias(program, layer)
    if bias is None:
        return None
    rows = np.rint(bias.values / (bias.x_scale * numpy_of(inputs_of(layer.w, 2)[1])))
    check_int32(rows, layer.node)
    return rows.astype(np.int32), bias.row
