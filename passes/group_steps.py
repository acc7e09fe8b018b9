"""group_steps: choose which network calls share one row of the scale tables.

The groups are contiguous and minimise the expected quantization error. For a value v and a call k with range R_vk and
mean square P_vk, quantizing with the range of the call's group g costs (R_vg / n)^2 / 12 relative to P_vk, where n is
the number of steps of the grid and R_vg the largest range of the group. Up to a constant, the group of calls i to j
costs

    C(i, j) = sum_v sum_{k in i..j} (max_{l in i..j} R_vl)^2 / P_vk

Dynamic programming (`dp`) finds the cheapest cut of T calls into G groups exactly, in O(T^2 G). `even` cuts into groups
of equal size, and `each` gives every call its own row. TDQ (arXiv 2306.02316) has one interval for each step; a few
groups are as good and smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.core.formats import UINT8
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.scales.ranges import check_percentile, range_of


@dataclass(frozen=True)
class GroupSteps(Pass):
    """Groups of network calls, for the rows of the scale tables.

    - `method`: `dp`, `even` or `each`.
    - `groups`: the largest number of rows.
    - `percentile`: in percent; the range R of a call.

    The pass needs statistics of each call (`observe.groups` = 0).
    """

    method: Literal["dp", "even", "each"] = "dp"
    groups: int = 10
    percentile: float = 99.999

    needs: ClassVar[frozenset[str]] = frozenset({"plan", "stats"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"groups"})

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise RecipeError(f"group_steps.groups is {self.groups}", where="group_steps", hint="choose 1 or more")
        check_percentile(self.percentile, self.name)

    def run(self, program: Program, context: Context) -> Program:
        calls = len(program.deployment.timesteps)
        stats, plan = program.require_stats(), program.require_plan()
        stats.check_every_call(program.deployment.timesteps, self.name)
        groups = self._cut(stats, calls)
        sizes = np.bincount(groups)
        note = f"{calls} calls in {len(sizes)} groups of {', '.join(map(str, sizes))}"
        return replace(program, plan=replace(plan, groups=groups), note=note)

    def _cut(self, stats: Stats, calls: int) -> tuple[int, ...]:
        count = min(self.groups, calls)
        if self.method == "each":
            return tuple(range(calls))
        if self.method == "even":
            return tuple(k * count // calls for k in range(calls))
        return cheapest_cut(*self._ranges_and_powers(stats, calls), count)

    def _ranges_and_powers(self, stats: Stats, calls: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return (widths of the ranges, mean squares), both `[values, calls]`."""
        names = list(stats.values())
        widths, powers = np.ones((len(names), calls)), np.ones((len(names), calls))
        for v, name in enumerate(names):
            for k in range(calls):
                summary = stats.summaries[name, k]
                low, high = range_of(summary, "percentile", self.percentile, UINT8)
                widths[v, k] = max(high, 0.0) - min(low, 0.0)
                powers[v, k] = max(summary.square / max(summary.count, 1), 1e-20)
        return widths, powers


def cheapest_cut(widths: npt.NDArray[np.float64], powers: npt.NDArray[np.float64], groups: int) -> tuple[int, ...]:
    """Return the group of each call: `groups` contiguous groups of least total cost (see the module's docstring)."""
    calls = widths.shape[1]
    cost = np.full((calls, calls), np.inf)
    for first in range(calls):
        widest = np.maximum.accumulate(widths[:, first:], axis=1) ** 2
        inverse = np.cumsum(1.0 / powers[:, first:], axis=1)
        cost[first, first:] = (widest * inverse).sum(axis=0)
    best = np.full((groups + 1, calls + 1), np.inf)
    best[0, 0] = 0.0
    cut = np.zeros((groups + 1, calls + 1), np.int64)
    for g in range(1, groups + 1):
        for end in range(1, calls + 1):
            totals = best[g - 1, :end] + cost[:end, end - 1]
            cut[g, end] = int(np.argmin(totals))
            best[g, end] = totals[cut[g, end]]
    row, end = np.empty(calls, np.int64), calls
    for g in range(groups, 0, -1):
        start = int(cut[g, end])
        row[start:end] = g - 1
        end = start
    return tuple(int(r) for r in row)
