"""How sparse each layer becomes under one budget: OBC's non-uniform compression, by the program of assign_bits.

    minimise sum_l e[l, s(l)]    subject to    sum_l cost[l, s(l)] <= budget        (compiler/bits/allocation.py)

OBC solves it by dynamic programming over a grid of budgets; the integer program needs no grid. The error of a layer at
a sparsity s is that of its own outputs, which H gives without a run, times what such an error makes in epsilon: that is
measured once for each layer, at the middle level (`output`), or the same for all (`layer`, as in OBC, each layer
relative to its outputs). Costs:

    size    bits of the file: those of the weights that stay, and one for each weight (or block) of a sparse layer
    flops   multiplications by weights that stay
    bops    the same times the bits of both factors
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..bits.allocation import allocate, smallest
from ..errors import RecipeError
from .patterns import PruningPattern

SparsityBudget = Literal["size", "flops", "bops"]
ACTIVATION_BITS = 8
BUDGET_WORDS = {
    "size": "{:.4f} of the fp32 size",
    "flops": "{:.4f} of the multiplications",
    "bops": "{:.4f} of the bit operations of W8A8",
}


@dataclass(frozen=True)
class LayerLevels:
    """A layer's number of weights and of multiplications, and its error at each level of sparsity."""

    name: str
    weights: int
    macs: int
    errors: Mapping[float, float]


@dataclass(frozen=True)
class SparsityProgram:
    """A budget over layers. `bits` is the width that weights will have, `fixed` the bytes of all other parameters."""

    kind: SparsityBudget
    amount: float
    pattern: PruningPattern
    bits: int
    fixed: int
    parameters: int

    def choose(self, layers: Sequence[LayerLevels], where: str) -> tuple[dict[str, float], float]:
        """Return (the sparsity of each layer, what the allocation takes of the budget). Raise RecipeError."""
        levels = [sorted(layer.errors) for layer in layers]
        errors = [[layer.errors[s] for s in row] for layer, row in zip(layers, levels, strict=True)]
        costs = [[self._cost(layer, s) for s in row] for layer, row in zip(layers, levels, strict=True)]
        whole, base = self._whole(layers)
        allocation = allocate(errors, costs, math.floor(self.amount * whole * (1 + 1e-12)) - base)
        if allocation is None:
            least = self.words((smallest(costs) + base) / whole)
            raise RecipeError(
                f"the budget of {self.words(self.amount)} cannot be met: the smallest possible is {least}",
                where=f"{where}.{self.kind}",
                hint="allow more, add higher levels, or keep fewer islands dense",
            )
        chosen = {layer.name: row[c] for layer, row, c in zip(layers, levels, allocation.chosen, strict=True)}
        return chosen, (allocation.cost + base) / whole

    def words(self, taken: float) -> str:
        """Return a share of the budget's whole, for display."""
        return BUDGET_WORDS[self.kind].format(taken)

    def _cost(self, layer: LayerLevels, sparsity: float) -> int:
        if self.kind == "size":
            mask = layer.weights // self.pattern.block if sparsity else 0
            return round((1 - sparsity) * layer.weights) * self.bits + mask
        kept = round((1 - sparsity) * layer.macs)
        return kept if self.kind == "flops" else kept * self.bits * ACTIVATION_BITS

    def _whole(self, layers: Sequence[LayerLevels]) -> tuple[int, int]:
        """Return (what the whole of the budget is, what no choice changes)."""
        if self.kind == "size":
            return 8 * self.parameters, 8 * self.fixed
        macs = max(sum(layer.macs for layer in layers), 1)
        return (macs if self.kind == "flops" else 64 * macs), 0
