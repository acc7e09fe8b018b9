"""The two products of an attention, found from its softmax: queries with keys, and weights with values.

    MatMul(q, k^T) -> any number of: Mul or Div by a constant, Add of a mask -> Softmax -> MatMul(., v)

Less is asked than attention.py asks: the heads need not be found, and the softmax may have a guard behind it, in which
case the second product is not given. The operands have any rank: q `[..., queries, width]`, k^T `[..., width, keys]`,
weights `[..., queries, keys]`, v `[..., keys, width]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .nodes import consumers, is_constant, is_op
from .require import required


@dataclass(frozen=True, eq=False)
class ScoreProducts:
    """`scores` multiplies queries and keys, `mix` weights and values; None where it does not read the softmax alone."""

    softmax: ir.Node
    scores: ir.Node
    mix: ir.Node | None


def score_products(graph: ir.Graph) -> list[ScoreProducts]:
    """Return the attentions of a graph whose scores are a product of two activations, in the graph's order."""
    found = []
    for node in graph:
        product = _product(node.inputs[0]) if is_op(node, "Softmax") and _over_keys(node) else None
        if product is not None:
            found.append(ScoreProducts(node, product, _mix(node)))
    return found


def _product(value: ir.Value | None) -> ir.Node | None:
    """Return the product of two activations behind scores, which nothing else reads on the way."""
    node = None if value is None else value.producer()
    if node is None or value is None or len(consumers(value)) != 1 or value.is_graph_output():
        return None
    if is_op(node, "MatMul"):
        return None if any(v is None or is_constant(v) for v in node.inputs) else node
    if is_op(node, "Mul", "Div"):
        x, number = node.inputs
        if is_op(node, "Mul") and is_constant(x):
            x, number = number, x
        return _product(x) if _is_scalar(number) else None
    if is_op(node, "Add"):
        return next((found for v in node.inputs if (found := _product(v)) is not None), None)
    return None


def _is_scalar(value: ir.Value | None) -> bool:
    return is_constant(value) and required(required(value, "a factor").const_value, "a factor").size == 1


def _mix(softmax: ir.Node) -> ir.Node | None:
    weights = softmax.outputs[0]
    readers = consumers(weights)
    if len(readers) != 1 or weights.is_graph_output() or not is_op(readers[0], "MatMul"):
        return None
    weighted, values = readers[0].inputs
    return readers[0] if weighted is weights and not is_constant(values) else None


def _over_keys(softmax: ir.Node) -> bool:
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    shape = softmax.outputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def only_read_by(value: ir.Value, operand: ir.Value) -> ir.Node | None:
    """Return the reader of `value` on the way to `operand`, if each value from one to the other has one reader only."""
    here: ir.Value | None = operand
    while here is not None and len(consumers(here)) == 1 and not here.is_graph_output():
        node = here.producer()
        if node is None or not node.inputs:
            return None
        here = node.inputs[0]
        if here is value:
            return node
    return None
