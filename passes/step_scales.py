"""step_scales: activation scales that know the timestep, only where that pays.

For every activation the ranges of each group of calls are found like those of choose_scales, from that group's own
statistics. The quantizer becomes a table of scales and zero points, one row for each group, when the expected error
over all calls falls by `gain` or more in dB; one whose range does not move stays static, and the report says how many
moved. (TDQ, arXiv 2306.02316; TFMQ-DM, arXiv 2311.16503; measured directly instead of learned.)

Zero points are in the table too: around one constant zero point the digits lose what the tables gain (31.9 dB of
epsilon instead of 33.0), and the convolutions were no faster: what slows them is the bias that is a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..compiler.pipeline import Context, Pass
from ..compiler.program import Plan, Program, Quantizer, Site
from ..compiler.quant import Format, scale_for_range
from ..compiler.ranges import Method, check_percentile, expected_error, range_of
from ..compiler.stats import Summary


@dataclass(frozen=True)
class StepScales(Pass):
    """`activations` and `percentile` as in choose_scales; `gain` in dB."""

    activations: Method = "percentile"
    percentile: float = 99.999
    gain: float = 0.2

    needs: ClassVar[frozenset[str]] = frozenset({"stats", "plan", "groups", "frozen"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"tables"})

    def __post_init__(self) -> None:
        check_percentile(self.percentile, self.name)

    def run(self, program: Program, context: Context) -> Program:
        stats, plan = program.stats, program.plan
        assert stats is not None and plan is not None  # the order check saw to it
        members = [[k for k, g in enumerate(plan.groups) if g == row] for row in range(max(plan.groups) + 1)]
        quantizers = dict(plan.quantizers)
        moved = measured = 0
        for site, quantizer in plan.quantizers.items():
            calls = [stats.summaries.get((site.value, k)) for k in range(stats.groups)]
            summaries = [s for s in calls if s is not None]
            if len(summaries) != stats.groups:
                continue  # a weight
            measured += 1
            table = self._table(site, quantizer, [_merged([summaries[k] for k in group]) for group in members])
            if table is not None:
                quantizers[site] = table
                moved += 1
            context.progress(self.name, measured, len(list(stats.values())))
        note = f"{moved} of {measured} activations move with the timestep; {len(members)} rows"
        return replace(program, plan=Plan(quantizers, plan.islands, plan.groups), note=note)

    def _table(self, site: Site, quantizer: Quantizer, groups: list[Summary]) -> Quantizer | None:
        fmt = quantizer.format
        ranges = [range_of(s, self.activations, self.percentile, fmt) for s in groups]
        static = _static_range(quantizer, fmt)
        power = [max(s.square / max(s.count, 1), 1e-20) for s in groups]
        before = sum(expected_error(s, *static, fmt) / p for s, p in zip(groups, power, strict=True))
        after = sum(expected_error(s, *r, fmt) / p for s, r, p in zip(groups, ranges, power, strict=True))
        if 10 * np.log10(max(before, 1e-30) / max(after, 1e-30)) < self.gain:
            return None
        scale, zero = scale_for_range([r[0] for r in ranges], [r[1] for r in ranges], fmt)
        return Quantizer(fmt, scale, zero, self.name, table=True)


def _merged(summaries: list[Summary]) -> Summary:
    return sum(summaries[1:], summaries[0])


def _static_range(quantizer: Quantizer, fmt: Format) -> tuple[float, float]:
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    return (fmt.qmin - zero) * scale, (fmt.qmax - zero) * scale
