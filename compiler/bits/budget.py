"""The cost of an allocation of bits, in whole numbers for each choice of each unit, and the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ..core.program import Program
from ..errors import RecipeError
from ..graph.nodes import name_of
from ..graph.weight_store import bare, parameter_bytes
from .allocation import smallest
from .units import FLOAT, FLOAT_BITS, BitChoice, Unit

BudgetKind = Literal["mean_bits", "size", "latency", "bops"]
WORDS = {
    "mean_bits": "{:.3f} bits a weight",
    "size": "{:.4f} of the fp32 size",
    "latency": "{:.3f} of the integer latency",
    "bops": "{:.4f} of the bit operations of W8A8",
}
_FINE = 1000  # costs are whole numbers: latencies count in thousandths of an integer multiplication


@dataclass(frozen=True)
class Budget:
    """A budget of `amount`. An allocation of some cost takes (cost + `base`) / `whole` of it."""

    kind: BudgetKind
    amount: float
    costs: list[list[int]]
    base: int
    whole: int

    @classmethod
    def of(
        cls,
        kind: BudgetKind,
        amount: float,
        units: Sequence[Unit],
        choices: Sequence[Sequence[BitChoice]],
        program: Program,
        float_cost: float,
    ) -> Budget:
        pairs = list(zip(units, choices, strict=True))
        base = 0
        if kind in ("mean_bits", "size"):
            costs = [[unit.size * choice.weight for choice in row] for unit, row in pairs]
            whole = sum(unit.size for unit in units)
            if kind == "size":
                base = 8 * fixed_bytes(units, program)
                whole = 8 * int(program.source.get("parameter_bytes", parameter_bytes(program.model)))
        elif kind == "latency":
            price = round(_FINE * float_cost)
            costs = [[unit.macs * (price if choice == FLOAT else _FINE) for choice in row] for unit, row in pairs]
            whole = _FINE * sum(unit.macs for unit in units)
        else:
            costs = [[unit.macs * choice.weight * choice.activation for choice in row] for unit, row in pairs]
            whole = 64 * sum(unit.macs for unit in units)
        return cls(kind, amount, costs, base, max(whole, 1))

    @property
    def limit(self) -> int:
        """Return the largest cost that the amount allows."""
        return math.floor(self.amount * self.whole * (1 + 1e-12)) - self.base

    def takes(self, cost: int) -> float:
        return (cost + self.base) / self.whole

    def words(self, cost: int) -> str:
        return WORDS[self.kind].format(self.takes(cost))

    def check(self, where: str) -> None:
        """Raise RecipeError if no allocation fits into the budget."""
        least = smallest(self.costs)
        if least > self.limit:
            raise RecipeError(
                f"the budget of {WORDS[self.kind].format(self.amount)} cannot be met: "
                f"the smallest possible is {self.words(least)}",
                where=f"{where}.{self.kind}",
                hint="allow more, allow smaller widths, or keep fewer islands in float",
            )


def mean_bits(units: Sequence[Unit], chosen: Sequence[BitChoice]) -> float:
    """Return the mean bits of the units' weights; weights in float count 32."""
    total = sum(unit.size for unit in units)
    return sum(u.size * c.weight for u, c in zip(units, chosen, strict=True)) / total if total else float(FLOAT_BITS)


def fixed_bytes(units: Sequence[Unit], program: Program) -> int:
    """Return the bytes of a file without the units' weights: islands, norms, biases, table rows, and the graph itself.

    A bias that depends on the timestep already has a row for each timestep in the graph; scales that do multiply the
    others by the groups. The result is an estimate: on the digits a tenth too small, 0.006 of the fp32 size.
    """
    plan = program.require_plan()
    weights = {name_of(unit.weight): unit.size for unit in units if unit.weight is not None}
    rows = max(plan.groups, default=0) + 1
    total = parameter_bytes(program.model) - 4 * sum(weights.values())
    total += int(ir.to_proto(bare(program.model)).ByteSize())
    for layer in (layer for unit in units for layer in unit.layers):
        if layer.weight is None or layer.weight.shape is None or layer.weight_axis is None:
            continue
        channels = int(layer.weight.shape.numpy()[layer.weight_axis])
        tables = [plan.of(name_of(v), layer.name) for v in (*layer.activations, layer.output)]
        total += 4 * channels
        if layer.kind == "conv" and any(q is not None and q.table for q in tables):
            total += 4 * channels * rows
    return total
