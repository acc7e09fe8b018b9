"""Normalizations, reductions and pooling, as functions over torch. Each has the name of its ONNX operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

from .operations_linear import AutoPad, paddings
from .values import IntOperand, TorchFunction, ints, tensor


def LayerNormalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    """Scale and bias may have any shape that broadcasts, such as one that only the call knows."""
    normal = functional.layer_norm(x, x.shape[axis % x.ndim :], eps=epsilon) * tensor(scale, x)
    return normal if bias is None else normal + tensor(bias, x)


def RMSNormalization(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> torch.Tensor:
    axes = tuple(range(axis % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


def GroupNormalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    """Scale and bias are per channel, or per group in opset 18."""
    each = x.shape[1] // scale.numel()
    wide = (scale, bias) if each == 1 else (scale.repeat_interleave(each), bias.repeat_interleave(each))
    return functional.group_norm(x, num_groups, *wide, eps=epsilon)


def InstanceNormalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, epsilon: float = 1e-5
) -> torch.Tensor:
    return functional.group_norm(x, x.shape[1], scale, bias, epsilon)


def BatchNormalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: Literal[0] = 0,
) -> torch.Tensor:
    """The statistics are constants of the graph, and may be trained: torch's own function has no gradient for them."""
    shape = (-1, *[1] * (x.ndim - 2))
    factor = scale * torch.rsqrt(variance + epsilon)
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def Softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.softmax(x, axis)


def LogSoftmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.log_softmax(x, axis)


def _reduction(name: str, of: TorchFunction) -> TorchFunction:
    """Return the operation of a reduction over axes: an input since opset 18, an attribute before, all by default."""

    def reduction(
        x: torch.Tensor, axes: IntOperand | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> torch.Tensor:
        chosen = [] if axes is None else ints(axes)
        if not chosen and noop_with_empty_axes:
            return x
        reduced: torch.Tensor = of(x, chosen or list(range(x.ndim)), bool(keepdims))
        return reduced

    reduction.__name__ = name
    return reduction


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, TorchFunction] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x.square(), axes, keep),
    "ReduceL1": lambda x, axes, keep: torch.sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(torch.sum(x.square(), axes, keep)),
}


def GlobalAveragePool(x: torch.Tensor) -> torch.Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def MaxPool(
    x: torch.Tensor,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    ceil_mode: Literal[0] = 0,
    storage_order: Literal[0] = 0,
    auto_pad: AutoPad = "NOTSET",
) -> torch.Tensor:
    padded, steps, holes = _padded(x, kernel_shape, pads, strides, dilations, auto_pad, float("-inf"))
    pool = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[len(kernel_shape)]
    return pool(padded, tuple(kernel_shape), steps, 0, holes)


def AveragePool(
    x: torch.Tensor,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    count_include_pad: int = 0,
    ceil_mode: Literal[0] = 0,
    auto_pad: AutoPad = "NOTSET",
) -> torch.Tensor:
    """The mean over each window, of the image's own elements unless the zeros count too."""
    window = list(kernel_shape)
    kernel = x.new_ones((x.shape[1], 1, *window))
    arguments = (window, pads, strides, dilations, auto_pad)

    def sums(values: torch.Tensor, fill: float) -> torch.Tensor:
        padded, steps, holes = _padded(values, *arguments, fill)
        convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(window)]
        return convolve(padded, kernel, None, steps, 0, holes, x.shape[1])

    return sums(x, 0.0) / sums(torch.ones_like(x), float(bool(count_include_pad)))


def _padded(
    x: torch.Tensor,
    window: Sequence[int],
    pads: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    auto_pad: AutoPad,
    fill: float,
) -> tuple[torch.Tensor, list[int], list[int]]:
    rank = len(window)
    steps, holes = list(strides) or [1] * rank, list(dilations) or [1] * rank
    sizes = [(k - 1) * d + 1 for k, d in zip(window, holes, strict=True)]
    before, after = paddings(x.shape[2:], sizes, steps, pads, auto_pad)
    edges = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return functional.pad(x, edges, value=fill) if any(edges) else x, steps, holes


NORMALIZATION_OPERATIONS: tuple[TorchFunction, ...] = (
    *(LayerNormalization, RMSNormalization, GroupNormalization, InstanceNormalization, BatchNormalization),
    *(
        Softmax,
        LogSoftmax,
        GlobalAveragePool,
        MaxPool,
        AveragePool,
    ),
)

REDUCTION_OPERATIONS: tuple[TorchFunction, ...] = tuple(_reduction(name, of) for name, of in _REDUCTIONS.items())
