"""What the rules of the fusion audit ask of a group: its scales, types and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.nodes import consumers, is_op, numpy_of
from .groups import Group, Source, is_known, is_moving, scale_of

Explanation = tuple[str, str]
"""(reason, fix) of a rule."""


def zero_point_of(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def constant_scale(node: ir.Node) -> bool:
    """Whether a quantizer's scale and zero point are known when the graph is built."""
    zero = zero_point_of(node)
    return is_known(scale_of(node)) and (zero is None or is_known(zero))


def stored_type(node: ir.Node) -> ir.DataType:
    """The type of the integers that a QuantizeLinear makes, or a DequantizeLinear reads."""
    zero = _type_of(zero_point_of(node))
    if zero is not None:
        return zero
    if is_op(node, "DequantizeLinear"):
        stored = node.inputs[0]
        kind = _type_of(stored)
        if kind is not None:
            return kind
        maker = stored.producer() if stored is not None else None
        if maker is not None and is_op(maker, "QuantizeLinear"):
            return stored_type(maker)
    elif "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int():
        return ir.DataType(node.attributes["output_dtype"].as_int())
    return ir.DataType.UINT8


def _type_of(value: ir.Value | None) -> ir.DataType | None:
    """A value's type; files need not say it of what lies inside, so a table that it is taken from may tell."""
    while value is not None and value.dtype is None:
        maker = value.producer()
        value = maker.inputs[0] if maker is not None and is_moving(maker) else None
    return None if value is None else value.dtype


def bits_of(node: ir.Node) -> int:
    return round(stored_type(node).itemsize * 8)


def is_signed(node: ir.Node) -> bool:
    return stored_type(node).is_signed()


def weight_axis(group: Group) -> int | None:
    """The axis of a weight that its scales may run along; None where there is no weight, or the kernel takes any."""
    if not group.matrix or len(group.data) < 2 or not group.data[1].known:
        return None
    if is_op(group.node, "Conv"):
        return 0
    if is_op(group.node, "Gemm") and "transB" in group.node.attributes and group.node.attributes["transB"].as_int():
        return 0
    return None if is_op(group.node, "ConvTranspose") else -1


def activations(group: Group) -> list[Source]:
    """The data of a group but for constant weights."""
    return [source for source in group.data if not source.known]


def quantizers(group: Group, *, weights: bool = True) -> list[ir.Node]:
    """The DequantizeLinear in front of a group and the QuantizeLinear behind it."""
    sources = group.data if weights else activations(group)
    return [*(s.dequantizer for s in sources if s.dequantizer), *(node for node, _ in group.readers.quantizers)]


def bias_of(group: Group) -> ir.Value | None:
    """What a layer adds: its own third input, or what a lone Add behind a MatMul brings (never another activation)."""
    if is_op(group.node, "MatMul"):
        found = sum_behind(group.node)
        return None if found is None else found[1]
    if not is_op(group.node, "Conv", "Gemm", "ConvTranspose") or len(group.node.inputs) < 3:
        return None
    return group.node.inputs[2]


def sum_behind(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """(Add, bias) when a MatMul by a matrix is read by nothing but an Add of a vector."""
    readers = consumers(node.outputs[0])
    if len(readers) != 1 or not is_op(readers[0], "Add") or node.outputs[0].is_graph_output():
        return None
    other = [v for v in readers[0].inputs if v is not None and v is not node.outputs[0]]
    if len(other) != 1:
        return None
    stored = other[0]
    maker = stored.producer()
    if maker is not None and is_op(maker, "DequantizeLinear") and maker.inputs[0] is not None:
        stored = maker.inputs[0]
    shape = stored.const_value.shape if stored.const_value is not None else stored.shape
    return (readers[0], other[0]) if shape is not None and len(shape) == 1 else None


def array_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """A constant's numbers; None for what is not stored as such."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return numpy_of(value)
    node = value.producer()
    if node is not None and is_op(node, "Constant") and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    return None
