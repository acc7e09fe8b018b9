"""Which rank, and which width, each layer gets: the same share for all, or by error under one budget.

    minimise sum_l e[l, c(l)]    subject to    sum_l cost[l, c(l)] <= budget        (compiler/bits/allocation.py)

A candidate c is (bits of the residual, rank of the branch), as MLoRQ has it (arXiv 2507.09616). Its error is that of
the layer's own outputs, which H gives without a run, times what such an error makes in epsilon, measured once for each
layer. Its cost are the bits of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..bits.allocation import allocate, smallest
from ..errors import RecipeError

RANK_FACTORS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Ranks that a program chooses among, as multiples of the even one."""


@dataclass(frozen=True, order=True)
class RankChoice:
    """The bits of a residual, and the rank of the branch beside it (0: none)."""

    bits: int
    rank: int


@dataclass(frozen=True)
class LayerShape:
    """The name of a layer, its outputs and the inputs of each: `[rows, inputs]` is the shape of its weight."""

    name: str
    rows: int
    inputs: int

    @property
    def size(self) -> int:
        return self.rows * self.inputs

    def branch(self, rank: int) -> int:
        """Return the number of values of a branch."""
        return rank * (self.rows + self.inputs)

    def even_rank(self, share: float, largest: int) -> int:
        """Return the rank whose branch has at most `share` of the weight's number of values, `largest` at most."""
        return min(largest, int(share * self.size / (self.rows + self.inputs)), min(self.rows, self.inputs) - 1)

    def ranks(self, share: float, largest: int) -> list[int]:
        """Return the ranks that a program chooses among, 0 first."""
        whole = share * self.size / (self.rows + self.inputs)
        most = min(largest, min(self.rows, self.inputs) - 1)
        return sorted({min(most, round(factor * whole)) for factor in RANK_FACTORS})


@dataclass(frozen=True)
class RankBudget:
    """What all layers may take: `mean_bits` for each weight with the branch, or a `share` of values for branches.

    `branch_bits` are those of a value of a branch.
    """

    mean_bits: float | None
    share: float
    branch_bits: int

    def choose(
        self, layers: Sequence[LayerShape], errors: Mapping[str, Mapping[RankChoice, float]], where: str
    ) -> dict[str, RankChoice]:
        """Return the candidate of each layer at the least sum of errors. Raise RecipeError."""
        choices = [sorted(errors[layer.name]) for layer in layers]
        table = [[errors[layer.name][c] for c in row] for layer, row in zip(layers, choices, strict=True)]
        costs = [[self._cost(layer, c) for c in row] for layer, row in zip(layers, choices, strict=True)]
        whole = sum(layer.size for layer in layers)
        amount = self.share if self.mean_bits is None else self.mean_bits
        allocation = allocate(table, costs, math.floor(amount * whole * (1 + 1e-12)))
        if allocation is None:
            raise RecipeError(
                f"the budget of {amount:g} bits a weight cannot be met: the smallest possible is "
                f"{smallest(costs) / whole:.3f}",
                where=f"{where}.mean_bits",
                hint="allow more, or smaller widths",
            )
        return {layer.name: row[c] for layer, row, c in zip(layers, choices, allocation.chosen, strict=True)}

    def _cost(self, layer: LayerShape, choice: RankChoice) -> int:
        if self.mean_bits is None:
            return layer.branch(choice.rank)
        return choice.bits * layer.size + self.branch_bits * layer.branch(choice.rank)
