"""Places of the channels in a value, traced back through nodes that move data.

An axis is a product of atoms, the outermost first. An atom of `stride` k counts k channels for each of its steps; one
of stride 0 counts something else (tokens, the batch). Cutting 128 channels into 4 heads of 32 cuts one atom into two,
a Transpose moves axes, and joining them again joins their atoms:

    [batch, tokens, 128@1]  <-Reshape-  [batch, tokens, 4@32, 32@1]  <-Transpose-  [batch, 4@32, tokens, 32@1]

An atom with `only` set is a part of a larger whole: at all its other places there are no channels of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

AxisSize = int | str | None
"""The length of an axis: a number, the name of an open dimension, or None if unknown."""


@dataclass(frozen=True)
class Atom:
    size: AxisSize
    stride: int = 0
    only: int | None = None  # the one place of it that is ours

    @property
    def counts(self) -> bool:
        """Whether the axis that it is on must be known for the channels to be known."""
        return self.stride != 0 or self.only is not None


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Layout:
    """The axes of a value; `base` is the channel where all atoms are at 0."""

    axes: tuple[Axis, ...]
    base: int = 0

    @staticmethod
    def of(sizes: Sequence[AxisSize], axis: int) -> Layout:
        """All channels on one axis, in order."""
        at = axis % len(sizes)
        return Layout(tuple(_axis(Atom(n, int(d == at))) for d, n in enumerate(sizes)))

    @property
    def rank(self) -> int:
        return len(self.axes)

    def on(self, axis: int) -> bool:
        """Whether an axis counts channels, or chooses a part."""
        return any(atom.counts for atom in self.axes[axis])

    def only_on(self, *axes: int) -> bool:
        """Whether no other axes count channels."""
        return not any(self.on(d) for d in range(self.rank) if d not in {a % self.rank for a in axes})

    def whole(self, axis: int, channels: int) -> bool:
        """Whether one axis counts all channels in their order, and nothing else lies on it."""
        return self.base == 0 and self.only_on(axis) and self.axes[axis] == _axis(Atom(channels, 1))

    def transposed(self, order: Sequence[int]) -> Layout:
        """Return the layout of a Transpose's input."""
        before: list[Axis] = [()] * self.rank
        for place, axis in zip(order, self.axes, strict=True):
            before[place] = axis
        return replace(self, axes=tuple(before))

    def with_axis(self, axis: int, atoms: Axis) -> Layout:
        return replace(self, axes=(*self.axes[:axis], atoms, *self.axes[axis + 1 :]))

    def without_channels(self, axis: int, size: AxisSize) -> Layout:
        """An axis that counts none, of another length."""
        return self.with_axis(axis, _axis(Atom(size)))

    def reshaped(self, sizes: Sequence[AxisSize]) -> Layout | None:
        """Return the layout of a Reshape's input of these sizes, or None if the channels have no known place there."""
        atoms = [atom for axis in self.axes for atom in axis]
        front: list[Axis] = []
        back: list[Axis] = []
        left = list(sizes)
        while left and (taken := _take(atoms, left[-1], last=True)) is not None:
            back.insert(0, taken)
            left.pop()
        while left and (taken := _take(atoms, left[0], last=False)) is not None:
            front.append(taken)
            left.pop(0)
        if len(left) == 1:  # what is left is this one axis, whatever its size
            middle = [tuple(atoms)]
        elif any(atom.counts for atom in atoms):
            return None
        else:
            middle = [_axis(Atom(size)) for size in left]
        return replace(self, axes=(*front, *middle, *back))

    def channels(self) -> npt.NDArray[np.int64] | None:
        """The channel at each place, of a shape that broadcasts to the value's; -1 where there is none of ours.

        None when an axis joins channels and something of unknown length.
        """
        index, ours = np.array(self.base), np.array(True)
        for d, axis in enumerate(self.axes):
            part, here = np.zeros(1, np.int64), np.ones(1, bool)
            if self.on(d):
                for atom in axis:
                    if not isinstance(atom.size, int):
                        return None
                    steps = np.arange(atom.size)
                    part = (part[:, None] + steps * atom.stride).reshape(-1)
                    chosen = steps == atom.only if atom.only is not None else np.ones(atom.size, bool)
                    here = (here[:, None] & chosen).reshape(-1)
            index, ours = index[..., None] + part, ours[..., None] & here
        return np.where(ours, index, -1)


def sizes_of(value: ir.Value) -> list[AxisSize] | None:
    """Return the lengths of a value's axes, or None if its rank is not known."""
    if value.shape is None:
        return None
    return [size_of(dim) for dim in value.shape]


def size_of(dim: Any) -> AxisSize:
    if isinstance(dim, int):
        return dim
    name = dim.value
    return None if name is None or name.startswith("unk__") else str(name)


def _axis(atom: Atom) -> Axis:
    return () if atom.size == 1 and not atom.counts else (atom,)


def _take(atoms: list[Atom], size: AxisSize, *, last: bool) -> Axis | None:
    """Cut an axis of this size off one end of the atoms; None, and nothing is cut, where it does not come out even."""
    end = -1 if last else 0
    if not isinstance(size, int):
        if size is not None and atoms and atoms[end].size == size:
            return (atoms.pop(end),)
        return None
    taken: list[Atom] = []
    rest, product = list(atoms), 1
    while product < size:
        need, odd = divmod(size, product)
        steps = rest[end].size if rest else None
        if odd or not isinstance(steps, int):
            return None
        atom = rest.pop(end)
        if need % steps:  # the axis ends within this atom
            if steps % need or atom.only is not None:
                return None
            inner = need if last else steps // need
            pieces = [Atom(steps // inner, atom.stride * inner), Atom(inner, atom.stride)]
            atom = pieces.pop(end)
            rest.insert(len(rest) if last else 0, pieces[0])
            steps = need
        taken.insert(0 if last else len(taken), atom)
        product *= steps
    atoms[:] = rest
    return tuple(taken)
