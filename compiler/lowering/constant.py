"""Lowering `constant`: constant scales and zero points on inputs only, for engines that demand them.

OpenVINO, TensorRT and most compilers of other vendors make an integer kernel of this form alone:

    x -> Q(s, z) -> DQ(s, z) -> layer(., DQ(w)) + b      s, z: constants; Q and DQ adjacent; the output stays float

insert_qdq writes no quantizer behind a layer for this lowering, and clean_qdq moves nothing between Q and DQ. What is
left to do here is the timestep. A quantizer with a table s_t of scales, one row for each group of timesteps, and one
zero point z gives the same integers for a rescaled input with a constant scale s, because

    x / s_t + z = (x r_t) / s + z        r_t = s / s_t, s the widest of the rows

So, with r_t and 1 / r_t gathered from one table of float numbers:

    x -> Q(s_t, z) -> DQ -> MatMul [-> Add b]      x -> Mul r_t -> Q(s, z) -> DQ -> MatMul -> Mul 1/r_t [-> Add b]
    x -> Q(s_t, z) -> DQ -> Conv(., w, b)          x -> Mul r_t -> Q(s, z) -> DQ -> Conv(., w) -> Mul 1/r_t -> Add b
    DQ(s_t) -> MatMul(., DQ(s'_t))                 ... MatMul -> Mul 1/(r_t r'_t)
    Conv(., w, row of a table)                     Conv(., w) -> Add row, for layers in float, too
    Q -> Clip(qmin, qmax) -> DQ                    Clip(s (qmin - z), s (qmax - z)) -> Q -> DQ: fewer than 8 bits

Values change by float rounding only. A graph without tables gets constants in these places and no Mul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import Builder, Names, consumers, is_constant, is_op, name_of, numpy_of, remove_dead, replace_use
from ..graph.require import inputs, producer, required
from ..scales.timetable import lookup, rows_and_index
from .layout import split_biases
from .qdq import clip_behind, dequantizer, fold_weights, grid_ends

_LAYERS = ("Conv", "Gemm", "MatMul")


def lower_constant(program: Program) -> ir.Model:
    """Return a lowered clone of the graph that insert_qdq wrote. The program is not changed.

    Raises PassError for a zero point that depends on the timestep, and for a node between Q and DQ.
    """
    model = program.model.clone()
    fold_weights(model.graph)
    split_biases(model.graph)
    _Writer(model.graph).write()
    remove_dead(model.graph)
    return model


class _Writer:
    """Rewrites a graph in place. Ratios are collected, to be looked up together in the end."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.names = graph, Names(graph)
        self._layers = {node for node in graph if is_op(node, *_LAYERS) and any(map(dequantizer, node.inputs[:2]))}
        self._waiting: dict[tuple[bool, tuple[ir.Value, ...]], list[ir.Node]] = {}

    def write(self) -> None:
        for node in list(self.graph):
            if node in self._layers:
                self._multiply_back(node)
        for node in list(self.graph):
            if is_op(node, "QuantizeLinear"):
                self._make_constant(node)
        self._write_ratios()

    def _multiply_back(self, layer: ir.Node) -> None:
        """Multiply by 1 / r_t behind a layer, and add its bias behind that."""
        pairs = [dequantizer(v) for v in layer.inputs[:2]]
        scales = [s for pair in pairs if pair is not None and (s := pair.inputs[1]) and not is_constant(s)]
        if not scales:
            return
        out = layer.outputs[0]
        stem, readers = name_of(out), consumers(out)
        build = Builder(self.graph, self.names, after=layer)
        bias = layer.inputs[2] if len(layer.inputs) > 2 else None
        value = self._multiply(build, out, scales, f"{stem}_unscaled", inverse=True)
        if bias is not None:
            layer.resize_inputs(2)
            if is_op(layer, "Conv"):
                ones = [1] * (len(required(layer.inputs[1], "the weight", layer).shape or ()) - 2)
                bias = build.constant(f"{name_of(bias)}_column", numpy_of(bias).reshape(1, -1, *ones))
            value = build.op("Add", [value, bias], f"{stem}_biased", like=out)
        self._redirect(out, value, readers)

    def _make_constant(self, quantize: ir.Node) -> None:
        """Give a quantizer of an activation, and the DequantizeLinear nodes behind it, constant parameters."""
        source, scale, zero = inputs(quantize, 3)
        build = Builder(self.graph, self.names, before=quantize)
        stem, clip = name_of(source), clip_behind(quantize)
        readers = consumers((quantize if clip is None else clip).outputs[0])
        if not all(is_op(reader, "DequantizeLinear") for reader in readers):
            raise PassError(
                f"a {next(r.op_type for r in readers if not is_op(r, 'DequantizeLinear'))} reads the integers of "
                f"{stem!r}, and engines with constant scales want a DequantizeLinear there",
                hint="put no pass behind insert_qdq that moves integers",
            )
        value = source
        if not is_constant(scale):
            value = self._multiply(build, source, [scale], f"{stem}_premultiplied")
            constants = self._constants(build, scale, zero)
            for reader in readers:
                self._separate(reader, scale)
            for node in (quantize, *readers):
                for i, constant in enumerate(constants, 1):
                    node.replace_input_with(i, constant)
            scale, zero = constants
        if clip is not None:
            ends = (np.array(grid_ends(quantize)) - int(numpy_of(zero))) * numpy_of(scale).astype(np.float64)
            limits = [
                build.constant(f"{stem}_{end}", np.float32(limit))
                for end, limit in zip(("low", "high"), ends, strict=True)
            ]
            value = build.op("Clip", [value, *limits], f"{stem}_narrow", like=source)
            clip.outputs[0].replace_all_uses_with(quantize.outputs[0])
            self.graph.remove(clip, safe=True)
        quantize.replace_input_with(0, value)

    def _constants(self, build: Builder, scale: ir.Value, zero: ir.Value) -> tuple[ir.Value, ir.Value]:
        zeros = rows_and_index(zero)[0]
        if not np.all(zeros == zeros[0]):
            raise PassError(
                f"the zero point {name_of(zero)!r} depends on the timestep, and `constant` has constant ones",
                hint="insert_qdq refuses such a plan; put no pass that changes zero points behind it",
            )
        return (
            build.constant(f"{name_of(scale)}_reference", rows_and_index(scale)[0].max()),
            build.constant(f"{name_of(zero)}_constant", zeros[0]),
        )

    def _separate(self, pair: ir.Node, scale: ir.Value) -> None:
        """Multiply by 1 / r_t behind a DequantizeLinear for its readers that are no layers."""
        out = pair.outputs[0]
        readers = [node for node in consumers(out) if node not in self._layers]
        if readers or out.is_graph_output():
            build = Builder(self.graph, self.names, after=pair)
            value = self._multiply(build, out, [scale], f"{name_of(out)}_unscaled", inverse=True)
            self._redirect(out, value, readers)

    def _multiply(
        self, build: Builder, value: ir.Value, scales: Sequence[ir.Value], preferred: str, *, inverse: bool = False
    ) -> ir.Value:
        """Write a Mul whose second input comes later: the product of the ratios of these scales, or its inverse."""
        product = build.op("Mul", [value, None], preferred, like=value)
        self._waiting.setdefault((inverse, tuple(sorted(scales, key=name_of))), []).append(producer(product))
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


def _ratio(scale: ir.Value) -> npt.NDArray[Any]:
    """Return r_t `[groups]`: the constant scale, which is the widest of the rows, over each row."""
    rows = rows_and_index(scale)[0].astype(np.float64)
    return np.asarray(rows.max() / rows)
