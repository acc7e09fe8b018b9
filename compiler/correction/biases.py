"""The biases of quantized layers in the graph that insert_qdq wrote: read and replaced.

A bias is the third input of a Conv or Gemm, or the constant that an Add behind a MatMul adds; either may be missing.
The bias of a convolution may also be a row of a time table (fold_time). Other readers of a replaced constant keep the
old one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Doubles

from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import Builder, Names, consumers, is_constant, is_op, name_of, numpy_of, replace_use
from ..graph.ops import Layer, layers, time_table
from ..graph.require import inputs, required, shape_of, tensor_of
from ..lowering.bias_room import BIAS_LIMIT
from ..lowering.qdq import dequantizer
from ..scales.timetable import rows_and_index


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer with a constant weight in the float graph (`layer`), and its nodes in the quantized one."""

    layer: Layer
    node: ir.Node
    add: ir.Node | None

    @property
    def output(self) -> ir.Value:
        """Return the layer's output with its bias, before its own quantizer."""
        return (self.add or self.node).outputs[0]

    @property
    def axis(self) -> int:
        """Return the axis of the output's channels."""
        return 1 if self.layer.kind == "conv" else len(self.output.shape or ()) - 1

    @property
    def channels(self) -> int:
        """Return the number of output channels."""
        axis = required(self.layer.weight_axis, "the axis of a weight's channels", self.node)
        return shape_of(self.layer.weight).numpy()[axis]

    @property
    def bias(self) -> ir.Value | None:
        """Return the bias, or None when the layer has none."""
        if self.add is not None:
            return next(v for v in self.add.inputs if v is not self.node.outputs[0])
        return self.node.inputs[2] if not is_op(self.node, "MatMul") and len(self.node.inputs) > 2 else None

    @property
    def table(self) -> tuple[ir.Value, ir.Value] | None:
        """Return (table `[rows, C]`, row index) if the bias is a row of a time table, else None."""
        return None if self.bias is None else time_table(self.bias)

    def values(self) -> Doubles:
        """Return the bias `[1, C]`, or all rows of its table `[rows, C]`; zeros when there is none."""
        if self.bias is None:
            return np.zeros((1, self.channels))
        table = self.table
        rows = numpy_of(self.bias)[None] if table is None else numpy_of(table[0])
        return rows.astype(np.float64)

    def fits(self, values: Doubles) -> bool:
        """Return whether a bias, in the form of `values`, fits into int32 at the scale x_scale * w_scale."""
        x_scale, w_scale = (
            inputs(required(dequantizer(v), "the DequantizeLinear", v), 2)[1] for v in inputs(self.node, 2)
        )
        finest = rows_and_index(x_scale)[0].astype(np.float64).min() * numpy_of(w_scale).astype(np.float64)
        return bool(np.all(np.abs(values) <= BIAS_LIMIT * finest))

    def with_bias(self, graph: ir.Graph, names: Names, values: Doubles) -> QuantizedLayer:
        """Write another bias, in the form of `values`, and return the layer; a MatMul without a bias gets an Add."""
        new, bias, table = values.astype(np.float32), self.bias, self.table
        if bias is None:
            return self._with_first_bias(graph, names, new[0])
        holder = self.add or self.node
        build = Builder(graph, names, holder)
        if table is None:
            replace_use(holder, bias, build.constant(f"{name_of(bias)}_corrected", new[0]))
            return self
        rows, stem, size = build.constant(f"{name_of(table[0])}_corrected", new), name_of(bias), new.shape[1]
        row = build.op(
            "Gather", [rows, table[1]], f"{stem}_row", dtype=rows.dtype, shape=[1, size], attributes={"axis": 0}
        )
        flat = build.constant(f"{stem}_flat", np.array([-1]))
        replace_use(holder, bias, build.op("Reshape", [row, flat], f"{stem}_corrected", dtype=rows.dtype, shape=[size]))
        return self

    def _with_first_bias(self, graph: ir.Graph, names: Names, new: npt.NDArray[np.float32]) -> QuantizedLayer:
        out = self.node.outputs[0]
        name = name_of(out)
        if not is_op(self.node, "MatMul"):
            self.node.resize_inputs(3)
            self.node.replace_input_with(2, Builder(graph, names, self.node).constant(f"{name}_bias", new))
            return self
        build = Builder(graph, names, after=self.node)
        readers = [(use.node, use.idx) for use in out.uses()]
        total = build.op("Add", [out, build.constant(f"{name}_bias", new)], f"{name}_biased", like=out)
        take_over(graph, names, out, total, readers)
        return QuantizedLayer(self.layer, self.node, total.producer())


