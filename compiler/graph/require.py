"""Access to the parts of a graph that an earlier check guarantees; PassError, with the node, where the part is missing.

`assert` does not serve here: `python -O` removes it, and its message names no node.
"""

from __future__ import annotations

from typing import TypeVar

import onnx_ir as ir

from ..errors import PassError

_T = TypeVar("_T")


def required(part: _T | None, name: str, where: ir.Node | ir.Value | str | None = None) -> _T:
    """Return `part`. Raise PassError when it is None: `name` is missing at `where`."""
    if part is None:
        raise PassError(f"{name} is missing", where=_place(where))
    return part


def inputs(node: ir.Node, count: int) -> tuple[ir.Value, ...]:
    """Return the first `count` inputs of a node. Raise PassError when one of them is absent."""
    return tuple(
        required(node.inputs[i] if i < len(node.inputs) else None, f"input {i} of {node.op_type}", node)
        for i in range(count)
    )


def producer(value: ir.Value | None) -> ir.Node:
    """Return the node that computes a value. Raise PassError for a constant, a graph input and an absent value."""
    return required(None if value is None else value.producer(), "the node that computes the value", value)


def shape_of(value: ir.Value | None) -> ir.Shape:
    """Return a value's shape. Raise PassError when it is not known."""
    return required(None if value is None else value.shape, "the shape", value)


def dtype_of(value: ir.Value | None) -> ir.DataType:
    """Return a value's element type. Raise PassError when it is not known."""
    return required(None if value is None else value.dtype, "the element type", value)


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """Return the contents of a constant. Raise PassError for a value that is not a constant."""
    return required(None if value is None else value.const_value, "the constant", value)


def _place(where: ir.Node | ir.Value | str | None) -> str | None:
    if isinstance(where, ir.Node):
        return f"{where.op_type} {where.name!r}"
    if isinstance(where, ir.Value):
        return f"value {where.name!r}"
    return where
