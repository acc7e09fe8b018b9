"""Convolutions and matrix products, as functions over torch. Each has the name of its ONNX operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

from .values import Operand, TorchFunction, tensor

AutoPad = Literal["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]


def Conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    auto_pad: AutoPad = "NOTSET",
) -> torch.Tensor:
    rank = x.ndim - 2
    steps, holes = list(strides) or [1] * rank, list(dilations) or [1] * rank
    sizes = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], holes, strict=True)]
    before, after = paddings(x.shape[2:], sizes, steps, pads, auto_pad)
    if before != after:
        x, before = functional.pad(x, _for_pad(before, after)), [0] * rank
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    return convolve(x, weight, bias, steps, before, holes, group)


def ConvTranspose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    auto_pad: Literal["NOTSET", "VALID"] = "NOTSET",
) -> torch.Tensor:
    rank = x.ndim - 2
    convolve = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}[rank]
    steps, holes = list(strides) or [1] * rank, list(dilations) or [1] * rank
    full = convolve(x, weight, bias, steps, 0, list(output_padding) or 0, group, holes)
    edges = list(pads) or [0] * (2 * rank)
    cut = [-n for n in edges]
    return functional.pad(full, _for_pad(cut[:rank], cut[rank:])) if any(edges) else full


def paddings(
    image: Sequence[int], window: Sequence[int], strides: Sequence[int], pads: Sequence[int], auto_pad: str
) -> tuple[list[int], list[int]]:
    """Return the numbers of zeros before and behind each axis. `window` are the sizes of the dilated kernel."""
    rank = len(window)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(image, window, strides, strict=True)]
        small, large = [n // 2 for n in total], [n - n // 2 for n in total]
        return (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    edges = list(pads) or [0] * (2 * rank)
    return edges[:rank], edges[rank:]


def _for_pad(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the order of torch's pad: the last axis first."""
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]


def Gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: Operand | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> torch.Tensor:
    product = torch.matmul(a.transpose(0, 1) if transA else a, b.transpose(0, 1) if transB else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (tensor(c) if beta == 1 else beta * tensor(c))


def MatMul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a, b)


def Einsum(*operands: torch.Tensor, equation: str) -> torch.Tensor:
    return torch.einsum(equation, *operands)


def MultiHeadAttention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_heads: int, scale: float | None = None
) -> torch.Tensor:
    """Attention over `[batch, tokens, heads * width]`, as fuse_attention writes it (domain com.microsoft)."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


MICROSOFT_LINEAR_OPERATIONS: tuple[TorchFunction, ...] = (MultiHeadAttention,)
LINEAR_OPERATIONS: tuple[TorchFunction, ...] = (Conv, ConvTranspose, Gemm, MatMul, Einsum)
