"""Rules of the fusion audit about outputs: an integer kernel writes integers of one scale, for all readers.

A convolution or an elementwise operation needs exactly one QuantizeLinear behind it. A matrix product needs none, or
one and no other reader.
"""

from __future__ import annotations

from ..graph.nodes import is_op, name_of
from .facts import Explanation, zero_point_of
from .groups import FusionGroup, node_label, scale_of


def _output(group: FusionGroup) -> str:
    return name_of(group.node.outputs[0])


def graph_output(group: FusionGroup) -> Explanation | None:
    if group.written or not group.readers.graph_output or (_may_be_float(group) and not group.readers.quantizers):
        return None
    return (
        f"its output {_output(group)!r} is an output of the graph, and so in float",
        f"put QuantizeLinear and DequantizeLinear on {_output(group)!r}, and make their output the graph's",
    )


def no_output(group: FusionGroup) -> Explanation | None:
    if group.written or group.readers.quantizers or _may_be_float(group):
        return None
    readers = ", ".join(f"{n.op_type} ({node_label(n)!r})" for n in group.readers.others[:3]) or "no node"
    return (
        f"no QuantizeLinear follows: {_output(group)!r} is read by {readers}",
        f"put QuantizeLinear and DequantizeLinear right behind it, on {_output(group)!r}",
    )


def two_scales(group: FusionGroup) -> Explanation | None:
    if group.written or len(group.node.outputs) > 1:
        return None
    scales = {(id(scale_of(q)), id(zero_point_of(q))): name_of(scale_of(q)) for q, _ in group.readers.quantizers}
    if len(scales) < 2:
        return None
    names = " and ".join(repr(name) for name in scales.values())
    return (
        f"its output {_output(group)!r} is quantized {len(scales)} times, with scales {names}",
        "quantize it once; where another scale is needed, quantize the DequantizeLinear's output again",
    )


def also_in_float(group: FusionGroup) -> Explanation | None:
    if group.written or not group.readers.quantizers or not group.readers.others:
        return None
    reader = group.readers.others[0]
    return (
        f"its output {_output(group)!r} is read by a QuantizeLinear and, in float, by {reader.op_type} "
        f"({node_label(reader)!r})",
        f"let {node_label(reader)!r} read the DequantizeLinear behind that QuantizeLinear",
    )


def _may_be_float(group: FusionGroup) -> bool:
    return is_op(group.node, "MatMul", "Gemm")
