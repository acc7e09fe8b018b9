"""Why onnxruntime leaves a quantized group in float: one small rule for each reason, with a fix.

A rule explains a kernel, it does not predict one. It is asked only about groups that the built graph runs in float, or,
where `broken` is set, on an integer kernel that computes something else than the file says. The first rule that
explains a group gives the reason; there may be another behind it. Each rule was measured on onnxruntime 1.31.1 (CPU,
x64) with a model that fails by it and a fixed twin. `source` names the file of onnxruntime that decides, below
onnxruntime/core/optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph.nodes import is_op, name_of
from .facts import (
    Explanation,
    activations,
    array_of,
    bias_of,
    bits_of,
    constant_scale,
    group_quantizers,
    is_signed,
    stored_type,
    weight_axis,
    zero_point_of,
)
from .groups import PROPAGATING, FusionGroup, is_known, is_ort_mover, node_label, per_channel, scale_of
from .rules_bias import bias_overflow, bias_scale, bias_type, float_bias, product_and_sum
from .rules_output import also_in_float, graph_output, no_output, two_scales

SELECTORS = "qdq_transformer/selectors_actions/qdq_selectors.cc"
FUSED = ("Add", "Mul", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool", "Where", "Concat")
"""Elementwise operations that have an integer kernel."""

NO_KERNEL = "no-integer-kernel"


@dataclass(frozen=True)
class Rule:
    """One reason. `explain(group)` returns (reason, fix), or None.

    `broken` rules also apply to integer kernels; `written` ones to integer operations that the file itself has, too.
    """

    id: str
    source: str
    explain: Callable[[FusionGroup], Explanation | None]
    broken: bool = False
    written: bool = False


def first_explanation(group: FusionGroup, *, broken: bool = False) -> tuple[str, str, str] | None:
    """Return (rule, reason, fix) of the first rule that explains a group, or None. `broken`: of those rules only."""
    for rule in RULES:
        asked = not broken or (rule.written if group.written else rule.broken)
        explanation = rule.explain(group) if asked else None
        if explanation is not None:
            return (rule.id, *explanation)
    return None


def _block_matmul(group: FusionGroup) -> Explanation | None:
    if group.kernel != "MatMulNBits" or not activations(group) or activations(group)[0].dequantizer is None:
        return None
    cause = next((found for rule in RULES[1:] if (found := rule.explain(group)) is not None), None)
    reason = "onnxruntime made it a MatMulNBits, which dequantizes the weight block by block"
    fix = "quantize its output too, or write MatMulIntegerToFloat"
    return (f"{reason}, because {cause[0]}", cause[1]) if cause else (reason, fix)


def _transposed(group: FusionGroup) -> Explanation | None:
    if not is_op(group.node, "ConvTranspose"):
        return None
    return (
        "there is no integer kernel for transposed convolutions",
        "write its phases as channels of a Conv with a DepthToSpace behind it, as the pass lower_transposed does",
    )


def _no_kernel(group: FusionGroup) -> Explanation | None:
    if group.matrix or group.written or is_op(group.node, *FUSED) or is_ort_mover(group.node):
        return None
    mode = "" if not is_op(group.node, "Resize") else " in this mode"
    return (
        f"{group.node.op_type} has no integer kernel{mode}",
        "remove the quantizers around it where no neighbour runs on them: here they only cost time",
    )


def _weight_only(group: FusionGroup) -> Explanation | None:
    if not group.matrix or any(s.dequantizer is not None for s in activations(group)):
        return None
    weights = [s for s in group.data if s.dequantizer is not None]
    if not weights:
        return None
    x = name_of(activations(group)[0].value)
    return (
        f"only its weight is quantized: it reads {x!r} in float, and the weight is dequantized at each call",
        f"put QuantizeLinear and DequantizeLinear on {x!r}",
    )


def _float_input(group: FusionGroup) -> Explanation | None:
    if not group.matrix and not is_op(group.node, *FUSED):
        return None
    loose = next((s for s in group.data if s.dequantizer is None), None)
    if loose is None:
        return None
    x = name_of(loose.value)
    kind = "constant" if loose.known else "input"
    return f"its {kind} {x!r} does not come from a DequantizeLinear", f"quantize {x!r}, too"


def _half(group: FusionGroup) -> Explanation | None:
    for node in group_quantizers(group):
        scale = scale_of(node)
        if scale.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return (
                f"the scale {name_of(scale)!r} is {scale.dtype.name}: integer kernels take float32 scales only",
                "make the scales, and the float values around the group, float32",
            )
    return None


def _narrow_weight(group: FusionGroup) -> Explanation | None:
    for source in group.data:
        bits = 8 if source.dequantizer is None else bits_of(source.dequantizer)
        if bits < 8 and source.dequantizer is not None:
            stored = name_of(source.dequantizer.inputs[0])
            return (
                f"{stored!r} has {bits} bits where it is dequantized, and kernels have 8",
                f"put Cast to INT8 between {stored!r} and its DequantizeLinear (with an INT8 zero point)",
            )
    return None


def _wide(group: FusionGroup) -> Explanation | None:
    if is_ort_mover(group.node):
        return None
    for node in group_quantizers(group):
        if bits_of(node) == 16:
            return (
                f"{name_of(node.outputs[0])!r} is quantized to 16 bits ({stored_type(node).name}), kernels have 8",
                "quantize it to 8 bits (uint8), or leave the operation in float",
            )
    return None


def _activation_per_channel(group: FusionGroup) -> Explanation | None:
    if is_ort_mover(group.node) or group.written:
        return None
    for node in group_quantizers(group, weights=False):
        if per_channel(node):
            return (
                f"the scale {name_of(scale_of(node))!r} of an activation has one entry for each channel: onnxruntime "
                "fuses the group, and the kernel refuses it at the first call",
                "use one scale for the whole activation; divide its channels, and multiply the weight's, instead",
            )
    return None


def _axis_of_weight(group: FusionGroup) -> Explanation | None:
    axis = weight_axis(group)
    if axis is None or not group.matrix or (dq := group.data[1].dequantizer) is None or not per_channel(dq):
        return None
    rank = len(group.data[1].value.shape or dq.inputs[0].shape or ())  # type: ignore[union-attr]
    stored = dq.attributes["axis"].as_int() if "axis" in dq.attributes else 1
    blocked = "block_size" in dq.attributes and dq.attributes["block_size"].as_int() > 0
    if not rank or group.data[1].moved or (stored % rank == axis % rank and not blocked):
        return None
    along = "in blocks along" if blocked else "along"
    return (
        f"the weight's scale {name_of(scale_of(dq))!r} runs {along} axis {stored}, the kernel takes it as one along "
        f"axis {axis % rank}: it fails or computes other numbers",
        f"quantize the weight along its output axis, {axis % rank}",
    )


def _signed_run_time(group: FusionGroup) -> Explanation | None:
    if not group.matrix:
        return None
    for node in group_quantizers(group, weights=False):
        zero = zero_point_of(node)
        if is_signed(node) and zero is not None and not is_known(zero):
            return (
                f"{name_of(node.outputs[0])!r} is signed, and its zero point {name_of(zero)!r} is known at run time "
                "only: on x64 activations are unsigned, and only constants can be converted",
                "use uint8, or a constant zero point (0)",
            )
    return None


def _mover_between(group: FusionGroup) -> Explanation | None:
    """onnxruntime carries a lone quantizer past a mover of PROPAGATING, and only if its scale is constant."""
    if not group.matrix and not is_op(group.node, *FUSED):
        return None
    for source in group.data:
        if source.dequantizer is None:
            continue
        odd = next((node for node in source.moved if not is_op(node, *PROPAGATING)), None)
        run_time = source.moved and not constant_scale(source.dequantizer)
        if odd is not None or run_time:
            mover = odd or source.moved[0]
            reason = f"it is a {mover.op_type}" if odd is not None else "its scale is known at run time only"
            return (
                f"{mover.op_type} ({node_label(mover)!r}) lies between it and its DequantizeLinear, which onnxruntime "
                f"does not carry past it: {reason}",
                f"put QuantizeLinear and DequantizeLinear behind the {mover.op_type}",
            )
    behind = (
        [] if is_op(group.node, "MatMul", "Gemm") else [node for _, path in group.readers.quantizers for node in path]
    )
    odd = next((node for node in behind if not is_op(node, *PROPAGATING)), None)
    if odd is not None:
        return (
            f"{odd.op_type} ({node_label(odd)!r}) lies between it and its QuantizeLinear, which onnxruntime does not "
            "carry past it",
            f"put QuantizeLinear and DequantizeLinear in front of the {odd.op_type}",
        )
    return None


def _scaled_sum(group: FusionGroup) -> Explanation | None:
    """Measured: QGemm has alpha and transA, but with a bias alpha must be 1; beta must be 1 always."""
    if not is_op(group.node, "Gemm") or bias_of(group) is None:
        return None
    values = {n: group.node.attributes[n].as_float() for n in ("alpha", "beta") if n in group.node.attributes}
    odd = {name: value for name, value in values.items() if value != 1.0}
    if not odd:
        return None
    text = ", ".join(f"{name} is {value:g}" for name, value in odd.items())
    return f"{text}, and an integer Gemm adds its bias as it is", "multiply these factors into the weight and the bias"


def _moved_scales(group: FusionGroup) -> Explanation | None:
    if not is_ort_mover(group.node) or not group.data or group.data[0].dequantizer is None:
        return None
    first = group.data[0].dequantizer
    for last, _ in group.readers.quantizers:
        if not constant_scale(first) or not constant_scale(last):
            return (
                f"the scales around it ({name_of(scale_of(first))!r}, {name_of(scale_of(last))!r}) are known at run "
                "time only: only constant ones are compared, and dropped",
                f"move the {group.node.op_type} in front of the QuantizeLinear, or behind the DequantizeLinear",
            )
        zeros = [zero_point_of(node) for node in (first, last)]
        pairs = [(scale_of(first), scale_of(last)), (zeros[0], zeros[1])]
        for a, b in pairs:
            if a is not b and (a is None or b is None or not _equal(a, b)):
                return (
                    f"its data comes with {name_of(a)!r} and leaves with {name_of(b)!r}, which differ: "
                    "it would have to compute",
                    "use one scale and zero point on both sides",
                )
    return None


def _equal(a: ir.Value, b: ir.Value) -> bool:
    left, right = array_of(a), array_of(b)
    return left is not None and right is not None and left.dtype == right.dtype and bool(np.array_equal(left, right))


RULES: tuple[Rule, ...] = (
    Rule("block-matmul", "qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc", _block_matmul),
    Rule("transposed-conv", "measured", _transposed),
    Rule(NO_KERNEL, "qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc", _no_kernel),
    Rule("weight-only", SELECTORS, _weight_only),
    Rule("float-input", SELECTORS, _float_input),
    Rule("half-scales", "measured", _half),
    Rule("narrow-weight", SELECTORS, _narrow_weight),
    Rule("sixteen-bit", SELECTORS, _wide),
    Rule("per-channel-activation", "measured", _activation_per_channel, broken=True),
    Rule("weight-axis", "measured", _axis_of_weight, broken=True),
    Rule("signed-run-time", "qdq_transformer/qdq_s8_to_u8.cc", _signed_run_time),
    Rule("mover-between", "qdq_transformer/qdq_propagation.cc", _mover_between),
    Rule("mover-scales", SELECTORS, _moved_scales),
    Rule("gemm-factors", SELECTORS, _scaled_sum),
    Rule("matmul-add", "matmul_add_fusion.cc", product_and_sum),
    Rule("bias-type", SELECTORS, bias_type),
    Rule("bias-scale", SELECTORS, bias_scale, broken=True),
    Rule("bias-overflow", "measured", bias_overflow, broken=True, written=True),
    Rule("float-bias", "qdq_transformer/weight_bias_quantization.cc", float_bias),
    Rule("graph-output", SELECTORS, graph_output),
    Rule("no-output-quantizer", SELECTORS, no_output),
    Rule("two-output-quantizers", SELECTORS, two_scales),
    Rule("float-reader", SELECTORS, also_in_float),
)
