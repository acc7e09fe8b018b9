"""Which weights of a layer may be removed together: one by one, so many of every few, or in blocks.

    unstructured   any weight
    N:M            of every M consecutive inputs of an output, N are kept (2:4 is what TensorRT's sparse kernels take)
    blocks         4 consecutive inputs at a time

Inputs are consecutive along the input channels, for each position of a convolution's kernel by itself, as TensorRT
counts them. The columns of a weight `[outputs, channels * positions]` are therefore put in the order (position,
channel) while it is pruned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import RecipeError

BLOCK = 4
_N_OF_M = re.compile(r"([1-9]\d?):([1-9]\d?)")
SMALLEST_HINT = "choose unstructured, blocks, or N:M with N below M, such as 2:4"


@dataclass(frozen=True)
class PruningPattern:
    """A pattern: `kept` of every `group` inputs (0 of 0 without such groups), removed `block` at a time."""

    name: str
    kept: int = 0
    group: int = 0
    block: int = 1

    @staticmethod
    def of(name: str, where: str) -> PruningPattern:
        """Return the pattern of this name. Raise RecipeError."""
        if name == "unstructured":
            return PruningPattern(name)
        if name == "blocks":
            return PruningPattern(name, block=BLOCK)
        found = _N_OF_M.fullmatch(name)
        if found is None or int(found[1]) >= int(found[2]):
            raise RecipeError(f"{where}.pattern is {name!r}", where=where, hint=SMALLEST_HINT)
        return PruningPattern(name, int(found[1]), int(found[2]))

    @property
    def unit(self) -> int:
        """The number of consecutive columns that must not be cut apart."""
        return self.group or self.block

    @property
    def sparsity(self) -> float | None:
        """The share of weights that the pattern itself removes, or None where it is free."""
        return 1 - self.kept / self.group if self.group else None

    def removals(self, shape: tuple[int, ...], sparsity: float) -> int:
        """Return how many removals, of one weight or block each, leave a weight of that shape at this sparsity."""
        rows, width = shape
        if self.group:
            return rows * (width // self.group) * (self.group - self.kept)
        return round(sparsity * rows * (width // self.block))

    def fits(self, channels: int) -> bool:
        """Return whether the input channels of a layer are a multiple of the pattern's unit."""
        return channels % self.unit == 0


def column_order(channels: int, positions: int) -> npt.NDArray[np.int64]:
    """Return, for each column in the order (position, channel), its place in the order (channel, position)."""
    return np.arange(channels * positions).reshape(channels, positions).T.reshape(-1)
