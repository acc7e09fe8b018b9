"""Lowering `premul`: constant scales and zero points for providers that require them; the timestep in float Muls.

A quantizer with a table s_t of scales, one row for each group of timesteps, and one constant zero point z gives the
same integers for a rescaled input with a constant scale s, because x / s_t + z = (x r_t) / s + z with r_t = s / s_t:

    x -> Q(s_t, z) -> DQ(s_t, z)                     x -> Mul r_t -> Q(s, z) -> DQ(s, z) -> Mul 1/r_t
    DQ -> MatMul -> Add b                            DQ -> MatMul -> Mul 1/r_t -> Add b
    DQ -> MatMul(., DQ)                              DQ -> MatMul(., DQ) -> Mul 1/(r_t r'_t)
    DQ -> Conv(., w, b) -> Q(s'_t, z') -> DQ         DQ -> Conv(., w) -> Q(S, Z) -> DQ -> Mul 1/r_t -> Add b

Up to float rounding, only the outputs of convolutions change. An integer convolution rounds its output with a constant
scale, but its result is multiplied by r_t: the range follows the input's ratio and not the table of the output. So
(S, Z) covers r_t (y - b) for the range of y in every group. This costs precision in three ways: a group with a small
r_t, or a small output, gets a part of the grid only; the spread of the bias over the channels widens the range; and a
layer that reads the convolution through a table rounds once more. If the input is static and the bias constant, the
bias stays inside, and (S, Z) is the widest of the output's ranges, for every reader.

Parts that do not depend on the timestep are written as `qdq` does. One lookup reads all ratios of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.formats import Format, scale_for_range
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import Builder, Names, consumers, is_constant, is_op, name_of, numpy_of, remove_dead, replace_use
from ..graph.ops import time_table
from ..graph.require import inputs, producer, required
from ..scales.timetable import group_of_row, lookup, rows_and_index
from .qdq import clip_behind, dequantizer, fold_weights, grid_ends, lower_qdq

ParameterRows = npt.NDArray[Any]


def lower_premul(program: Program) -> ir.Model:
    """Return a lowered clone of the graph that insert_qdq wrote. The program is not changed."""
    model = program.model.clone()
    fold_weights(model.graph)
    _Writer(program, model.graph).write()
    remove_dead(model.graph)
    return lower_qdq(model)


def _is_layer(node: ir.Node) -> bool:
    """Return whether a node multiplies two dequantized matrices; the output of a convolution must be quantized, too."""
    if not is_op(node, "Conv", "Gemm", "MatMul") or None in [dequantizer(v) for v in node.inputs[:2]]:
        return False
    readers = consumers(node.outputs[0])
    return not is_op(node, "Conv") or (len(readers) == 1 and is_op(readers[0], "QuantizeLinear"))


def _scales(layer: ir.Node) -> tuple[ir.Value, ...]:
    """Return the scales of a layer's inputs that depend on the timestep."""
    dequantizers = [dequantizer(v) for v in layer.inputs[:2]]
    scales = [node.inputs[1] for node in dequantizers if node is not None]
    return tuple(s for s in scales if s is not None and not is_constant(s))


def _pair_behind(quantize: ir.Node) -> Iterator[ir.Node]:
    """Yield a QuantizeLinear and the DequantizeLinear nodes behind it, past nodes that move or clip integers."""
    yield quantize
    for reader in consumers(quantize.outputs[0]):
        if is_op(reader, "DequantizeLinear"):
            yield reader
        else:
            yield from (node for node in _pair_behind(reader) if node is not reader)


def _rows(parameter: ir.Value | None) -> ParameterRows:
    """Return all rows of a scale or a zero point."""
    return rows_and_index(required(parameter, "a scale or zero point, which insert_qdq writes,"))[0]


