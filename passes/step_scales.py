"""step_scales: give activations scales that depend on the timestep, where that pays.

The range of each activation is chosen as in choose_scales, but for each group of calls from the statistics of that
group. The quantizer becomes a table of scales and zero points with one row for each group, if the expected error over
all calls falls by `gain` dB or more. Other activations stay static, and the note says how many got tables. (TFMQ-DM,
arXiv 2311.16503, has one scale for each timestep in this way.)

With `source: learned` the ranges in the tables come from a small network over the timestep, which is fitted here and
not kept (TDQ, arXiv 2306.02316; compiler/scales/tdq.py has the formulas). It is evaluated at the timestep of every
call. Calls that share a row get the widest of their ranges, so TDQ itself is `group_steps.method: each`.

Zero points are in the table as well. The lowering `constant` has constant ones only: `zero_point: constant` gives all
rows of a table one zero point z. The scale of each row is then so wide that the grid reaches both ends of the row's
range within half a step, which is also what rounding a zero point of its own costs a row:

    s = max(-low / (z - qmin + 1/2), high / (qmax - z + 1/2))

z is the candidate with the least expected error over all rows: the static quantizer's zero point, or one of 17 evenly
spaced between the lowest and the highest that the rows would have by themselves. On the digits one shared zero point
costs 0.01 dB of epsilon.

The expected error of a value does not say what the value means to the output. With `decide: held_out` the activations
of at least `gain` dB are only candidates: their quantizers are simulated on the float graph, and the smallest set of
tables is kept whose prediction, on noise that calibration did not see, is within `loss` dB of the best
(compiler/bits/table_trial.py). This knows quantizers on inputs only, the form of the lowering `constant`, where a table
costs a Mul in front of a quantizer and one behind each layer that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.bits.table_trial import TableLimits, choose_tables
from mezzotint.compiler.core.formats import SMALLEST_SCALE, Format, scale_for_range
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.core.stats import Summary
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.scales.ranges import RangeMethod, check_percentile, expected_error, range_of
from mezzotint.compiler.scales.tdq import learned_ranges
from mezzotint.runtime.arrays import Floats, Integers
from mezzotint.runtime.sampling.deployment import Deployment

CANDIDATES = 17  # shared zero points that are tried between the extremes


@dataclass(frozen=True)
class StepScales(Pass):
    """Tables of activation scales over the timestep.

    - `activations`, `percentile`: as in choose_scales.
    - `gain`: in dB, the least gain for which an activation gets a table.
    - `source`: `measured` ranges, or ranges `learned` from there.
    - `clip_weight` (1 or more; for `learned`): how much worse a squared error by clipping counts than one by rounding,
      which averages out along the trajectory. On the digits 1 gave a better epsilon but worse images than 2 to 4, and
      none of them gave better images than the measured ranges.
    - `zero_point`: one for each row (`table`), or one for all (`constant`).
    - `decide`: by the `expected` error of each activation, or by the prediction on `held_out` noise.

    For `held_out`, with the formula of its cost in compiler/bits/table_trial.py:

    - `islands`: those of insert_qdq; what only these read needs no table. null where they are not needed.
    - `loss`: in dB, how much worse than the best set a smaller one may be.
    - `samples`, `judges`: images whose noise ranks the tables, and images of other noise that judge sets of them.
    - `calls`: network calls of each image that are compared, evenly spaced. `ranked`: tables that are measured one by
      one, those of the largest expected gain.
    """

    activations: RangeMethod = "percentile"
    percentile: float = 99.999
    gain: float = 0.2
    source: Literal["measured", "learned"] = "measured"
    clip_weight: float = 4.0
    zero_point: Literal["table", "constant"] = "table"
    decide: Literal["expected", "held_out"] = "expected"
    islands: tuple[str, ...] | None = None
    loss: float = 0.25
    samples: int = 4
    judges: int = 8
    calls: int = 5
    ranked: int = 32

    needs: ClassVar[frozenset[str]] = frozenset({"stats", "plan", "groups", "frozen"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"tables"})

    def __post_init__(self) -> None:
        check_percentile(self.percentile, self.name)
        if not 1 <= self.clip_weight < np.inf:
            raise RecipeError(
                f"step_scales.clip_weight is {self.clip_weight}", where=self.name, hint="choose 1 (as rounding) or more"
            )
        for option, least in (("loss", 0), ("samples", 1), ("judges", 1), ("calls", 1), ("ranked", 1)):
            if not least <= getattr(self, option) < np.inf:
                raise RecipeError(
                    f"step_scales.{option} is {getattr(self, option)}", where=self.name, hint=f"choose {least} or more"
                )

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        written = [p.options()["lowering"] for p in passes if p.name == "insert_qdq"]
        if self.decide == "held_out" and written != ["constant"]:
            raise RecipeError(
                f"a trial of tables knows the lowering constant, and the recipe has {', '.join(written) or 'none'}",
                where=f"{self.name}.decide",
                hint="set step_scales.decide to expected, or choose a target that has this lowering",
            )
        if self.decide == "held_out" and self.islands is None:
            raise RecipeError(
                "held-out noise judges the quantized layers, and the islands among them are not known",
                where=f"{self.name}.islands",
                hint="set step_scales.islands to those of insert_qdq",
            )

    def run(self, program: Program, context: Context) -> Program:
        stats, plan = program.require_stats(), program.require_plan()
        stats.check_every_call(program.deployment.timesteps, self.name)
        members = [[k for k, g in enumerate(plan.groups) if g == row] for row in range(max(plan.groups) + 1)]
        moving: dict[Site, list[Summary]] = {}
        tables: dict[Site, Quantizer] = {}
        gains: dict[Site, float] = {}
        measured = 0
        for site, quantizer in plan.quantizers.items():
            calls = [stats.summaries.get((site.value, k)) for k in range(stats.groups)]
            summaries = [s for s in calls if s is not None]
            if len(summaries) != stats.groups:
                continue  # a weight
            measured += 1
            table, gain = self._table(quantizer, [_merged([summaries[k] for k in group]) for group in members])
            if gain >= self.gain:
                tables[site], moving[site], gains[site] = table, summaries, gain
            context.progress(self.name, measured, len(list(stats.values())))
        if self.source == "learned":
            tables |= self._learned(program, moving, members, context)
        note = f"{len(tables)} of {measured} activations move with the timestep; {len(members)} rows"
        if self.decide == "held_out":
            promising = {site: tables[site] for site in sorted(tables, key=lambda site: -gains[site])}
            limits = TableLimits(self.loss, self.samples, self.judges, self.calls, self.ranked)
            choice = choose_tables(program, context, promising, self.islands or (), limits, self.name)
            tables, note = dict(choice.tables), f"{choice.note()}; {len(members)} rows"
        return replace(program, plan=replace(plan, quantizers={**plan.quantizers, **tables}), note=note)

    def _table(self, quantizer: Quantizer, groups: list[Summary]) -> tuple[Quantizer, float]:
        """Return the table of an activation, and the gain in dB that is expected of it."""
        fmt = quantizer.format
        ranges = [range_of(s, self.activations, self.percentile, fmt) for s in groups]
        static = [_static_range(quantizer, fmt)] * len(groups)
        scale, zero = self._rows(groups, ranges, quantizer)
        if self.zero_point == "constant":
            ranges = _grids(scale, zero, fmt)
        before, after = (_relative_error(groups, rows, fmt) for rows in (static, ranges))
        gain = float(10 * np.log10(max(before, 1e-30) / max(after, 1e-30)))
        return Quantizer(fmt, scale, zero, self.name, table=True), gain

    def _rows(
        self, groups: list[Summary], ranges: list[tuple[float, float]], quantizer: Quantizer
    ) -> tuple[Floats, Integers]:
        """Return (scales, zero points) `[rows]`, one of each for each range."""
        fmt = quantizer.format
        scale, zero = scale_for_range([r[0] for r in ranges], [r[1] for r in ranges], fmt)
        if self.zero_point == "table" or fmt.symmetric:
            return scale, zero
        return _around_one_zero_point(groups, ranges, np.append(zero, quantizer.zero_point), fmt)

    def _learned(
        self, program: Program, moving: dict[Site, list[Summary]], members: list[list[int]], context: Context
    ) -> dict[Site, Quantizer]:
        """Return the tables of the activations in `moving`, with ranges from networks fitted to all calls."""
        planned = program.require_plan().quantizers
        tables: dict[Site, Quantizer] = {}
        formats = {site: planned[site].format for site in moving}
        for fmt in dict.fromkeys(formats.values()):
            sites = [site for site in moving if formats[site] == fmt]
            calls = [moving[site] for site in sites]
            learned = learned_ranges(
                calls,
                np.array([[range_of(s, self.activations, self.percentile, fmt) for s in seen] for seen in calls]),
                fmt,
                program.deployment.timesteps,
                program.schedule.num_train_timesteps,
                clip_weight=self.clip_weight,
                seed=context.seed,
                progress=lambda done, total: context.progress(f"{self.name} (learning)", done, total),
            )
            for site, seen, by_call in zip(sites, calls, learned, strict=True):
                ranges = [(by_call[group, 0].min(), by_call[group, 1].max()) for group in members]
                groups = [_merged([seen[k] for k in group]) for group in members]
                scale, zero = self._rows(groups, ranges, planned[site])
                tables[site] = Quantizer(fmt, scale, zero, self.name, table=True)
        return tables


def _around_one_zero_point(
    groups: list[Summary], ranges: list[tuple[float, float]], zeros: Integers, fmt: Format
) -> tuple[Floats, Integers]:
    """Return scales and equal zero points `[groups]` of least expected error; the last of `zeros` is the static one."""
    low, high = (np.array(ends, np.float64) for ends in zip(*ranges, strict=True))
    between = np.unique(np.rint(np.linspace(int(zeros.min()), int(zeros.max()), CANDIDATES)).astype(zeros.dtype))
    rows = [_scales_around(int(z), low, high, fmt) for z in (zeros[-1], *between)]
    return min(rows, key=lambda row: _relative_error(groups, _grids(row[0], row[1], fmt), fmt))


def _scales_around(
    zero: int, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], fmt: Format
) -> tuple[Floats, Integers]:
    """Return the smallest scales with which a grid around `zero` reaches from `low` to `high`, within half a step."""
    width = np.maximum(-low / (zero - fmt.qmin + 0.5), high / (fmt.qmax - zero + 0.5))
    return np.maximum(width, SMALLEST_SCALE).astype(np.float32), np.full(len(low), zero, fmt.dtype)


def _grids(scale: Floats, zero: Integers, fmt: Format) -> list[tuple[float, float]]:
    """Return the ends of each row's grid."""
    return [((fmt.qmin - int(z)) * float(s), (fmt.qmax - int(z)) * float(s)) for s, z in zip(scale, zero, strict=True)]


def _relative_error(groups: list[Summary], ranges: list[tuple[float, float]], fmt: Format) -> float:
    """Return the sum over groups of the expected squared error relative to the group's mean square."""
    power = [max(s.square / max(s.count, 1), 1e-20) for s in groups]
    return sum(expected_error(s, *r, fmt) / p for s, r, p in zip(groups, ranges, power, strict=True))


def _merged(summaries: list[Summary]) -> Summary:
    return sum(summaries[1:], summaries[0])


def _static_range(quantizer: Quantizer, fmt: Format) -> tuple[float, float]:
    return _grids(quantizer.scale.reshape(1), quantizer.zero_point.reshape(1), fmt)[0]
