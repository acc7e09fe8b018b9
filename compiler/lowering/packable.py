"""Which constants of a lowered graph can be stored in fewer bytes (compiler/lowering/packing.py)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.nodes import is_constant, is_op, numpy_of
from .sparse_packing import SparseForm

# A node takes 150 to 250 bytes of the file, mostly names, and some time at each start.
SMALLEST_SAVING = 512
_INTEGER_OPS = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "MatMulIntegerToFloat")
_FLOAT_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LOOK_FIRST = 4096  # values of a large float constant that are checked before the others


def has_sparse_floats(model: ir.Model) -> bool:
    """Return whether a float weight of a graph is smaller as a bit for each value, and the others."""
    weights = [value for value in model.graph.initializers.values() if is_float_weight(value)]
    return any(SparseForm.of(numpy_of(value), 32) is not None for value in weights)


def is_half(value: ir.Value) -> bool:
    """Return whether a constant is a large enough float constant that is exact in half precision."""
    tensor = value.const_value
    if tensor is None or not is_float_constant(value) or tensor.nbytes // 2 < SMALLEST_SAVING:
        return False
    array = numpy_of(value)
    first = array.reshape(-1)[:_LOOK_FIRST]
    return all(np.array_equal(part, rounded_to_half(part)) for part in (first, array))


def is_float_constant(value: ir.Value) -> bool:
    """Return whether a value is a float32 constant that no integer operation reads (as scale, bias or weight)."""
    if not is_constant(value) or value.is_graph_output() or value.dtype != ir.DataType.FLOAT:
        return False
    return bool(value.uses()) and not any(node.op_type in _INTEGER_OPS for node, _ in value.uses())


def is_float_weight(value: ir.Value) -> bool:
    """Return whether a value is a float constant that only layers read."""
    return is_float_constant(value) and all(is_op(node, *_FLOAT_LAYERS) for node, _ in value.uses())


def rounded_to_half(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the nearest values of half precision, as float32; infinite beyond 65504."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def integer_weights(graph: ir.Graph) -> Iterator[tuple[ir.Value, int]]:
    """Yield the int8 weights of integer layers, with the axis of their output channels."""
    for value in graph.initializers.values():
        if not is_constant(value) or value.dtype != ir.DataType.INT8 or value.is_graph_output():
            continue
        axes = {_weight_axis(node, index, value) for node, index in value.uses()}
        axis = axes.pop() if len(axes) == 1 else None  # None if readers disagree on the axis
        if axis is not None:
            yield value, axis


def _weight_axis(node: ir.Node, index: int, value: ir.Value) -> int | None:
    """Return the axis of the output channels if a node's input is a layer's weight, else None."""
    rank = 0 if value.shape is None else len(value.shape)
    if is_op(node, "DequantizeLinear") and index == 0:
        axes = {_weight_axis(reader, at, value) for reader, at in node.outputs[0].uses()}
        return axes.pop() if len(axes) == 1 else None
    if (is_op(node, "QLinearConv") and index == 3) or (is_op(node, "Conv") and index == 1):
        return 0
    if is_op(node, "Gemm") and index == 1 and "transB" in node.attributes and node.attributes["transB"].as_int():
        return 0
    if index == 1 and (is_op(node, "MatMul", "Gemm") or node.op_type == "MatMulIntegerToFloat"):
        return rank - 1
    return None


def is_table(value: ir.Value) -> bool:
    """Return whether a value is a constant of wide integers that only Gathers read."""
    if not is_constant(value) or value.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
        return False
    return bool(value.uses()) and all(is_op(node, "Gather") and index == 0 for node, index in value.uses())
