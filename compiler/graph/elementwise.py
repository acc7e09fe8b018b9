"""Scalar parameters around elementwise groups, which onnxruntime fuses into one integer kernel:

    DQ(a), DQ(b) -> Add -> Q          becomes QLinearAdd

onnxruntime fuses every such group, intended or not, and QLinearAdd refuses a scale of shape `[1]`, the shape that a
lookup in timestep tables gives. The graph runs only when the parameters around each group are scalars.
"""

from __future__ import annotations

import onnx_ir as ir

from .nodes import Builder, Names, consumers, is_constant, is_op, name_of
from .require import producer


def make_scalars(graph: ir.Graph) -> None:
    """Squeeze the scales and zero points `[1]` around elementwise groups into scalars, for every Q and DQ that reads
    them."""
    names = Names(graph)
    for value in _around_groups(graph):
        users = [node for node in consumers(value) if is_op(node, "QuantizeLinear", "DequantizeLinear")]
        build = Builder(graph, names, after=producer(value))
        scalar = build.op("Squeeze", [value], f"{name_of(value)}_scalar", like=value, shape=[])
        for node in users:
            for index in (1, 2):
                if node.inputs[index] is value:
                    node.replace_input_with(index, scalar)


def _around_groups(graph: ir.Graph) -> list[ir.Value]:
    """Return the non-constant parameters `[1]` of the Q and DQ around each node that reads DQs only and feeds one Q."""
    values: dict[ir.Value, None] = {}
    for node in graph:
        before = [None if v is None else v.producer() for v in node.inputs]
        after = consumers(node.outputs[0]) if len(node.outputs) == 1 else []
        if len(after) != 1 or not is_op(after[0], "QuantizeLinear"):
            continue
        if not before or not all(is_op(n, "DequantizeLinear") for n in before):
            continue
        for pair in (*before, after[0]):
            parameters = pair.inputs[1:] if pair is not None else ()
            values |= {v: None for v in parameters if v and not is_constant(v) and list(v.shape or ()) == [1]}
    return list(values)
