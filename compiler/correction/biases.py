"""The biases of quantized layers: where they are in the graph that insert_qdq wrote, and how they are replaced.

A bias is the third input of a Conv or Gemm, or the constant that an Add behind a MatMul adds; either may be missing.
A convolution's may be a row of a time table, too (fold_time). Whoever else reads a constant keeps the old one.
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
from ..lowering.qdq import INT32_LIMIT, dequantizer
from ..scales.timetable import rows_and_index


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer with a constant weight in the float graph (`layer`), and its nodes in the quantized one."""

    layer: Layer
    node: ir.Node
    add: ir.Node | None

    @property
    def output(self) -> ir.Value:
        """What the layer computes with its bias, in front of its own quantizer."""
        return (self.add or self.node).outputs[0]

    @property
    def axis(self) -> int:
        """The axis of the output's channels."""
        return 1 if self.layer.kind == "conv" else len(self.output.shape or ()) - 1

    @property
    def channels(self) -> int:
        weight, axis = self.layer.weight, self.layer.weight_axis
        assert weight is not None and weight.shape is not None and axis is not None
        size = weight.shape[axis]
        assert isinstance(size, int)  # it is a constant
        return size

    @property
    def bias(self) -> ir.Value | None:
        if self.add is not None:
            return next(v for v in self.add.inputs if v is not self.node.outputs[0])
        return self.node.inputs[2] if not is_op(self.node, "MatMul") and len(self.node.inputs) > 2 else None

    @property
    def table(self) -> tuple[ir.Value, ir.Value] | None:
        """(table `[rows, C]`, row index) where the bias is a row of a time table."""
        return None if self.bias is None else time_table(self.bias)

    def values(self) -> Doubles:
        """The bias: `[1, C]`, or all rows of its table."""
        if self.bias is None:
            return np.zeros((1, self.channels))
        table = self.table
        rows = numpy_of(self.bias)[None] if table is None else numpy_of(table[0])
        return rows.astype(np.float64)

    def fits(self, values: Doubles) -> bool:
        """Whether a bias, in the form of `values`, is an int32 at the scale that the kernel accumulates in."""
        x, w = (dequantizer(v) for v in self.node.inputs[:2])
        assert x is not None and w is not None and x.inputs[1] is not None and w.inputs[1] is not None
        finest = rows_and_index(x.inputs[1])[0].astype(np.float64).min() * numpy_of(w.inputs[1]).astype(np.float64)
        return bool(np.all(np.abs(values) <= INT32_LIMIT * finest))

    def with_bias(self, graph: ir.Graph, names: Names, values: Doubles) -> QuantizedLayer:
        """Write another bias, in the form of `values`; a MatMul without one gets its Add."""
        new, bias, table = values.astype(np.float32), self.bias, self.table
        if bias is None:
            return self._given(graph, names, new[0])
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

    def _given(self, graph: ir.Graph, names: Names, new: npt.NDArray[np.float32]) -> QuantizedLayer:
        out = self.node.outputs[0]
        name = name_of(out)
        if not is_op(self.node, "MatMul"):
            self.node.resize_inputs(3)
            self.node.replace_input_with(2, Builder(graph, names, self.node).constant(f"{name}_bias", new))
            return self
        build = Builder(graph, names, after=self.node)
        readers = [(use.node, use.idx) for use in out.uses()]
        added = build.op("Add", [out, build.constant(f"{name}_bias", new)], f"{name}_biased", like=out)
        take_over(graph, names, out, added, readers)
        return QuantizedLayer(self.layer, self.node, added.producer())


def take_over(
    graph: ir.Graph, names: Names, old: ir.Value, new: ir.Value, readers: Sequence[tuple[ir.Node, int]]
) -> None:
    """Make these readers of `old`, and the graph's output where it is one, read `new`, which gets its name: whoever
    asks for a value by its name gets the corrected one."""
    for node, index in readers:
        node.replace_input_with(index, new)
    if old.is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = new
    name = name_of(old)
    old.name, new.name = names.unique(f"{name}_uncorrected"), name


def quantized_layers(program: Program, where: str) -> Iterator[QuantizedLayer]:
    """The layers with constant weights that insert_qdq quantized, in the graph's order. Raises PassError."""
    assert program.float_model is not None
    nodes = {node.name: node for node in program.graph}
    for layer in layers(program.float_model.graph):
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
    """The Add of a constant `[out]` that alone reads the MatMul: the model's own, or one that a correction added."""
    readers = consumers(matmul.outputs[0])
    if matmul.outputs[0].is_graph_output() or len(readers) != 1 or not is_op(readers[0], "Add"):
        return None
    assert layer.weight is not None and layer.weight.shape is not None
    biases = [v for v in readers[0].inputs if v is not None and is_constant(v)]
    return readers[0] if biases and list(biases[0].shape or ()) == [layer.weight.shape[1]] else None


def with_float_twins(program: Program, found: Sequence[QuantizedLayer]) -> tuple[ir.Model, list[str]]:
    """A clone of the quantized graph with a second node beside each layer: float weights on the same quantized input.

    Returns the names of what those compute, without the bias of an Add.
    """
    clone = program.model.clone()
    graph, names = clone.graph, Names(clone.graph)
    nodes = {node.name: node for node in graph}
    made: list[str] = []
    for layer in found:
        node, weight = nodes[layer.node.name], layer.layer.weight
        assert weight is not None and weight.const_value is not None
        build = Builder(graph, names, after=node)
        inputs = [
            node.inputs[0],
            build.constant(f"{name_of(weight)}_float", _again(weight.const_value)),
            *node.inputs[2:],
        ]
        attributes = {name: a.value for name, a in node.attributes.items()}
        out = node.outputs[0]
        made.append(name_of(build.op(node.op_type, inputs, f"{name_of(out)}_float", like=out, attributes=attributes)))
    return clone, made


def _again(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same numbers under a name of their own; stored weights stay where they are."""
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
