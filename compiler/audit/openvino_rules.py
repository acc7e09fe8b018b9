"""Why OpenVINO leaves a quantized layer in float: one small rule for each reason, with a fix.

As in rules.py a rule explains what OpenVINO built, and does not predict it. Each was measured on OpenVINO 2026.4.1
(CPU, x64) with a model that fails by it and a fixed twin. The reasons are those of its low precision transformations:
they move the factors of quantizers behind a layer, and can do so where the factors are constants, one for all channels
of an input, and next to the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph.nodes import is_op, name_of
from .facts import (
    Explanation,
    activations,
    array_of,
    bits_of,
    constant_scale,
    quantizer_grid,
    stored_type,
    weight_axis,
    zero_point_of,
)
from .groups import DataOrigin, FusionGroup, is_known, is_ort_mover, node_label, origin_of, per_channel, scale_of

FAKE_DOMAIN = "org.openvinotoolkit"
_WRITE_QDQ = (
    "write a Conv, Gemm or MatMul between DequantizeLinear and QuantizeLinear, as `mezzotint compile --target openvino`"
)


@dataclass(frozen=True)
class OpenVinoRule:
    """One reason. `explain(group)` returns (reason, fix), or None."""

    id: str
    explain: Callable[[FusionGroup], Explanation | None]


def why_float(group: FusionGroup) -> tuple[str, str, str] | None:
    """Return (rule, reason, fix) of the first rule that explains a group, or None."""
    for rule in OPENVINO_RULES:
        explanation = rule.explain(group)
        if explanation is not None:
            return (rule.id, *explanation)
    return None


def fake_quantizer(origin: DataOrigin) -> ir.Node | None:
    """Return OpenVINO's own quantizer, FakeQuantize, where a value comes from one, else None."""
    maker = origin.maker
    return maker if maker is not None and (maker.domain, maker.op_type) == (FAKE_DOMAIN, "FakeQuantize") else None


def _integer_operation(group: FusionGroup) -> Explanation | None:
    if not group.written:
        return None
    node = group.node
    scale = array_of(node.inputs[4]) if is_op(node, "QLinearConv") else None
    wrong = scale is not None and scale.size > 1 and not bool(np.all(scale == scale.flat[0]))
    result = "in float, and wrong: it takes the weight's scales along the input channels" if wrong else "in float"
    return f"OpenVINO takes {node.op_type} apart and computes it {result}", _WRITE_QDQ


def _transposed(group: FusionGroup) -> Explanation | None:
    if not is_op(group.node, "ConvTranspose"):
        return None
    return (
        "a quantized transposed convolution runs in float",
        "write its phases as channels of a Conv with a DepthToSpace behind it, as the pass lower_transposed does",
    )


def _unlike_parts(group: FusionGroup) -> Explanation | None:
    for origin in activations(group):
        concat = origin.maker
        if concat is None or not is_op(concat, "Concat"):
            continue
        parts = [origin_of(v).dequantizer for v in concat.inputs if v is not None]
        quantizers = {quantizer_grid(part): part for part in parts if part is not None}
        if len(quantizers) < 2 or None in parts:
            continue
        names = " and ".join(repr(name_of(scale_of(part))) for part in quantizers.values())
        return (
            f"{name_of(concat.outputs[0])!r} concatenates parts that have other scales ({names}) for one layer",
            "split the layer into one for each part and an Add, as the pass split_shortcuts does, or quantize the "
            "concatenation once, behind it",
        )
    return None


def _run_time_fake(group: FusionGroup) -> Explanation | None:
    for fake in filter(None, map(fake_quantizer, group.data)):
        late = next((v for v in fake.inputs[1:] if v is not None and not is_known(v)), None)
        if late is not None:
            return (
                f"the range {name_of(late)!r} of its FakeQuantize is known at run time only",
                "make the ranges constants, and multiply by a row of a table in front of it and behind the layer",
            )
    return None


def _weight_only(group: FusionGroup) -> Explanation | None:
    inputs = activations(group)
    if not inputs or any(s.dequantizer is not None or fake_quantizer(s) is not None for s in inputs):
        return None
    if not any(s.dequantizer is not None for s in group.data):
        return None
    x = name_of(inputs[0].value)
    return (
        f"only its weight is quantized: it reads {x!r} in float",
        f"put QuantizeLinear and DequantizeLinear on {x!r}, right in front of the layer",
    )


def _float_input(group: FusionGroup) -> Explanation | None:
    loose = next((s for s in group.data if s.dequantizer is None and fake_quantizer(s) is None), None)
    if loose is None:
        return None
    x, kind = name_of(loose.value), "constant" if loose.known else "input"
    return f"its {kind} {x!r} does not come from a DequantizeLinear", f"quantize {x!r}, too"


def _run_time_scale(group: FusionGroup) -> Explanation | None:
    for node in _quantizers(group):
        if not constant_scale(node):
            late = next(v for v in (scale_of(node), zero_point_of(node)) if v is not None and not is_known(v))
            return (
                f"{name_of(late)!r}, a scale or zero point, is known at run time only",
                "make it a constant; for scales by timestep, multiply by a row of a table in front of QuantizeLinear "
                "and by its inverse behind the layer, as `mezzotint compile --target openvino` does",
            )
    return None


