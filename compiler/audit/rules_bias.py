"""Rules of the fusion audit about biases.

Integer kernels add an int32 bias to what they accumulate, so its scale is x_scale * w_scale, with no choice. A float
bias is rounded to that when the graph is built, but only with a quantizer behind the layer. A Conv whose bias has
another scale stays in float; a Gemm fuses, and takes the integers for what they are not (measured: 0.06 on 1.7).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.nodes import is_op, name_of
from .facts import Explanation, array_of, bias_of, stored_type, sum_behind, zero_point_of
from .groups import Group, is_known, scale_of

TOLERANCE = 0.01  # of onnxruntime's own check
_BOTH = "write the bias as int32 behind a DequantizeLinear of scale x_scale * w_scale"


def _dequantized(bias: ir.Value) -> ir.Node | None:
    maker = bias.producer()
    return maker if maker is not None and is_op(maker, "DequantizeLinear") else None


def product_and_sum(group: Group) -> Explanation | None:
    """MatMul + Add becomes a Gemm before quantizers are looked at, with a Reshape on either side."""
    if not is_op(group.node, "MatMul") or group.kernel not in ("Gemm", "FusedGemm", "MatMulNBits"):
        return None
    found = sum_behind(group.node)
    if found is None:
        return None
    add, bias = found
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


def bias_type(group: Group) -> Explanation | None:
    bias = bias_of(group)
    dq = None if bias is None else _dequantized(bias)
    if bias is None or dq is None or stored_type(dq) == ir.DataType.INT32 or not group.matrix:
        return None
    return f"its bias {name_of(bias)!r} is stored as {stored_type(dq).name}, kernels add int32", _BOTH


def bias_scale(group: Group) -> Explanation | None:
    bias = bias_of(group)
    dq = None if bias is None else _dequantized(bias)
    if bias is None or dq is None or not group.matrix or any(s.dequantizer is None for s in group.data):
        return None
    parts = [scale_of(s.dequantizer) for s in group.data if s.dequantizer is not None]
    scale = scale_of(dq)
    if not all(is_known(part) for part in parts):
        if is_op(group.node, "Conv") or is_known(scale):
            return (
                f"its bias {name_of(bias)!r} needs a constant scale equal to x_scale * w_scale, and "
                f"{name_of(next(p for p in parts if not is_known(p)))!r} is known at run time only",
                "write QLinearConv or MatMulIntegerToFloat with a bias from a table, or add the bias behind the layer",
            )
        return None
    if not is_known(scale):
        return (
            f"the scale {name_of(scale)!r} of its bias is known at run time only",
            f"make it a constant equal to x_scale * w_scale ({' * '.join(name_of(p) for p in parts)})",
        )
    arrays = [array_of(part) for part in parts]
    given, zero = array_of(scale), zero_point_of(dq)
    if given is not None and arrays[0] is not None and arrays[1] is not None:
        right = arrays[0].astype(np.float64) * arrays[1].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            off = float(np.max(np.abs(given.astype(np.float64) / right - 1)))
        if not off <= TOLERANCE:
            silently = "" if is_op(group.node, "Conv") else ": an integer kernel takes it for that, and errs silently"
            return (
                f"the scale {name_of(scale)!r} of its bias is {off:.1%} off x_scale * w_scale{silently}",
                f"store round(bias / ({' * '.join(name_of(p) for p in parts)})), and that product as its scale",
            )
    stored = array_of(zero)
    if stored is not None and bool(np.any(stored)):
        return f"the zero point {name_of(zero)!r} of its bias is not 0", "store the bias around 0, without a zero point"
    return None


def float_bias(group: Group) -> Explanation | None:
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
