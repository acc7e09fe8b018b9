"""What the operations take: tensors, and the small constants that the code of a module shows as numbers and tuples.

A size of the graph (the output of Shape and what is computed from it) is a small integer tensor on the CPU, wherever
the data is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Operand = torch.Tensor | int | float | bool | Sequence[int]
"""A tensor, or a constant that is written into the code: a number, or a tuple of integers."""

IntOperand = torch.Tensor | int | Sequence[int]

TorchFunction = Callable[..., Any]
"""An operation: inputs by position, attributes by name."""


def tensor(value: Operand, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return a value as a tensor, on the device of `like`: int64, float32 or bool where it is a constant."""
    if not isinstance(value, torch.Tensor):
        dtype = torch.float32 if isinstance(value, float) else torch.bool if isinstance(value, bool) else torch.int64
        value = torch.tensor(value, dtype=dtype)
    return value if like is None or value.device == like.device else value.to(like.device)


def ints(value: IntOperand) -> list[int]:
    """Return the integers of a size, of axes or of an index."""
    if isinstance(value, torch.Tensor):
        return [int(n) for n in value.reshape(-1).tolist()]
    return [value] if isinstance(value, int) else [int(n) for n in value]


def together(a: Operand, b: Operand) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two operands as tensors on one device: that of the data, where the other is a size."""
    first, second = tensor(a), tensor(b)
    if first.device != second.device:
        device = second.device if first.device.type == "cpu" else first.device
        first, second = first.to(device), second.to(device)
    return first, second
