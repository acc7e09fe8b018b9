"""Properties of a group that the rules of the fusion audit read: its scales, types and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.nodes import consumers, is_op, numpy_of
from .groups import DataOrigin, FusionGroup, is_known, is_ort_mover, scale_of

Explanation = tuple[str, str]
"""(reason, fix) of a rule."""


def zero_point_of(node: ir.Node) -> ir.Value | None:
    """Return a quantizer's zero point, or None when it has none."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def constant_scale(node: ir.Node) -> bool:
    """Return whether a quantizer's scale and zero point are known when the graph is built."""
    zero = zero_point_of(node)
    return is_known(scale_of(node)) and (zero is None or is_known(zero))


def stored_type(node: ir.Node) -> ir.DataType:
    """Return the type of the integers that a QuantizeLinear writes, or a DequantizeLinear reads."""
    zero = _type_of(zero_point_of(node))
    if zero is not None:
        return zero
    if is_op(node, "DequantizeLinear"):
        stored = node.inputs[0]
        dtype = _type_of(stored)
        if dtype is not None:
            return dtype
        quantize = stored.producer() if stored is not None else None
        if quantize is not None and is_op(quantize, "QuantizeLinear"):
            return stored_type(quantize)
    elif "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int():
        return ir.DataType(node.attributes["output_dtype"].as_int())
    return ir.DataType.UINT8


def _type_of(value: ir.Value | None) -> ir.DataType | None:
    """Return a value's type, or that of the data moved into it: files may omit the types of inner values."""
    while value is not None and value.dtype is None:
        mover = value.producer()
        value = mover.inputs[0] if mover is not None and is_ort_mover(mover) else None
    return None if value is None else value.dtype


def bits_of(node: ir.Node) -> int:
    """Return the bits of a quantizer's integers."""
    return round(stored_type(node).itemsize * 8)


def is_signed(node: ir.Node) -> bool:
    """Return whether a quantizer's integers are signed."""
    return stored_type(node).is_signed()


def weight_axis(group: FusionGroup) -> int | None:
    """Return the axis along which a weight's scales must run, or None without a weight or such a restriction."""
    if not group.matrix or len(group.data) < 2 or not group.data[1].known:
        return None
    if is_op(group.node, "Conv"):
        return 0
    if is_op(group.node, "Gemm") and "transB" in group.node.attributes and group.node.attributes["transB"].as_int():
        return 0
    return None if is_op(group.node, "ConvTranspose") else -1


def activations(group: FusionGroup) -> list[DataOrigin]:
    """Return the data of a group without its constant weights."""
    return [origin for origin in group.data if not origin.known]


def group_quantizers(group: FusionGroup, *, weights: bool = True) -> list[ir.Node]:
    """Return the DequantizeLinear nodes in front of a group and the QuantizeLinear nodes behind it."""
    origins = group.data if weights else activations(group)
    dequantizers = [origin.dequantizer for origin in origins if origin.dequantizer]
    return [*dequantizers, *(node for node, _ in group.readers.quantizers)]


def bias_of(group: FusionGroup) -> ir.Value | None:
    """Return a layer's bias: its own third input, or the vector that the only reader of a MatMul, an Add, adds."""
    if is_op(group.node, "MatMul"):
        add_and_bias = sum_behind(group.node)
        return None if add_and_bias is None else add_and_bias[1]
    if not is_op(group.node, "Conv", "Gemm", "ConvTranspose") or len(group.node.inputs) < 3:
        return None
    return group.node.inputs[2]


def sum_behind(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Return (Add, bias) when the only reader of a MatMul is an Add of a vector, else None."""
    readers = consumers(node.outputs[0])
    if len(readers) != 1 or not is_op(readers[0], "Add") or node.outputs[0].is_graph_output():
        return None
    other = [v for v in readers[0].inputs if v is not None and v is not node.outputs[0]]
    if len(other) != 1:
        return None
    stored = other[0]
    dequantize = stored.producer()
    if dequantize is not None and is_op(dequantize, "DequantizeLinear") and dequantize.inputs[0] is not None:
        stored = dequantize.inputs[0]
    shape = stored.const_value.shape if stored.const_value is not None else stored.shape
    return (readers[0], other[0]) if shape is not None and len(shape) == 1 else None


def array_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return the numbers of a constant, or None for a value that is computed."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return numpy_of(value)
    node = value.producer()
    if node is not None and is_op(node, "Constant") and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    return None


def quantizer_grid(node: ir.Node) -> tuple[object, ...]:
    """Return what two quantizers have in common if they have one grid: scale and zero point, as numbers if constant."""
    pair = (scale_of(node), zero_point_of(node))
    arrays = [array_of(value) for value in pair]
    return tuple(
        id(value) if array is None else (array.tobytes(), array.dtype.str)
        for value, array in zip(pair, arrays, strict=True)
    )
