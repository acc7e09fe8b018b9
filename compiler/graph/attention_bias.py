"""What is added to the scores of an attention before the softmax: masks of prompts, as exporters write them.

    bias[b, h, 1, keys]                             the same for all queries: a mask of the keys
    Mul(key[b, h, 1, keys], query[b, h, queries, 1])    one number for each key times one for each query

b is the batch or 1, h the heads or 1. Such a bias is one more channel of the queries and keys. torch's exporter guards
a softmax with a mask of truth values: `Where(IsNaN(softmax), 0, softmax)`, for queries whose keys are all masked with
minus infinity. It masks with the lowest finite number, whose softmax is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .nodes import consumers, is_constant, is_op, numpy_of


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """A bias of scores as `key` `[b, h, 1, keys]`, times `query` `[b, h, queries, 1]` where there is one."""

    key: ir.Value
    query: ir.Value | None = None


def score_bias(value: ir.Value | None) -> ScoreBias | None:
    """Return a bias in one of the forms above, or None for any other value."""
    if _is_flat(value, -2) and value is not None:
        return ScoreBias(value)
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Mul"):
        return None
    a, b = node.inputs
    for key, query in ((a, b), (b, a)):
        if key is not None and _is_flat(key, -2) and _is_flat(query, -1):
            return ScoreBias(key, query)
    return None


def unguarded(softmax: ir.Node, bias: ScoreBias | None) -> ir.Value | None:
    """Return the weights of an attention: the softmax, or what a guard that never acts makes of it; else None."""
    weights = softmax.outputs[0]
    readers = consumers(weights)
    if len(readers) != 2:
        return weights
    guard = next((node for node in readers if is_op(node, "Where")), None)
    test = next((node for node in readers if is_op(node, "IsNaN")), None)
    if guard is None or test is None or guard.inputs[0] is not test.outputs[0] or guard.inputs[2] is not weights:
        return weights
    return guard.outputs[0] if bias is None or _is_finite(bias) else None


def _is_flat(value: ir.Value | None, axis: int) -> bool:
    """Return whether a value of four dimensions has one index along an axis."""
    return value is not None and value.shape is not None and len(value.shape) == 4 and value.shape[axis] == 1


def _is_finite(bias: ScoreBias) -> bool:
    """Return whether a bias chooses between finite constants."""
    node = bias.key.producer()
    if bias.query is not None or node is None or not is_op(node, "Where"):
        return False
    return all(v is not None and is_constant(v) and bool(np.isfinite(numpy_of(v)).all()) for v in node.inputs[1:])
