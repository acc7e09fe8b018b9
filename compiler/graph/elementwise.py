"""Elementwise groups: what onnxruntime joins into one integer kernel between DequantizeLinear and QuantizeLinear.

    DQ(a), DQ(b) -> Add -> Q          becomes QLinearAdd

whoever meant it or not, and QLinearAdd refuses a scale `[1]`, which is what a lookup of timestep tables gives. So the
parameters around such a group are scalars, everywhere where they are used, or else the graph could not be run.
"""

from __future__ import annotations

import onnx_ir as ir

from .nodes import Builder, Names, consumers, is_constant, is_op, name_of
from .require import producer


def make_scalars(graph: ir.Graph) -> None:
    """Turn rows `[1]` of scales and zero points around elementwise groups into scalars, for all Q and DQ that read
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
    """The parameters `[1]`, found at run time, of the Q and DQ around a node that reads DQs only and feeds one Q."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        before = [None if v is None else v.producer() for v in node.inputs]
        after = consumers(node.outputs[0]) if len(node.outputs) == 1 else []
        if len(after) != 1 or not is_op(after[0], "QuantizeLinear"):
            continue
        if not before or not all(is_op(n, "DequantizeLinear") for n in before):
            continue
        for pair in (*before, after[0]):
            parameters = pair.inputs[1:] if pair is not None else ()
            found |= {v: None for v in parameters if v and not is_constant(v) and list(v.shape or ()) == [1]}
    return list(found)
