"""What torch's exporter needs changed, as contexts that undo it. torch is loaded inside of them only.

`keep_sizes`: the exporter writes `x.squeeze(1)` as a Squeeze even where torch leaves x alone, because its axis has more
than one element. onnxruntime then refuses the file: "Dimension of input 1 must be 1 instead of 16" (PixArt).

`fill_flags`: onnxruntime has no Where of booleans, which a masked filling of them becomes: "Could not find an
implementation for Where(16)" (HunyuanVideo).

`keep_epsilon`: onnxscript's optimizer takes every constant below 1e-8 for zero and removes `x + 1e-15`. A linear
attention whose features are all negative in front of its ReLU then divides 0 by 0 (Sana).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TAKEN_FOR_ZERO = 1e-8


@contextmanager
def keep_sizes(module: Any) -> Iterator[None]:
    """Leave out the squeezes of an axis that has more than one element, or an open number of them."""
    import torch

    squeeze = torch.Tensor.squeeze

    def kept(tensor: Any, *axes: Any) -> Any:
        if len(axes) == 1 and isinstance(axes[0], int):
            size = tensor.shape[axes[0]]
            if isinstance(size, torch.SymInt) or size != 1:
                return tensor
        return squeeze(tensor, *axes)

    torch.Tensor.squeeze = kept  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.squeeze = squeeze  # type: ignore[method-assign]


@contextmanager
def keep_epsilon(module: Any) -> Iterator[None]:
    """Write the sum of a tensor that is never negative and a tiny number as the larger of both.

    They differ by that number at most, which float32 does not see beside values above 1e-8.
    """
    import torch

    add = torch.Tensor.__add__

    def added(tensor: Any, other: Any) -> Any:
        tiny = isinstance(other, float) and 0 < other < _TAKEN_FOR_ZERO
        return tensor.clamp(min=other) if tiny else add(tensor, other)

    torch.Tensor.__add__ = added  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.__add__ = add  # type: ignore[method-assign]


@contextmanager
def fill_flags(module: Any) -> Iterator[None]:
    """Write the masked filling of booleans as a logical operation."""
    import torch

    masked_fill = torch.Tensor.masked_fill

    def filled(tensor: Any, mask: Any, value: Any) -> Any:
        if tensor.dtype is torch.bool and isinstance(value, bool):
            return tensor | mask if value else tensor & ~mask
        return masked_fill(tensor, mask, value)

    torch.Tensor.masked_fill = filled  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.masked_fill = masked_fill  # type: ignore[method-assign]
