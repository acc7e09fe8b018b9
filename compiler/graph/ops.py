"""Traits of operations: which nodes are layers, which of their inputs are quantized and along which axis, and which
nodes only move data.

A *layer* can become an integer kernel: a Conv, Gemm or MatMul with constant weights, or a MatMul of two activations
(attention). The fields of `Layer` state the requirements of the CPU provider, so that passes need not repeat them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from .nodes import consumers, is_constant, is_op, known_ints, name_of
from .require import required

LayerKind = Literal["conv", "linear", "attention"]

BRANCH = "mezzotint.branch"
"""A node's metadata: the name of the layer that it computes a part of low rank for, in float. It is no layer itself."""
BRANCH_REASON = "branch of low rank"
ROTATION = "mezzotint.rotation"
"""A node's metadata: the name of a layer whose input it rotates, in float. It is no layer itself."""

# Operations that move data: they run on 8-bit values, and quantizing before or after them gives the same numbers.
MOVERS = ("Transpose", "Reshape", "Resize", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True, eq=False)
class Layer:
    """A candidate for an integer kernel.

    activations  the inputs that are quantized per tensor
    weight       the constant input, quantized per output channel along `weight_axis`
    bias         a constant `[out]`: an input of the node, or of the Add behind it (`bias_add`)
    output       the value of the layer with its bias
    """

    node: ir.Node
    kind: LayerKind
    activations: tuple[ir.Value, ...]
    weight: ir.Value | None
    weight_axis: int | None
    bias: ir.Value | None
    bias_add: ir.Node | None
    output: ir.Value

    @property
    def output_quantized(self) -> bool:
        """Return whether the integer kernel exists only with a quantized output, which is so for convolutions."""
        return self.kind == "conv"

    @property
    def name(self) -> str:
        """Return the name of the node, or of its first output where the node has none."""
        return self.node.name or name_of(self.node.outputs[0])

    def require_weight(self) -> ir.Value:
        """Return the constant weight. Raise PassError for a product of two activations."""
        return required(self.weight, "a constant weight", self.node)

    def require_weight_axis(self) -> int:
        """Return the axis of the weight's output channels. Raise PassError for a product of two activations."""
        return required(self.weight_axis, "the axis of the weight's output channels", self.node)


def over_tokens(layer: Layer) -> bool:
    """Return whether a layer multiplies tokens `[batch, ..., tokens, channels]` by a constant weight."""
    shape = layer.activations[0].shape
    return layer.kind == "linear" and is_op(layer.node, "MatMul") and shape is not None and len(shape) > 2


def is_mover(node: ir.Node) -> bool:
    """Return whether a node only moves 8-bit values. Resize does so when it repeats the nearest value."""
    if not is_op(node, *MOVERS):
        return False
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    return True


def layers(graph: ir.Graph) -> Iterator[Layer]:
    """Yield all layers of a graph, in the order of its nodes."""
    for node in graph:
        layer = layer_of(node)
        if layer is not None:
            yield layer


def transposed_layer(node: ir.Node) -> Layer | None:
    """Return a transposed convolution as a layer, or None for any other node and for one with computed weights.

    It has no integer kernel, so `layers` leaves it out: only its weight `[C_in, C_out / groups, ...]` is quantized. The
    output channels are along axis 1. With groups, one index of that axis is a channel of every group; the scales are
    along axis 0, where each index belongs to one group only.
    """
    if not is_op(node, "ConvTranspose") or node.inputs[0] is None or not _is_weight(node.inputs[1]):
        return None
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    axis = 1 if groups == 1 else 0
    return Layer(node, "conv", (node.inputs[0],), node.inputs[1], axis, None, None, node.outputs[0])


def layer_of(node: ir.Node) -> Layer | None:
    """Return the layer of a node, or None for a node that cannot become an integer kernel."""
    if BRANCH in node.metadata_props or ROTATION in node.metadata_props:
        return None
    if is_op(node, "Conv"):
        return _conv(node)
    if is_op(node, "Gemm"):
        return _gemm(node)
    if is_op(node, "MatMul"):
        return _matmul(node)
    return None


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and is_constant(value) and value.dtype == ir.DataType.FLOAT


def time_table(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return (table `[rows, C]`, row index `[1]`) for a value `[C]` that depends on the timestep only, else None.

    The form is that of fold_time: Reshape(Gather(table, row), [-1]).
    """
    reshape = value.producer()
    if reshape is None or not is_op(reshape, "Reshape") or reshape.inputs[0] is None:
        return None
    gather = reshape.inputs[0].producer()
    if gather is None or not is_op(gather, "Gather"):
        return None
    table, row = gather.inputs[0], gather.inputs[1]
    if table is None or row is None or not _is_weight(table) or is_constant(row):
        return None
    return table, row


def _conv(node: ir.Node) -> Layer | None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if x is None or not _is_weight(weight) or (bias is not None and not _is_weight(bias) and time_table(bias) is None):
        return None
    return Layer(node, "conv", (x,), weight, 0, bias, None, node.outputs[0])


def _gemm(node: ir.Node) -> Layer | None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain = all(
        node.attributes[name].value == value
        for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
        if name in node.attributes
    )
    if x is None or not plain or not _is_weight(weight) or (bias is not None and not _is_weight(bias)):
        return None
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return Layer(node, "linear", (x,), weight, 0 if transposed else 1, bias, None, node.outputs[0])


def _matmul(node: ir.Node) -> Layer | None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or x.dtype != ir.DataType.FLOAT:
        return None
    if not is_constant(weight):
        return (
            None if is_constant(x) else Layer(node, "attention", (x, weight), None, None, None, None, node.outputs[0])
        )
    if not _is_weight(weight) or weight.shape is None or len(weight.shape) != 2:
        return None
    add, bias = _bias_behind(node, weight)
    return Layer(node, "linear", (x,), weight, 1, bias, add, node.outputs[0] if add is None else add.outputs[0])


def _bias_behind(node: ir.Node, weight: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the Add of a constant `[out]`, if it is the only reader of the MatMul, and the constant; else two None."""
    readers = consumers(node.outputs[0])
    if node.outputs[0].is_graph_output() or len(readers) != 1 or not is_op(readers[0], "Add"):
        return None, None
    other = [v for v in readers[0].inputs if v is not node.outputs[0]]
    width = known_ints(weight.shape, [1])
    if len(other) == 1 and _is_weight(other[0]) and other[0] is not None:
        shape = other[0].shape
        if shape is not None and width is not None and list(shape) == width:
            return readers[0], other[0]
    return None, None


def float_reason(node: ir.Node) -> str | None:
    """Return why a matrix multiplication cannot become an integer kernel, or None for every other node."""
    if BRANCH in node.metadata_props:
        return f"{BRANCH_REASON} beside {node.metadata_props[BRANCH]!r}"
    if ROTATION in node.metadata_props:
        return f"rotation of the channels that {node.metadata_props[ROTATION]!r} reads"
    if is_op(node, "Conv", "Gemm", "MatMul") and layer_of(node) is None:
        return "its weights are not constant, or its attributes have no integer kernel"
    if is_op(node, "ConvTranspose"):
        return "onnxruntime has no integer kernel for transposed convolutions, and lower_transposed left it as it is"
    return None
