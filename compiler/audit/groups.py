"""Quantized groups of an ONNX file: nodes between DequantizeLinear and QuantizeLinear.

A node of a file is meant to run on integers in one of three cases:

1. It is an integer operation written directly: QLinearConv, QGemm, MatMulIntegerToFloat, ...
2. It is a Conv, Gemm or MatMul with a dequantized input. If the other input is a float constant, its output must be
   quantized too.
3. It is any other operation, all its data is dequantized by one scale each (no kernel has more), and all readers of its
   output are quantizers.

Data also counts as dequantized, or quantized, where operations that only move it lie between. A float operation on
dequantized data with a float reader (a norm behind a convolution, a sum that a shortcut also reads) is meant to be
float: the quantizer behind it belongs to that quantizer's reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ..graph.nodes import consumers, is_op
from ..graph.require import required

MATRICES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Case 1: operations on integers, whatever surrounds them.
WRITTEN = frozenset(
    {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
    | {"DynamicQuantizeMatMul", "QAttention", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSoftmax"}
    | {"QLinearSigmoid", "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearWhere"}
    | {"QLinearReduceMean"}
)
# Float operations of onnxruntime that compute two matrix products and more at once.
FUSED_ATTENTION = frozenset({"MultiHeadAttention"})
# onnxruntime drops the quantizers around these and moves the integers (measured).
ORT_MOVERS = (
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Flatten", "Gather", "Expand", "Tile"),
    *("DepthToSpace", "SpaceToDepth", "ReduceMax", "ReduceMin", "Resize", "Split", "Identity"),
)
PROPAGATING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Identity")
"""The movers past which onnxruntime carries a lone DequantizeLinear, or QuantizeLinear (measured)."""
ALL_INPUTS = ("Add", "Sub", "Mul", "Div", "Concat", "Where", "Min", "Max", "Sum", "Mean", "Pow")
# Nodes that compute nothing, or only scales.
_SILENT = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "Cast", "Shape", "Size")


def is_ort_mover(node: ir.Node | None) -> bool:
    """Return whether a node is one of ORT_MOVERS; a Resize only with mode "nearest"."""
    if node is None or not is_op(node, *ORT_MOVERS):
        return False
    mode = node.attributes.get("mode") if node.op_type == "Resize" else None
    return mode is None or mode.as_string() == "nearest"


def is_known(value: ir.Value | None) -> bool:
    """Return whether a value depends on the file's constants only: onnxruntime computes it when it builds the graph."""
    todo, seen = [value], set[ir.Value]()
    while todo:
        value = todo.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            return False
        node = value.producer()
        if value.const_value is None and node is None:
            return False
        if node is not None:
            todo += node.inputs
    return True


def scale_of(node: ir.Node) -> ir.Value:
    """Return a quantizer's scale."""
    return required(node.inputs[1], "the scale", node)


def per_channel(node: ir.Node) -> bool:
    """Return whether a quantizer has more than one scale, as far as the file states shapes."""
    scale = scale_of(node)
    shape = scale.const_value.shape if scale.const_value is not None else scale.shape
    sizes = [] if shape is None else list(shape)
    return any(isinstance(n, int) and n > 1 for n in sizes)


@dataclass(frozen=True, eq=False)
class DataOrigin:
    """The origin of a value's data: its DequantizeLinear, or None, and the movers between the two."""

    value: ir.Value
    dequantizer: ir.Node | None
    moved: tuple[ir.Node, ...]

    @property
    def known(self) -> bool:
        """Return whether the value depends on constants only."""
        return is_known(self.value)

    @property
    def maker(self) -> ir.Node | None:
        """Return the node that makes the data, in front of the movers, or None."""
        value = self.moved[-1].inputs[0] if self.moved else self.value
        return None if value is None else value.producer()


def origin_of(value: ir.Value) -> DataOrigin:
    """Follow a value's data back past movers."""
    moved: list[ir.Node] = []
    node = value.producer()
    while node is not None and is_ort_mover(node) and node.inputs[0] is not None:
        moved.append(node)
        node = node.inputs[0].producer()
    return DataOrigin(value, node if is_op(node, "DequantizeLinear") else None, tuple(moved))