class _Writer:
    """Rewrites a graph in place. Ratios are collected, to be looked up together in the end."""

    def __init__(self, program: Program, graph: ir.Graph) -> None:
        self.program, self.graph, self.names = program, graph, Names(graph)
        self._layers = {node for node in graph if _is_layer(node)}
        self._constants: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
        self._waiting: dict[tuple[bool, tuple[ir.Value, ...]], list[ir.Node]] = {}

    def write(self) -> None:
        """Rewrite all layers, then all remaining quantizers with a table, then write the lookup of the ratios."""
        for node in list(
            self.graph
        ):  # in order: the rewritten output of one convolution may be the static input of the next
            if node in self._layers and is_op(node, "Conv"):
                self._conv(node)
            elif node in self._layers:
                self._matmul(node)
        remove_dead(self.graph)
        for node in list(self.graph):
            scale = node.inputs[1] if is_op(node, "QuantizeLinear", "DequantizeLinear") else None
            if scale is not None and not is_constant(scale):
                self._pair(node, scale)
        self._write_ratios()

    def _conv(self, conv: ir.Node) -> None:
        """Give a convolution's output constant parameters.

        1. The input or the bias depends on the timestep: multiply back and add the bias behind the output's quantizer.
        2. Only the output's scale does: keep the bias inside, and take the widest of the output's ranges.
        """
        out, scales = conv.outputs[0], _scales(conv)
        quantize = consumers(out)[0]
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        if scales or (bias is not None and time_table(bias) is not None):
            self._conv_bias_outside(conv, quantize, scales, bias)  # case 1
        elif not is_constant(quantize.inputs[1]):  # case 2
            build = Builder(self.graph, self.names, before=conv)
            parameters = self._output_parameters(build, quantize, np.ones(1), None)
            for node in _pair_behind(quantize):
                for i, value in enumerate(parameters, 1):
                    node.replace_input_with(i, value)

    def _conv_bias_outside(
        self, conv: ir.Node, quantize: ir.Node, scales: tuple[ir.Value, ...], bias: ir.Value | None
    ) -> None:
        out = conv.outputs[0]
        stem = name_of(out)
        ratio = np.ones(1)
        for scale in scales:
            ratio = ratio * _ratio(scale)
        build = Builder(self.graph, self.names, after=conv)
        scale, zero = self._output_parameters(build, quantize, ratio, bias)
        clip = clip_behind(quantize)
        value = build.op("QuantizeLinear", [out, scale, zero], f"{stem}_rescaled", like=out, dtype=zero.dtype)
        if clip is not None:
            value = build.op("Clip", [value, *clip.inputs[1:]], f"{stem}_narrow", like=value)
        value = build.op("DequantizeLinear", [value, scale, zero], f"{stem}_premultiplied", like=out)
        if scales:
            value = self._back(build, value, scales, f"{stem}_unbiased")
        if bias is not None:
            conv.resize_inputs(2)
            ones = [1] * (len(conv.inputs[1].shape or ()) - 2) if conv.inputs[1] is not None else []
            value = build.op("Add", [value, self._along_channels(build, bias, ones)], f"{stem}_biased", like=out)
        quantize.replace_input_with(0, value)
        direct = quantize if clip is None else clip
        for reader in consumers(direct.outputs[0]):
            if is_op(reader, "DequantizeLinear"):  # float readers read the value before the next layer's quantizer
                old = reader.outputs[0]
                self._redirect(old, value, [n for n in consumers(old) if n not in self._layers])

    def _along_channels(self, build: Builder, bias: ir.Value, ones: list[int]) -> ir.Value:
        """Return a bias `[C]` as `[1, C, 1 ...]`, to be added to `[batch, C, ...]`."""
        stem = name_of(bias)
        if is_constant(bias):
            return build.constant(f"{stem}_column", numpy_of(bias).reshape(1, -1, *ones))
        shape = build.constant(f"{stem}_column_shape", np.array([1, -1, *ones]))
        size = None if bias.shape is None else bias.shape[0]
        return build.op("Reshape", [bias, shape], f"{stem}_column", like=bias, shape=[1, size, *ones])

    def _output_parameters(
        self, build: Builder, quantize: ir.Node, ratio: ParameterRows, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Write a constant scale and zero point for `ratio` times a convolution's output without its bias.

        With the bias the output lies in [low, high], the range of its quantizer in the plan, so without it in
        [low - max b, high - min b]. The range is the union over all rows.
        """
        scale, zero = _rows(quantize.inputs[1]), _rows(quantize.inputs[2])
        lowest, highest = grid_ends(quantize)
        low, high = ((end - zero.astype(np.float64)) * scale for end in (lowest, highest))
        if bias is not None:
            timed = time_table(bias)
            if timed is not None and max(low.size, ratio.size) > 1:
                group = group_of_row(self.program)
                low, high, ratio = (rows[group] if rows.size > 1 else rows for rows in (low, high, ratio))
            values = numpy_of(bias)[None] if timed is None else numpy_of(timed[0])
            low, high = low - values.max(axis=1), high - values.min(axis=1)
        fmt = Format((highest - lowest).bit_length(), signed=zero.dtype == np.int8)
        new_scale, new_zero = scale_for_range((ratio * low).min(), (ratio * high).max(), fmt)
        stem = name_of(quantize.inputs[0])
        return build.constant(f"{stem}_output_scale", new_scale), build.constant(f"{stem}_output_zero_point", new_zero)

    def _matmul(self, node: ir.Node) -> None:
        """Multiply by 1 / r_t behind a MatMul or Gemm, before the bias. A MatMul's bias is an Add already."""
        scales = _scales(node)
        if not scales:
            return
        out = node.outputs[0]
        stem, readers = name_of(out), consumers(out)
        build = Builder(self.graph, self.names, after=node)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        value = self._back(build, out, scales, f"{stem}_unscaled")
        if bias is not None:
            node.resize_inputs(2)
            value = build.op("Add", [value, bias], f"{stem}_biased", like=out)
        self._redirect(out, value, readers)

    def _pair(self, node: ir.Node, scale: ir.Value) -> None:
        """Give one Q or DQ constant parameters, with a Mul before a Q, and behind a DQ unless only layers read it."""
        zero = inputs(node, 3)[2]
        if is_op(node, "QuantizeLinear"):
            source = node.inputs[0]
            build = Builder(self.graph, self.names, before=node)
            stem = f"{name_of(source)}_premultiplied"
            node.replace_input_with(0, self._wait(build, source, (False, (scale,)), stem))
        else:
            out = node.outputs[0]
            readers = [n for n in consumers(out) if n not in self._layers]
            build = Builder(self.graph, self.names, after=node)
            if readers or out.is_graph_output():
                self._redirect(out, self._back(build, out, (scale,), f"{name_of(out)}_unscaled"), readers)
        for i, value in enumerate(self._constant_pair(build, scale, zero), 1):
            node.replace_input_with(i, value)

    def _constant_pair(self, build: Builder, scale: ir.Value, zero: ir.Value) -> tuple[ir.Value, ir.Value]:
        if (scale, zero) not in self._constants:
            zeros = _rows(zero)
            if not np.all(zeros == zeros[0]):
                raise PassError(
                    f"the zero point {name_of(zero)!r} depends on the timestep, and `premul` has constant ones",
                    hint="insert_qdq refuses such a plan; put no pass that changes zero points behind it",
                )
            self._constants[scale, zero] = (
                build.constant(f"{name_of(scale)}_reference", _rows(scale).max()),
                build.constant(f"{name_of(zero)}_constant", zeros[0]),
            )
        return self._constants[scale, zero]

    def _back(self, build: Builder, value: ir.Value, scales: tuple[ir.Value, ...], preferred: str) -> ir.Value:
        return self._wait(build, value, (True, tuple(sorted(scales, key=name_of))), preferred)

    def _wait(
        self, build: Builder, value: ir.Value | None, key: tuple[bool, tuple[ir.Value, ...]], preferred: str
    ) -> ir.Value:
        """Write a Mul whose second input comes later: a ratio, or the inverse of a product of ratios."""
        product = build.op("Mul", [value, None], preferred, like=value)
        self._waiting.setdefault(key, []).append(producer(product))
        return product

    def _redirect(self, old: ir.Value, new: ir.Value, readers: list[ir.Node]) -> None:
        """Make these readers, and the graph if `old` is an output, read `new`."""
        for node in readers:
            replace_use(node, old, new)
        if old.is_graph_output():
            name = name_of(old)
            old.name = self.names.unique(f"{name}_raw")
            self.graph.outputs[list(self.graph.outputs).index(old)] = new
            new.name = name

    def _write_ratios(self) -> None:
        """Write one lookup for all ratios: insert_qdq reads all of its tables by one index."""
        if not self._waiting:
            return
        columns = []
        for inverse, scales in self._waiting:
            product = np.prod([_ratio(s) for s in scales], axis=0)
            columns.append(1 / product if inverse else product)
        (row,) = {rows_and_index(s)[1] for _, scales in self._waiting for s in scales}
        row = required(row, "the row index of the tables")
        build = Builder(self.graph, self.names, after=producer(row))
        table = np.stack(columns, axis=1).astype(np.float32)
        ratios = lookup(build, table, row, [1] * len(columns), "ratios")
        for waiting, ratio in zip(self._waiting.values(), ratios, strict=True):
            for node in waiting:
                node.replace_input_with(1, ratio)


def _ratio(scale: ir.Value) -> npt.NDArray[np.float64]:
    """Return r_t `[groups]`: the constant scale, which is the widest of the rows, over each row."""
    rows = _rows(scale).astype(np.float64)
    return np.asarray(rows.max() / rows)
