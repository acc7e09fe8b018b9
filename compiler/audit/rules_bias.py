"""Rules of the fusion audit about biases.

Integer kernels add an int32 bias to their int32 accumulator, so its scale must be x_scale * w_scale. onnxruntime rounds
a float bias to it when the graph is built, but only with a quantizer behind the layer, and without a check that the
integers fit (measured: an output channel with zero weights and a bias of 3 gives 0). A Conv whose bias has another
scale stays in float; a Gemm fuses, and reads the integers with the wrong scale (measured: an error of 0.06 on 1.7).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.nodes import is_op, name_of
from .facts import Explanation, array_of, bias_of, stored_type, sum_behind, zero_point_of
from .groups import FusionGroup, is_known, scale_of

TOLERANCE = 0.01  # of onnxruntime's own check
_INT32_MAX = 2**31 - 1
_SUM_ROOM = 2.0**30  # worst cases beyond it do not occur: biases may fill the other half
_BOTH = "write the bias as int32 behind a DequantizeLinear of scale x_scale * w_scale"


def _dequantized(bias: ir.Value) -> ir.Node | None:
    node = bias.producer()
    return node if is_op(node, "DequantizeLinear") else None


def product_and_sum(group: FusionGroup) -> Explanation | None:
    """onnxruntime turns MatMul + Add into a Gemm between two Reshapes before it reads the quantizers."""
    if not is_op(group.node, "MatMul") or group.kernel not in ("Gemm", "FusedGemm", "MatMulNBits"):
        return None
    add_and_bias = sum_behind(group.node)
    if add_and_bias is None:
        return None
    add, bias = add_and_bias
    dq = _dequantized(bias)
    run_time = not all(is_known(scale_of(s.dequantizer)) for s in group.data if s.dequantizer is not None)
    kind = "in float" if dq is None else "dequantized"
    late = " with run-time scales" if run_time else ""
    return (
        f"onnxruntime makes one {group.kernel} of it and of {name_of(add.outputs[0])!r}, which adds "
        f"{name_of(bias)!r} {kind}{late}",
        ("write MatMulIntegerToFloat with that bias, or put a quantizer between the MatMul and the Add")
        if run_time
        else f"{_BOTH}, or write MatMulIntegerToFloat",
    )


def bias_type(group: FusionGroup) -> Explanation | None:
    bias = bias_of(group)
    dq = None if bias is None else _dequantized(bias)
    if bias is None or dq is None or stored_type(dq) == ir.DataType.INT32 or not group.matrix:
        return None
    return f"its bias {name_of(bias)!r} is stored as {stored_type(dq).name}, kernels add int32", _BOTH


def bias_scale(group: FusionGroup) -> Explanation | None:
    bias = bias_of(group)
    dq = None if bias is None else _dequantized(bias)
    if bias is None or dq is None or not group.matrix or any(s.dequantizer is None for s in group.data):
        return None
    factors = [scale_of(s.dequantizer) for s in group.data if s.dequantizer is not None]
    scale = scale_of(dq)
    if not all(is_known(factor) for factor in factors):
        if is_op(group.node, "Conv") or is_known(scale):
            return (
                f"its bias {name_of(bias)!r} needs a constant scale equal to x_scale * w_scale, and "
                f"{name_of(next(f for f in factors if not is_known(f)))!r} is known at run time only",
                "write QLinearConv or MatMulIntegerToFloat with a bias from a table, or add the bias behind the layer",
            )
        return None
    if not is_known(scale):
        return (
            f"the scale {name_of(scale)!r} of its bias is known at run time only",
            f"make it a constant equal to x_scale * w_scale ({' * '.join(name_of(f) for f in factors)})",
        )
    arrays = [array_of(factor) for factor in factors]
    stored_scale, zero = array_of(scale), zero_point_of(dq)
    if stored_scale is not None and arrays[0] is not None and arrays[1] is not None:
        right = arrays[0].astype(np.float64) * arrays[1].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            off = float(np.max(np.abs(stored_scale.astype(np.float64) / right - 1)))
        if not off <= TOLERANCE:
            silently = "" if is_op(group.node, "Conv") else "; an integer kernel ignores that and is silently wrong"
            return (
                f"the scale {name_of(scale)!r} of its bias is {off:.1%} off x_scale * w_scale{silently}",
                f"store round(bias / ({' * '.join(name_of(f) for f in factors)})), and that product as its scale",
            )
    stored = array_of(zero)
    if stored is not None and bool(np.any(stored)):
        return f"the zero point {name_of(zero)!r} of its bias is not 0", "store the bias around 0, without a zero point"
    return None


def float_bias(group: FusionGroup) -> Explanation | None:
    bias = bias_of(group)
    if bias is None or _dequantized(bias) is not None or not group.matrix or is_op(group.node, "MatMul"):
        return None
    run_time = [s.dequantizer for s in group.data if s.dequantizer and not is_known(scale_of(s.dequantizer))]
    if run_time:
        return (
            f"its bias {name_of(bias)!r} is float, and the scale {name_of(scale_of(run_time[0]))!r} that would make it "
            "an integer is known at run time only",
            "write QLinearConv or MatMulIntegerToFloat with a bias from a table, or add the bias behind the layer",
        )
    if not is_known(bias) or not group.readers.quantizers:
        missing = "not constant" if not is_known(bias) else "float, and no QuantizeLinear follows"
        return f"its bias {name_of(bias)!r} is {missing}", _BOTH
    return None


def bias_overflow(group: FusionGroup) -> Explanation | None:
    """The integers of the bias, with the largest sum that the weights can make, pass int32."""
    bias = _integer_bias(group)
    if bias is None:
        return None
    name, integers, weight = bias
    largest = float(np.max(np.abs(integers), initial=0.0))
    room = 0.0 if weight is None else min(_largest_sum(group, weight), _SUM_ROOM)
    if largest + room <= _INT32_MAX:
        return None
    return (
        f"its bias {name!r} would be the integer {largest:.4g}, which does not fit into int32 with the sum that it is "
        "added to: the kernel is silently wrong",
        "raise the scale of the weight, or of the input, until it fits, or take the quantizers of this layer away",
    )


def _integer_bias(group: FusionGroup) -> tuple[str, npt.NDArray[Any], npt.NDArray[Any] | None] | None:
    """Return (name, integers, integers of the weight) of a bias that is known, as the kernel adds it, or None."""
    node = group.node
    if group.written:
        place = {"QLinearConv": 8, "QGemm": 6}.get(node.op_type)
        bias = None if place is None or len(node.inputs) <= place else node.inputs[place]
        stored = array_of(bias)
        return None if bias is None or stored is None else (name_of(bias), stored, array_of(node.inputs[3]))
    bias = bias_of(group)
    if bias is None or group.kernel not in ("QLinearConv", "QGemm"):
        return None
    weight = group.data[1].dequantizer if len(group.data) > 1 else None
    weights = None if weight is None else array_of(weight.inputs[0])
    dq = _dequantized(bias)
    if dq is not None:
        stored = array_of(dq.inputs[0])
        return None if stored is None or stored.dtype != np.int32 else (name_of(bias), stored, weights)
    values = array_of(bias)
    factors = [None if s.dequantizer is None else array_of(scale_of(s.dequantizer)) for s in group.data]
    if values is None or len(factors) < 2 or factors[0] is None or factors[1] is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        integers = np.rint(values.astype(np.float64) / (factors[0].astype(np.float64) * factors[1].astype(np.float64)))
    return name_of(bias), np.nan_to_num(integers, nan=0.0, posinf=np.inf, neginf=-np.inf), weights


def _largest_sum(group: FusionGroup, weight: npt.NDArray[Any]) -> float:
    """Return the largest sum of one output channel: each 8-bit input at its end."""
    axis = weight.ndim - 1 if is_op(group.node, "MatMul") else 0
    if is_op(group.node, "Gemm") and not ("transB" in group.node.attributes and group.node.attributes["transB"].value):
        axis = weight.ndim - 1
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    return 255.0 * float(np.abs(rows.astype(np.float64)).sum(axis=1).max(initial=0.0))
