"""Operations that move data and compute sizes, as functions over torch. Each has the name of its ONNX operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

from .values import IntOperand, Operand, TorchFunction, ints, tensor, together


def Shape(x: Operand, *, start: int = 0, end: int | None = None) -> torch.Tensor:
    return torch.tensor(tuple(tensor(x).shape)[start:end], dtype=torch.int64)


def Size(x: Operand) -> torch.Tensor:
    return torch.tensor(tensor(x).numel(), dtype=torch.int64)


def Reshape(x: Operand, shape: IntOperand, *, allowzero: int = 0) -> torch.Tensor:
    """A 0 keeps the axis of the input."""
    given, sizes = tensor(x), ints(shape)
    return given.reshape([given.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


def Flatten(x: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    first = x.shape[: axis if axis >= 0 else axis + x.ndim]
    return x.reshape(math.prod(first), -1)


def Squeeze(x: Operand, axes: IntOperand | None = None) -> torch.Tensor:
    given = tensor(x)
    return given.squeeze() if axes is None else given.squeeze(tuple(ints(axes)))


def Unsqueeze(x: Operand, axes: IntOperand) -> torch.Tensor:
    given, places = tensor(x), ints(axes)
    rank = given.ndim + len(places)
    for axis in sorted(a % rank for a in places):
        given = given.unsqueeze(axis)
    return given


def Transpose(x: torch.Tensor, *, perm: Sequence[int] = ()) -> torch.Tensor:
    return x.permute(list(perm) or list(reversed(range(x.ndim))))


def Concat(*parts: Operand, axis: int) -> torch.Tensor:
    tensors = [tensor(part) for part in parts]
    data = next((t for t in tensors if t.device.type != "cpu"), tensors[0])
    return torch.cat([tensor(t, data) for t in tensors], axis)


def Split(
    x: torch.Tensor, split: IntOperand | None = None, *, axis: int = 0, num_outputs: int = 0
) -> tuple[torch.Tensor, ...]:
    if split is not None:
        return tuple(torch.split(x, ints(split), axis))
    each = -(-x.shape[axis] // num_outputs)
    sizes = [min(each, x.shape[axis] - i * each) for i in range(num_outputs)]
    return tuple(torch.split(x, sizes, axis))


def Slice(
    x: Operand, starts: IntOperand, ends: IntOperand, axes: IntOperand | None = None, steps: IntOperand | None = None
) -> torch.Tensor:
    given, first, last = tensor(x), ints(starts), ints(ends)
    places = range(len(first)) if axes is None else ints(axes)
    strides = [1] * len(first) if steps is None else ints(steps)
    for axis, start, end, step in zip(places, first, last, strides, strict=True):
        chosen = range(given.shape[axis])[start:end:step]
        if step > 0:
            given = given.narrow(axis, chosen.start if chosen else 0, max(chosen.stop - chosen.start, 0))
            given = given if step == 1 else given[(slice(None),) * (axis % given.ndim) + (slice(None, None, step),)]
        else:
            given = given.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=given.device))
    return given


def Gather(x: Operand, indices: Operand, *, axis: int = 0) -> torch.Tensor:
    """The result is on the device of the data, or of the indices where a size is looked up."""
    if isinstance(indices, int):
        return tensor(x).select(axis, indices)
    given, places = together(x, indices)
    return given[(slice(None),) * (axis % given.ndim) + (places.long(),)]


def GatherElements(x: Operand, indices: Operand, *, axis: int = 0) -> torch.Tensor:
    given, places = together(x, indices)
    return torch.gather(given, axis, places % given.shape[axis])


def Expand(x: Operand, shape: IntOperand) -> torch.Tensor:
    given = tensor(x)
    return given.expand(torch.broadcast_shapes(given.shape, ints(shape)))


def Tile(x: Operand, repeats: IntOperand) -> torch.Tensor:
    return tensor(x).repeat(ints(repeats))


def ConstantOfShape(shape: IntOperand, *, value: Operand = 0.0) -> torch.Tensor:
    """One of its elements fills the result: on the CPU, and a whole number as a size."""
    return tensor(value).reshape(()).expand(ints(shape))


def Range(start: Operand, limit: Operand, delta: Operand) -> torch.Tensor:
    first, last, step = (tensor(v).reshape(()) for v in (start, limit, delta))
    return torch.arange(first.item(), last.item(), step.item(), dtype=first.dtype)


def Trilu(x: torch.Tensor, k: IntOperand = 0, *, upper: int = 1) -> torch.Tensor:
    return (torch.triu if upper else torch.tril)(x, ints(k)[0])


def Pad(
    x: torch.Tensor,
    pads: IntOperand,
    value: Operand | None = None,
    axes: IntOperand | None = None,
    *,
    mode: Literal["constant", "reflect", "edge", "wrap"] = "constant",
) -> torch.Tensor:
    sizes = ints(pads)
    places = list(range(x.ndim)) if axes is None else [a % x.ndim for a in ints(axes)]
    ends = dict(zip(places, zip(sizes[: len(places)], sizes[len(places) :], strict=True), strict=True))
    if mode == "constant":
        edges = [n for axis in reversed(range(x.ndim)) for n in ends.get(axis, (0, 0))]
        return functional.pad(x, edges, value=0.0 if value is None else float(tensor(value)))
    for axis, (before, after) in ends.items():
        n = x.shape[axis]
        place = torch.arange(-before, n + after, device=x.device)
        if mode == "reflect":
            place = (n - 1) - ((place % (2 * n - 2)) - (n - 1)).abs() if n > 1 else place * 0
        elif mode == "edge":
            place = place.clamp(0, n - 1)
        x = x.index_select(axis, place % n)
    return x


def DepthToSpace(x: torch.Tensor, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> torch.Tensor:
    b, c, h, w = x.shape
    k, n = blocksize, c // blocksize**2
    if mode == "CRD":
        return functional.pixel_shuffle(x, k)
    return x.reshape(b, k, k, n, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, n, h * k, w * k)


def SpaceToDepth(x: torch.Tensor, *, blocksize: int) -> torch.Tensor:
    b, c, h, w = x.shape
    k = blocksize
    return x.reshape(b, c, h // k, k, w // k, k).permute(0, 3, 5, 1, 2, 4).reshape(b, c * k * k, h // k, w // k)


SHAPE_OPERATIONS: tuple[TorchFunction, ...] = (
    *(Shape, Size, Reshape, Flatten, Squeeze, Unsqueeze, Transpose, Concat, Split, Slice, Gather, GatherElements),
    *(Expand, Tile, ConstantOfShape, Range, Trilu, Pad, DepthToSpace, SpaceToDepth),
)