def take_over(
    graph: ir.Graph, names: Names, old: ir.Value, new: ir.Value, readers: Sequence[tuple[ir.Node, int]]
) -> None:
    """Make these readers of `old`, and the graph if it is an output, read `new`, which gets the name of `old`.

    So a value that is read by its name is the corrected one.
    """
    for node, index in readers:
        node.replace_input_with(index, new)
    if old.is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = new
    name = name_of(old)
    old.name, new.name = names.unique(f"{name}_uncorrected"), name


def quantized_layers(program: Program, where: str) -> Iterator[QuantizedLayer]:
    """Yield the layers with constant weights that insert_qdq quantized, in the graph's order. Raises PassError."""
    nodes = {node.name: node for node in program.graph}
    for layer in layers(program.require_float_model().graph):
        if layer.weight is None:
            continue
        node = nodes.get(layer.node.name)
        add = None if node is None or not is_op(node, "MatMul") else _bias_add(node, layer)
        if node is None or (add is None and layer.bias_add is not None):
            raise PassError(
                f"the quantized graph has no layer {layer.name!r}",
                where=where,
                hint="put the pass behind insert_qdq, with nothing in between that replaces layers",
            )
        x, w = (dequantizer(v) for v in node.inputs[:2])
        if x is not None and w is not None and is_constant(w.inputs[1]):
            yield QuantizedLayer(layer, node, add)


def _bias_add(matmul: ir.Node, layer: Layer) -> ir.Node | None:
    """Return the Add of a constant `[out]` that is the only reader of a MatMul, or None.

    It is the model's own, or one that a correction added.
    """
    readers = consumers(matmul.outputs[0])
    if matmul.outputs[0].is_graph_output() or len(readers) != 1 or not is_op(readers[0], "Add"):
        return None
    biases = [v for v in readers[0].inputs if v is not None and is_constant(v)]
    return readers[0] if biases and list(biases[0].shape or ()) == [shape_of(layer.weight)[1]] else None


def with_float_twins(program: Program, quantized: Sequence[QuantizedLayer]) -> tuple[ir.Model, list[str]]:
    """Return a clone of the quantized graph with a twin of each layer: float weights on the same quantized input.

    Also returns the names of the twins' outputs, which lack the bias of an Add.
    """
    clone = program.model.clone()
    graph, names = clone.graph, Names(clone.graph)
    nodes = {node.name: node for node in graph}
    twins: list[str] = []
    for layer in quantized:
        node, weight = nodes[layer.node.name], layer.layer.weight
        build = Builder(graph, names, after=node)
        float_weight = build.constant(f"{name_of(weight)}_float", _copy_of(tensor_of(weight)))
        twin_inputs = [node.inputs[0], float_weight, *node.inputs[2:]]
        attributes = {name: a.value for name, a in node.attributes.items()}
        out = node.outputs[0]
        twin = build.op(node.op_type, twin_inputs, f"{name_of(out)}_float", like=out, attributes=attributes)
        twins.append(name_of(twin))
    return clone, twins


def _copy_of(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a tensor of the same numbers without a name; external data is not read."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name="",
            base_dir=tensor.base_dir,
        )
    return ir.tensor(tensor.numpy())
