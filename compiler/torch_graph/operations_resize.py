"""Resize, axis by axis, as a function over torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from .values import IntOperand, TorchFunction, ints

Coordinates = Literal["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]
Nearest = Literal["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def Resize(
    x: torch.Tensor,
    roi: object = None,
    scales: torch.Tensor | Sequence[float] | None = None,
    sizes: IntOperand | None = None,
    *,
    mode: Literal["nearest", "linear", "cubic"] = "nearest",
    coordinate_transformation_mode: Coordinates = "half_pixel",
    nearest_mode: Nearest = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    axes: Sequence[int] = (),
    antialias: Literal[0] = 0,
    exclude_outside: Literal[0] = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: Literal["stretch"] = "stretch",
) -> torch.Tensor:
    for axis, size, scale in _targets(x, list(axes) or list(range(x.ndim)), scales, sizes):
        length = x.shape[axis]
        if size == length and scale == 1:
            continue
        places = [_place(i, length, size, scale, coordinate_transformation_mode) for i in range(size)]
        if mode == "nearest":
            x = _pick(x, axis, [_nearest(place, nearest_mode) for place in places])
            continue
        taps = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
        parts = []
        for tap in taps:
            distance = [place - math.floor(place) - tap for place in places]
            weights = [1 - abs(d) if mode == "linear" else _cubic(abs(d), cubic_coeff_a) for d in distance]
            column = torch.tensor(weights, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - axis - 1))
            parts.append(_pick(x, axis, [math.floor(place) + tap for place in places]) * column)
        x = torch.stack(parts).sum(0)
    return x


def _targets(
    x: torch.Tensor, axes: list[int], scales: torch.Tensor | Sequence[float] | None, sizes: IntOperand | None
) -> list[tuple[int, int, float]]:
    """Return (axis, new length, scale) of each axis."""
    places = [axis % x.ndim for axis in axes]
    factors = [] if scales is None else scales.tolist() if isinstance(scales, torch.Tensor) else list(scales)
    if factors:
        return [(a, math.floor(x.shape[a] * s), s) for a, s in zip(places, factors, strict=True)]
    lengths = ints(() if sizes is None else sizes)
    return [(a, n, n / x.shape[a]) for a, n in zip(places, lengths, strict=True)]


def _place(i: int, length: int, size: int, scale: float, mode: Coordinates) -> float:
    """Return the coordinate in the input of element `i` of the output."""
    if mode == "align_corners":
        return 0.0 if size == 1 else i * (length - 1) / (size - 1)
    if mode == "asymmetric":
        return i / scale
    if mode == "pytorch_half_pixel" and size == 1:
        return 0.0
    middle = (i + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        middle += length / 2 * (1 - size / (scale * length))
    return middle


def _nearest(place: float, mode: Nearest) -> int:
    if mode == "floor":
        return math.floor(place)
    if mode == "ceil":
        return math.ceil(place)
    return math.ceil(place - 0.5) if mode == "round_prefer_floor" else math.floor(place + 0.5)


def _cubic(d: float, a: float) -> float:
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def _pick(x: torch.Tensor, axis: int, places: list[int]) -> torch.Tensor:
    """Return these elements of an axis, those outside of it from its ends. Whole repeats are views, cheap to train."""
    length = x.shape[axis]
    inside = [min(max(i, 0), length - 1) for i in places]
    repeats = len(inside) // length
    if inside == [i for i in range(length) for _ in range(repeats)]:
        wide = x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :])
        return wide.reshape(*x.shape[:axis], length * repeats, *x.shape[axis + 1 :])
    return x.index_select(axis, torch.tensor(inside, device=x.device))


RESIZE_OPERATIONS: tuple[TorchFunction, ...] = (Resize,)
