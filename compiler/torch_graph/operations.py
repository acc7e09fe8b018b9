"""The table of all operations: each type of ONNX node that the front ends and the passes produce.

A function gets the node's inputs by position, None for an absent one, and its attributes by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..graph.nodes import DEFAULT_DOMAINS, MICROSOFT
from .operations_elementwise import ELEMENTWISE_OPERATIONS
from .operations_linear import LINEAR_OPERATIONS, MICROSOFT_LINEAR_OPERATIONS
from .operations_normalization import NORMALIZATION_OPERATIONS, REDUCTION_OPERATIONS
from .operations_resize import RESIZE_OPERATIONS
from .operations_shapes import SHAPE_OPERATIONS
from .values import TorchFunction

_FAMILIES: tuple[tuple[TorchFunction, ...], ...] = (
    ELEMENTWISE_OPERATIONS,
    LINEAR_OPERATIONS,
    NORMALIZATION_OPERATIONS,
    REDUCTION_OPERATIONS,
    RESIZE_OPERATIONS,
    SHAPE_OPERATIONS,
)

TORCH_OPERATIONS: Mapping[str, TorchFunction] = {function.__name__: function for part in _FAMILIES for function in part}

MICROSOFT_OPERATIONS: Mapping[str, TorchFunction] = {f.__name__: f for f in MICROSOFT_LINEAR_OPERATIONS}
"""Those of onnxruntime's own domain, com.microsoft."""

for _function in (*TORCH_OPERATIONS.values(), *MICROSOFT_OPERATIONS.values()):
    _function.__module__ = "onnx"  # fx calls a function by its module and name: `onnx_Conv` in the module's code


def torch_operation(domain: str, op_type: str) -> TorchFunction | None:
    """Return the function of an operation of a domain, or None where the table lacks it."""
    if domain in DEFAULT_DOMAINS:
        return TORCH_OPERATIONS.get(op_type)
    return MICROSOFT_OPERATIONS.get(op_type) if domain == MICROSOFT else None
