"""The table of all operations: each type of ONNX node that the front ends and the passes produce.

A function gets the node's inputs by position, None for an absent one, and its attributes by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from .operations_elementwise import ELEMENTWISE_OPERATIONS
from .operations_linear import LINEAR_OPERATIONS
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

for _function in TORCH_OPERATIONS.values():
    _function.__module__ = "onnx"  # fx calls a function by its module and name: `onnx_Conv` in the module's code