def _per_channel(group: FusionGroup) -> Explanation | None:
    for origin in activations(group):
        if origin.dequantizer is not None and per_channel(origin.dequantizer):
            scale = name_of(scale_of(origin.dequantizer))
            return (
                f"{scale!r} has a scale for each channel of an input, and the sum over the channels has one",
                "give the input one scale; to level its channels, move factors into the weight as smooth_scales does",
            )
    return None


def _mover_between(group: FusionGroup) -> Explanation | None:
    for origin in activations(group):
        stored = None if origin.dequantizer is None else origin.dequantizer.inputs[0]
        mover = None if stored is None else stored.producer()
        if mover is not None and is_ort_mover(mover):
            return (
                f"{mover.op_type} ({node_label(mover)!r}) lies between QuantizeLinear and DequantizeLinear",
                f"move {node_label(mover)!r} in front of QuantizeLinear or behind DequantizeLinear: the two must be "
                "next to each other",
            )
    return None


def _wide(group: FusionGroup) -> Explanation | None:
    for node in _quantizers(group):
        if bits_of(node) == 16:
            return (
                f"{name_of(node.outputs[0])!r} is quantized to 16 bits ({stored_type(node).name}), kernels have 8",
                "quantize it to 8 bits, or leave the layer in float",
            )
    return None


def _narrow(group: FusionGroup) -> Explanation | None:
    for origin in group.data:
        if origin.dequantizer is not None and bits_of(origin.dequantizer) < 8:
            stored = name_of(origin.dequantizer.inputs[0])
            return (
                f"{stored!r} has {bits_of(origin.dequantizer)} bits where it is dequantized, and kernels have 8",
                f"put Cast to INT8 between {stored!r} and its DequantizeLinear (with an INT8 zero point)",
            )
    return None


def _shifted_weight(group: FusionGroup) -> Explanation | None:
    for origin in group.data:
        zero = None if origin.dequantizer is None or not origin.known else zero_point_of(origin.dequantizer)
        stored = array_of(zero)
        if stored is not None and bool(np.any(stored)):
            return (
                f"the zero point {name_of(zero)!r} of its weight is not 0",
                "quantize the weight symmetrically, as INT8 around 0",
            )
    return None


def _weight_scales(group: FusionGroup) -> Explanation | None:
    weight = group.data[1] if len(group.data) > 1 and group.data[1].known else None
    if weight is None or weight.dequantizer is None or not per_channel(weight.dequantizer):
        return None
    node, right = weight.dequantizer, weight_axis(group)
    stored = array_of(node.inputs[0])
    if right is None or stored is None:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    blocked = "block_size" in node.attributes and node.attributes["block_size"].as_int() > 0
    if axis % stored.ndim == right % stored.ndim and not blocked:
        return None
    return (
        f"the scales {name_of(scale_of(node))!r} of its weight run along axis {axis}"
        + (" in blocks" if blocked else "")
        + ", which the layer sums over",
        f"give the weight one scale for each output channel, along axis {right % stored.ndim}",
    )


def _shifted_product(group: FusionGroup) -> Explanation | None:
    """Measured, all pairs of zero points: the first factor needs 0, the second 0 as INT8, which is 128 as UINT8."""
    if len(group.data) != 2 or len(activations(group)) != 2:
        return None
    for place, origin in zip(("first", "second"), group.data, strict=True):
        zero = None if origin.dequantizer is None else zero_point_of(origin.dequantizer)
        stored = array_of(zero)
        if origin.dequantizer is None or (zero is not None and stored is None):
            return None
        kind, value = stored_type(origin.dequantizer), 0 if stored is None else int(stored.flat[0])
        right = 128 if place == "second" and kind == ir.DataType.UINT8 else 0
        if value != right:
            return (
                f"it multiplies two activations, and the {place} is {kind.name} with a zero point of {value}",
                "quantize both symmetrically: INT8 with a zero point of 0 (or the first from 0 up, as UINT8 with 0)",
            )
    return None


def _quantizers(group: FusionGroup) -> Iterator[ir.Node]:
    """Yield the DequantizeLinear nodes in front of a layer, each followed by its QuantizeLinear, if it has one."""
    for origin in group.data:
        if origin.dequantizer is None:
            continue
        yield origin.dequantizer
        stored = origin.dequantizer.inputs[0]
        maker = None if stored is None else origin_of(stored).maker
        if maker is not None and is_op(maker, "QuantizeLinear"):
            yield maker


OPENVINO_RULES = (
    OpenVinoRule("integer-operation", _integer_operation),
    OpenVinoRule("transposed-conv", _transposed),
    OpenVinoRule("unlike-parts", _unlike_parts),
    OpenVinoRule("run-time-range", _run_time_fake),
    OpenVinoRule("weight-only", _weight_only),
    OpenVinoRule("float-input", _float_input),
    OpenVinoRule("run-time-scale", _run_time_scale),
    OpenVinoRule("per-channel-activation", _per_channel),
    OpenVinoRule("mover-between", _mover_between),
    OpenVinoRule("sixteen-bit", _wide),
    OpenVinoRule("narrow-weight", _narrow),
    OpenVinoRule("weight-zero-point", _shifted_weight),
    OpenVinoRule("weight-axis", _weight_scales),
    OpenVinoRule("shifted-product", _shifted_product),
)
