"""The report of assign_bits: the profile, the Pareto curve and the choice, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mezzotint.runtime.compare import json_db

from .allocation import Allocation, allocate, smallest
from .budget import Budget, mean_bits
from .profile import Profile
from .simulate import Scene
from .units import FLOAT, BitChoice, Unit, joined

CURVE = 10  # budgets of the Pareto curve
MIXED = "mixed"  # the label of a layer whose channels have several widths


@dataclass(frozen=True, eq=False)
class BitReport:
    """`errors` are those of each choice of each unit, or part of one; `measured` is the error of a whole allocation."""

    units: Sequence[Unit]
    choices: Sequence[Sequence[BitChoice]]
    errors: Sequence[Sequence[float]]
    budget: Budget
    measured: Callable[[Sequence[BitChoice]], float]

    def picked(self, allocation: Allocation) -> list[BitChoice]:
        return [row[c] for row, c in zip(self.choices, allocation.chosen, strict=True)]

    def to_json(self, found: Allocation, profile: Profile, scenes: Sequence[Scene]) -> dict[str, Any]:
        """Return the report as JSON data. Decibels are None without an error."""
        timesteps = {scene.call: scene.timestep for scene in scenes}
        chosen = self.picked(found)
        table = {
            unit.name: {
                choice.label: [
                    json_db(_error_db(e)) for e in (profile.noise(unit.name, choice) / profile.signal).tolist()
                ]
                for choice in row
                if choice != FLOAT
            }
            for unit, row in zip(self.units, self.choices, strict=True)
        }
        return {
            "budget": {"kind": self.budget.kind, "amount": self.budget.amount},
            "calls": [{"call": call, "timestep": timesteps[call]} for call in profile.calls],
            "chosen": {**self._point(found), "measured_sqnr_db": json_db(_error_db(self.measured(chosen)))},
            "uniform": [self._uniform(choice) for choice in self._common()],
            "pareto": [self._point(point) for point in self._curve()],
            "units": self._labels(chosen),
            "profile": table,
        }

    def channels(self, found: Allocation) -> dict[str, dict[str, int]]:
        """Return the number of output channels by bits, for layers whose channels differ."""
        rows = [(unit.name, bits) for unit, _, bits in joined(self.units, self.picked(found)) if bits is not None]
        return {name: {str(b): int((bits == b).sum()) for b in np.unique(bits)} for name, bits in rows}

    def note(self, report: Mapping[str, Any]) -> str:
        """Return `report` as one line of the history."""
        point = report["chosen"]
        words = {"float": "in float", MIXED: "mixed by channel"}
        layers = [f"{n} {words.get(label, f'at {label} bits')}" for label, n in point["layers"].items()]
        sides = ", ".join(f"all at {u['label']}: {_words(u['measured_sqnr_db'])}" for u in report["uniform"])
        gap = f"; optimum not proven, gap {point['gap']:.1%}" if point["gap"] > 1e-3 else ""
        return (
            f"{len(report['units'])} layers: {', '.join(layers)}; {point['mean_bits']:.2f} bits a weight; "
            f"predicted SQNR {_words(point['sqnr_db'])} dB, measured {_words(point['measured_sqnr_db'])} ({sides}){gap}"
        )

    def _labels(self, chosen: Sequence[BitChoice]) -> dict[str, str]:
        """Return the label of each layer's width."""
        found = joined(self.units, chosen)
        return {unit.name: choice.label if bits is None else MIXED for unit, choice, bits in found}

    def _common(self) -> list[BitChoice]:
        """Return the choices that all units with weights share."""
        rows = [set(row) for unit, row in zip(self.units, self.choices, strict=True) if unit.weight is not None]
        shared = set.intersection(*rows) if rows else set()
        return sorted(shared - {FLOAT})

    def _uniform(self, choice: BitChoice) -> dict[str, Any]:
        chosen = tuple(row.index(choice) if choice in row else 0 for row in self.choices)
        made = Allocation(chosen, _sum(self.errors, chosen), int(_sum(self.budget.costs, chosen)), 0.0)
        measured = self.measured(self.picked(made))
        return {"label": choice.label, **self._point(made), "measured_sqnr_db": json_db(_error_db(measured))}

    def _curve(self) -> list[Allocation]:
        """Return the best allocations under evenly spaced budgets, from the smallest to the largest useful one."""
        costs = self.budget.costs
        free = sum(row[int(np.argmin(wrong))] for row, wrong in zip(costs, self.errors, strict=True))
        limits = np.linspace(smallest(costs), max(free, smallest(costs)), CURVE)
        found = [allocate(self.errors, costs, round(float(limit))) for limit in limits]
        distinct = {point.chosen: point for point in found if point is not None}
        return list(distinct.values())

    def _point(self, allocation: Allocation) -> dict[str, Any]:
        chosen = self.picked(allocation)
        counted = Counter(self._labels(chosen).values())
        layers = {label: counted[label] for label in sorted(counted, key=lambda x: (x in ("float", MIXED), x))}
        return {
            "takes": self.budget.takes(allocation.cost),
            "mean_bits": mean_bits(self.units, chosen),
            "sqnr_db": json_db(_error_db(_sum(self.errors, allocation.chosen))),
            "layers": layers,
            "gap": allocation.gap,
        }


def _sum(rows: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return float(sum(row[c] for row, c in zip(rows, chosen, strict=True)))


def _error_db(error: float) -> float:
    """Return the SQNR of an error that is relative to the signal."""
    return -10 * float(np.log10(error)) if error > 0 else float("inf")


def _words(db: float | None) -> str:
    return "infinite" if db is None else f"{db:.1f}"