@dataclass(frozen=True, eq=False)
class Readers:
    """The readers of a value, past movers: quantizers (each with the movers between), other nodes, the graph."""

    quantizers: tuple[tuple[ir.Node, tuple[ir.Node, ...]], ...]
    others: tuple[ir.Node, ...]
    graph_output: bool


def readers_of(value: ir.Value) -> Readers:
    """Follow a value's data to its readers, past movers."""
    quantizers: list[tuple[ir.Node, tuple[ir.Node, ...]]] = []
    others: list[ir.Node] = []
    output = False
    todo: list[tuple[ir.Value, tuple[ir.Node, ...]]] = [(value, ())]
    while todo:
        at, path = todo.pop(0)
        output = output or at.is_graph_output()
        for node in consumers(at):
            if is_op(node, "QuantizeLinear"):
                quantizers.append((node, path))
            elif is_ort_mover(node) and node.inputs[0] is at:
                todo += [(out, (*path, node)) for out in node.outputs]
            else:
                others.append(node)
    return Readers(tuple(quantizers), tuple(others), output)


@dataclass(frozen=True, eq=False)
class FusionGroup:
    """One node that computes. `data` are its inputs without biases and parameters.

    `meant` is whether the file means it to run on integers (see the module's cases); `kernel` is the operation that
    runs it, "" when none does.
    """

    node: ir.Node
    data: tuple[DataOrigin, ...]
    readers: Readers
    meant: bool
    kernel: str = ""

    @property
    def written(self) -> bool:
        """Return whether the file itself has an integer operation here (case 1)."""
        return self.node.op_type in WRITTEN

    @property
    def matrix(self) -> bool:
        return is_op(self.node, *MATRICES)

    @property
    def name(self) -> str:
        return node_label(self.node)


def node_label(node: ir.Node) -> str:
    """Return a node's name, or that of its first named output: files may leave nodes unnamed."""
    return node.name or next((v.name for v in node.outputs if v.name), "")


def groups(graph: ir.Graph, kernel_of: Callable[[ir.Node], str]) -> list[FusionGroup]:
    """Return all quantized groups of a file, its other matrix products and its fused ones, in the file's order."""
    result = []
    for node in graph.all_nodes():
        if is_op(node, *_SILENT):
            continue
        group = _group(node, kernel_of(node))
        if group.meant or group.matrix or node.op_type in FUSED_ATTENTION:
            result.append(group)
    return result


def _group(node: ir.Node, kernel: str) -> FusionGroup:
    data = _data(node)
    by_output = [readers_of(v) for v in node.outputs]
    readers = Readers(
        tuple(q for part in by_output for q in part.quantizers),
        tuple(n for part in by_output for n in part.others),
        any(part.graph_output for part in by_output),
    )
    if node.op_type in WRITTEN or kernel in WRITTEN:
        meant = True  # case 1
    elif node.op_type in FUSED_ATTENTION:
        meant = False
    elif is_op(node, *MATRICES):  # case 2
        in_float = [origin for origin in data if origin.dequantizer is None]
        float_weight = len(in_float) == 1 and in_float[0] is data[1] and in_float[0].known
        meant = len(in_float) < len(data) and (not float_weight or bool(readers.quantizers))
    else:  # case 3
        dequantizers = [origin.dequantizer for origin in data if not origin.known or origin.dequantizer is not None]
        one_scale_each = all(dq is not None and not per_channel(dq) for dq in dequantizers)
        all_quantized = bool(readers.quantizers) and not readers.others and not readers.graph_output
        meant = bool(dequantizers) and one_scale_each and all_quantized
    return FusionGroup(node, data, readers, meant, kernel)


def _data(node: ir.Node) -> tuple[DataOrigin, ...]:
    if is_op(node, *MATRICES):
        inputs = list(node.inputs[:2])
    elif is_op(node, "Where"):
        inputs = list(node.inputs[1:])
    else:
        inputs = list(node.inputs) if is_op(node, *ALL_INPUTS) else list(node.inputs[:1])
    return tuple(origin_of(value) for value in inputs if value is not None)
