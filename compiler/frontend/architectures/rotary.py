"""Rotary positions in real arithmetic, for the networks that write them with complex numbers.

torch's exporter has no complex tensors in ONNX: the export of Lumina 2, Qwen-Image and Z-Image stops at
`aten.view_as_complex`. While `real_rotary` lasts, that function returns a `Rotation`, and so do the tables that the
rows of these networks make.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rotation:
    """Complex numbers as two tensors, with what the networks do to them."""

    real: Any
    imaginary: Any

    @classmethod
    def of(cls, numbers: Any) -> Rotation:
        """Return a complex tensor in two parts."""
        return cls(numbers.real.contiguous(), numbers.imag.contiguous())

    def unsqueeze(self, axis: int) -> Rotation:
        return Rotation(self.real.unsqueeze(axis), self.imaginary.unsqueeze(axis))

    def at(self, rows: Any) -> Rotation:
        """Return rows of a table."""
        return Rotation(self.real[rows], self.imaginary[rows])

    def __mul__(self, other: Rotation) -> Rotation:
        a, b, c, d = self.real, self.imaginary, other.real, other.imaginary
        return Rotation(a * c - b * d, a * d + b * c)


@contextmanager
def real_rotary(module: Any) -> Iterator[None]:
    """Make torch's views of complex numbers ones of `Rotation`."""
    import torch

    views = torch.view_as_complex, torch.view_as_real

    def as_rotation(pairs: Any) -> Rotation:
        return Rotation(pairs[..., 0], pairs[..., 1])

    def as_pairs(rotation: Rotation) -> Any:
        return torch.stack([rotation.real, rotation.imaginary], dim=-1)

    torch.view_as_complex, torch.view_as_real = as_rotation, as_pairs  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.view_as_complex, torch.view_as_real = views


def joined_positions(*parts: Rotation) -> Rotation:
    """Return the positions of several sequences behind each other, `[B, N, D]`."""
    import torch

    return Rotation(torch.cat([p.real for p in parts], dim=1), torch.cat([p.imaginary for p in parts], dim=1))
