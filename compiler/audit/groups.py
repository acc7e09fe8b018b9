"""Quantized groups of an ONNX file: what computes between DequantizeLinear and QuantizeLinear.

A file means a node to run on integers when it says so in one of three ways:

    an integer operation written directly          QLinearConv, QGemm, MatMulIntegerToFloat, ...
    a Conv, Gemm or MatMul with a dequantized input (a float constant beside it counts where a quantizer is behind)
    any other operation with all its data dequantized (by one scale each, no kernel has more), and read by quantizers
    alone

Data is dequantized, or quantized, also where operations that only move it lie between. A float operation that reads
dequantized data and hands float on (a norm behind a convolution, a sum that a shortcut reads, too) is meant to be
float: the quantizer behind it is its reader's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ..graph.nodes import consumers, is_op

MATRICES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Written directly, they are integers whatever stands around them.
WRITTEN = frozenset(
    {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
    | {"DynamicQuantizeMatMul", "QAttention", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSoftmax"}
    | {"QLinearSigmoid", "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearWhere"}
    | {"QLinearReduceMean"}
)
# onnxruntime drops the quantizers around these and moves the integers (measured).
MOVERS = (
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Flatten", "Gather", "Expand", "Tile"),
    *("DepthToSpace", "SpaceToDepth", "ReduceMax", "ReduceMin", "Resize", "Split", "Identity"),
)
PROPAGATING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Identity")
"""Of the movers, those past which onnxruntime carries a lone DequantizeLinear, or QuantizeLinear (measured)."""
ALL_INPUTS = ("Add", "Sub", "Mul", "Div", "Concat", "Where", "Min", "Max", "Sum", "Mean", "Pow")
# What computes nothing, or is a part of how scales are made.
_SILENT = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "Cast", "Shape", "Size")


def is_moving(node: ir.Node | None) -> bool:
    """Whether a node only moves data: Resize when it repeats the nearest value."""
    if node is None or not is_op(node, *MOVERS):
        return False
    mode = node.attributes.get("mode") if node.op_type == "Resize" else None
    return mode is None or mode.as_string() == "nearest"


def is_known(value: ir.Value | None) -> bool:
    """Whether a value follows from the file's constants alone, as onnxruntime sees when it builds the graph."""
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
    scale = node.inputs[1]
    assert scale is not None  # the operator's second input is not optional
    return scale


def per_channel(node: ir.Node) -> bool:
    """Whether a quantizer has more than one scale, as far as the file says."""
    scale = scale_of(node)
    shape = scale.const_value.shape if scale.const_value is not None else scale.shape
    sizes = [] if shape is None else list(shape)
    return any(isinstance(n, int) and n > 1 for n in sizes)


@dataclass(frozen=True, eq=False)
class Source:
    """Where a value comes from: the DequantizeLinear behind it, if there is one, and what moves its data between."""

    value: ir.Value
    dequantizer: ir.Node | None
    moved: tuple[ir.Node, ...]

    @property
    def known(self) -> bool:
        return is_known(self.value)


def source_of(value: ir.Value) -> Source:
    moved: list[ir.Node] = []
    node = value.producer()
    while node is not None and is_moving(node) and node.inputs[0] is not None:
        moved.append(node)
        node = node.inputs[0].producer()
    return Source(value, node if is_op(node, "DequantizeLinear") else None, tuple(moved))


@dataclass(frozen=True, eq=False)
class Readers:
    """What reads a value, also through what moves its data: quantizers (with what lies between), others, the graph."""

    quantizers: tuple[tuple[ir.Node, tuple[ir.Node, ...]], ...]
    others: tuple[ir.Node, ...]
    graph_output: bool


def readers_of(value: ir.Value) -> Readers:
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
            elif is_moving(node) and node.inputs[0] is at:
                todo += [(out, (*path, node)) for out in node.outputs]
            else:
                others.append(node)
    return Readers(tuple(quantizers), tuple(others), output)


@dataclass(frozen=True, eq=False)
class Group:
    """One node that computes. `data` are its inputs but for biases and parameters; `meant` says that it is quantized.

    `kernel` is the operation that runs it, "" when none does.
    """

    node: ir.Node
    data: tuple[Source, ...]
    readers: Readers
    meant: bool
    kernel: str = ""

    @property
    def written(self) -> bool:
        return self.node.op_type in WRITTEN

    @property
    def matrix(self) -> bool:
        return is_op(self.node, *MATRICES)

    @property
    def name(self) -> str:
        return called(self.node)


def called(node: ir.Node) -> str:
    """A node's name, or that of what it makes: files may leave nodes unnamed."""
    return node.name or next((v.name for v in node.outputs if v.name), "")


def groups(graph: ir.Graph, kernel_of: Callable[[ir.Node], str]) -> list[Group]:
    """All quantized groups of a file, and what else multiplies matrices in it, in the file's order."""
    found = []
    for node in graph.all_nodes():
        if is_op(node, *_SILENT):
            continue
        group = _group(node, kernel_of(node))
        if group.meant or group.matrix:
            found.append(group)
    return found


def _group(node: ir.Node, kernel: str) -> Group:
    data = _data(node)
    parts = [readers_of(v) for v in node.outputs]
    readers = Readers(
        tuple(q for part in parts for q in part.quantizers),
        tuple(n for part in parts for n in part.others),
        any(part.graph_output for part in parts),
    )
    if node.op_type in WRITTEN or kernel in WRITTEN:
        meant = True
    elif is_op(node, *MATRICES):
        loose = [source for source in data if source.dequantizer is None]
        weight = len(loose) == 1 and loose[0] is data[1] and loose[0].known
        meant = len(loose) < len(data) and (not weight or bool(readers.quantizers))
    else:
        fed = [source.dequantizer is not None for source in data if not source.known or source.dequantizer is not None]
        alike = not any(per_channel(source.dequantizer) for source in data if source.dequantizer is not None)
        alone = bool(readers.quantizers) and not readers.others and not readers.graph_output
        meant = bool(fed) and all(fed) and alike and alone
    return Group(node, data, readers, meant, kernel)


def _data(node: ir.Node) -> tuple[Source, ...]:
    if is_op(node, *MATRICES):
        inputs = list(node.inputs[:2])
    elif is_op(node, "Where"):
        inputs = list(node.inputs[1:])
    else:
        inputs = list(node.inputs) if is_op(node, *ALL_INPUTS) else list(node.inputs[:1])
    return tuple(source_of(value) for value in inputs if value is not None)
