"""share_bits: share bits out among the layers by a closed form, from weights and statistics alone.

assign_bits runs the network for each layer and width. Here nothing runs: the pass takes seconds for a network of any
size, and judges each layer by itself. Methods:

- `equal_loss` (BAQ, arXiv 2506.05664): a weight of b bits errs by c 4^-b, so that under a budget of bits the sum over
  all weights is least where each of them errs equally:

      b_u = t + log2(c_u) / 2            c_u = 4^8 E_u / n_u

  E_u is the error sum_i h_i (w_i - w'_i)^2 of the n_u weights of a layer in 8 bits, h_i the mean square of the weight's
  input over all calls, relative to the layer's output without the error. Each layer gets the nearest of `widths`, with
  the largest t that the budget allows.
- `outliers` (layer-wise quantization, arXiv 2406.17415): the share of a layer's weights that are more than one standard
  deviation above their mean. The layers with the largest shares get the widest width, all others the narrowest; which
  layers fit into the budget is an integer program (compiler/bits/allocation.py). The paper goes down its list.

`mean_bits` counts each weight of the layers that are not `islands`. Deviations: BAQ shares bits among the columns of a
weight, which one integer kernel cannot have; here it is among layers. The other score of layer-wise quantization, how
far a layer turns its input, asks for layers whose output has the size of the input: few have, in these networks.

Errors: StatsError if the graph changed after observe, or if `equal_loss` finds inputs that were not measured by
channel; RecipeError for a budget below the narrowest width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from mezzotint.compiler.bits.allocation import allocate
from mezzotint.compiler.bits.budget import Budget
from mezzotint.compiler.bits.units import BitChoice, Unit, WeightQuantizers, free_units, with_choices
from mezzotint.compiler.core.option_checks import require_widths
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.require import required
from mezzotint.compiler.rescaling.importance import input_importance
from mezzotint.compiler.rounding.weights import weight_rows
from mezzotint.compiler.scales.weights import rounded_weight
from mezzotint.runtime.arrays import Floats

REFERENCE_BITS = 8
FINE = 2.0**-20  # of a bit: how near t is to its largest value


@dataclass(frozen=True)
class ShareBits(Pass):
    """Widths of layers under a budget of `mean_bits` for each weight; `method` and `islands` as above."""

    mean_bits: float = 4.0
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    method: Literal["equal_loss", "outliers"] = "equal_loss"
    islands: tuple[str, ...] = ("first", "last")

    needs: ClassVar[frozenset[str]] = frozenset({"stats", "plan"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        require_widths(self, "widths")
        if not min(self.widths) <= self.mean_bits < np.inf:
            hint = f"choose {min(self.widths)} or more, the smallest of {self.name}.widths"
            raise RecipeError(f"{self.name}.mean_bits is {self.mean_bits}", where=self.name, hint=hint)

    def run(self, program: Program, context: Context) -> Program:
        plan, stats = program.require_plan(), program.require_stats()
        stats.check_graph(graphs.digest(program.model), self.name)
        units, kept = free_units(program, self.islands, self.name)
        if not units:
            return program.noted("no layer to choose for")
        quantizers = WeightQuantizers(plan, "mse", self.name)
        widths = self._equal(units, quantizers, stats) if self.method == "equal_loss" else self._widest(units, program)
        chosen = with_choices(units, [BitChoice(bits) for bits in widths], quantizers)
        taken = sum(unit.size * bits for unit, bits in zip(units, widths, strict=True)) / sum(u.size for u in units)
        counts = ", ".join(f"{widths.count(bits)} of {bits} bits" for bits in sorted(set(widths)))
        return replace(
            program,
            plan=replace(chosen, islands={**kept, **chosen.islands}),
            note=f"{counts}: {taken:.3f} bits a weight",
        )

    def _equal(self, units: Sequence[Unit], quantizers: WeightQuantizers, stats: Stats) -> list[int]:
        """Return the widths of equal loss."""
        costs = np.array([_loss(unit, quantizers, stats, self.name) for unit in units])
        ideal = np.log2(np.maximum(costs, 1e-300)) / 2
        sizes, widths = np.array([unit.size for unit in units]), np.array(sorted(self.widths))
        middles = (widths[1:] + widths[:-1]) / 2

        def at(t: float) -> list[int]:
            return [int(b) for b in widths[np.searchsorted(middles, ideal + t)]]

        low, high = float(-ideal.max()), float(widths[-1] - ideal.min())  # all the narrowest, all the widest
        while high - low > FINE:
            middle = (low + high) / 2
            fits = float(sizes @ at(middle)) <= self.mean_bits * sizes.sum()
            low, high = (middle, high) if fits else (low, middle)
        return at(low)

    def _widest(self, units: Sequence[Unit], program: Program) -> list[int]:
        """Return the widest width for the layers of the most outliers, the narrowest for the others."""
        choices = [BitChoice(b) for b in sorted({min(self.widths), max(self.widths)})]
        budget = Budget.of("mean_bits", self.mean_bits, units, [choices] * len(units), program, 1.0)
        scores = [outliers(numpy_of(unit.require_weight())) for unit in units]
        missed = [[score * unit.size] + [0.0] * (len(choices) - 1) for score, unit in zip(scores, units, strict=True)]
        found = required(allocate(missed, budget.costs, budget.limit), "an allocation within the budget", self.name)
        return [choices[k].weight for k in found.chosen]


def outliers(weight: Floats) -> float:
    """Return the share of the weights that are more than a standard deviation above their mean."""
    return float((weight > weight.mean(dtype=np.float64) + weight.std(dtype=np.float64)).mean())


def _loss(unit: Unit, quantizers: WeightQuantizers, stats: Stats, where: str) -> float:
    """Return c of a unit: the mean error of one of its weights in 8 bits, times 4^8, relative to the outputs' power."""
    first, weight = unit.layers[0], numpy_of(unit.require_weight())
    rows = weight_rows(unit.require_weight(), first.require_weight_axis())
    importance = input_importance(unit.layers, rows.shape[1], stats, where)
    rounded = rounded_weight(weight, quantizers(first, REFERENCE_BITS))
    left = np.moveaxis(weight - rounded, first.require_weight_axis(), 0).reshape(rows.shape)
    error, power = (_power(part, importance) for part in (left, rows))
    return float(4.0**REFERENCE_BITS * error / max(power, 1e-300) / unit.size)


def _power(rows: Floats, importance: Floats) -> float:
    """Return sum_i h_i w_i^2 over the rows `[rows, d]` of all groups, h `[groups, d]`."""
    parts = rows.reshape(len(importance), -1, rows.shape[1])
    return float(np.einsum("grd,grd,gd->", parts, parts, importance, dtype=np.float64, optimize=True))
