"""settle_scales: measure each call's scales on the latents that the quantized calls before it produce.

Calibration of call i on the float trajectory assumes inputs that never occur: in deployment the calls before i are
quantized, and their errors have moved the latents. PCR (Progressive Calibration and Activation Relaxing, arXiv
2311.06322) calibrates call by call behind a quantized prefix. Restarted from the noise for each call, this takes
T (T + 1) / 2 network calls for each sample. Here all samples advance in lock-step, which takes 2 T calls:

    for i in 0 .. T - 1:
        s_i, z_i  = range of every activation of the float network on the latents x_i of all samples
        x_(i + 1) = one step of the sampler from x_i with the network quantized by s_i, z_i

Only latents are kept between the calls. The quantized network is one session whose rows of scales and zero points are
inputs (compiler/scales/row_inputs.py). It computes the quantizers exactly and convolutions in float, as QDQ graphs do
without integer kernels.

Calls that share a row (group_steps): during the trajectory the row rests on the group's calls so far, at the end on all
of them. Ranges are chosen as in step_scales. Static scales and weights do not change. Every sample counts at every
call, whatever allocate_steps chose. The paper's second part, 10-bit activations at a few calls, is left out, because no
integer kernel has 10 bits.

Errors: RecipeError for tables per channel (channel_scales) or with one zero point for all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mezzotint.compiler.calibration.calibrate import LockStep
from mezzotint.compiler.calibration.collect import Collector
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import scale_for_range
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.scales.ranges import RangeMethod, check_percentile, range_of
from mezzotint.compiler.scales.row_inputs import find_tables, replace_tables, stacked, table_quantizers, with_row_inputs
from mezzotint.runtime.arrays import Floats, Integers
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep


@dataclass(frozen=True)
class SettleScales(Pass):
    """Rows of the scale tables, measured behind the quantized calls before them.

    - `activations`, `percentile`: as in step_scales, whose tables get new rows."""

    activations: RangeMethod = "percentile"
    percentile: float = 99.999

    needs: ClassVar[frozenset[str]] = frozenset({"qdq", "tables"})

    def __post_init__(self) -> None:
        check_percentile(self.percentile, self.name)

    def run(self, program: Program, context: Context) -> Program:
        plan = program.require_plan()
        if program.float_model is None:
            raise StatsError("the float graph to measure is gone", where=self.name, hint="run insert_qdq first")
        moving = table_quantizers(program)
        if not moving:
            return program.noted("no scale moves with the timestep: nothing to settle")
        per_channel = any(q.axis is not None for q in moving.values())
        several = any(len(q.zero_point) > 1 for q in moving.values())  # one row has one zero point either way
        if per_channel or (several and not any(np.ptp(q.zero_point) for q in moving.values())):
            raise RecipeError(
                "tables per channel, or around one zero point, would be replaced by tables of another kind",
                where=self.name,
                hint="leave out channel_scales, and step_scales.zero_point=constant",
            )
        tables = find_tables(program, self.name)
        scales, zeros = (table.copy() for table in stacked(program))
        names = list(dict.fromkeys(site.value for site in moving))
        inputs = {name_of(v) for v in program.float_model.graph.inputs}
        taps = [name for name in names if name not in inputs]
        signature, threads = program.signature, context.threads
        walk = LockStep(program, context)
        calls = program.deployment.calls
        group_of = dict(zip(program.deployment.timesteps, plan.groups, strict=True))
        total, done = 2 * len(walk) * len(calls), 0
        with (
            Collector() as collector,
            Executor(program.float_model, context.folder, taps=taps, threads=threads, spinning=False) as exact,
            Executor(with_row_inputs(program.model, tables), context.folder, threads=threads) as quantized,
        ):
            for call, timestep in enumerate(calls):
                group = group_of[timestep]
                for x, conditions in walk.batches():
                    seen = {signature.sample: x, **conditions, **exact.call(signature, x, timestep, conditions)}
                    collector.add(group, timestep, {name: seen[name] for name in names})
                    done += 1
                    context.progress(self.name, done, total)
                collector.settle()
                scales[group], zeros[group] = self._row(moving, collector, group)
                row = {tables.scales_row: scales[group], tables.zeros_row: zeros[group]}

                def denoiser(x: Images, t: Timestep, conditions: Conditions, row: Conditions = row) -> Images:
                    nonlocal done
                    outputs = quantized.call(signature, x, t, {**conditions, **row})
                    done += 1
                    context.progress(self.name, done, total)
                    return np.asarray(outputs[signature.output], np.float32)

                walk.advance(denoiser)
                if all(group_of[t] != group for t in calls[call + 1 :]):
                    _forget(collector, names, group)
        replace_tables(program.graph, tables, scales, zeros)
        settled = {
            site: replace(q, scale=scales[:, i].copy(), zero_point=zeros[:, i].copy(), by=self.name)
            for i, (site, q) in enumerate(moving.items())
        }
        change = np.abs(np.log2(scales / stacked(program)[0]))
        note = f"{len(moving)} tables of {len(scales)} rows; scales moved by {2 ** np.median(change) - 1:.2%} (median)"
        return replace(program, plan=replace(plan, quantizers={**plan.quantizers, **settled}), note=note)

    def _row(self, moving: dict[Site, Quantizer], collector: Collector, group: int) -> tuple[Floats, Integers]:
        """Return (scales, zero points) `[n]` from the activations of a group's calls so far."""
        pairs = []
        for site, quantizer in moving.items():
            summary = collector.summaries[site.value, group]
            low, high = range_of(summary, self.activations, self.percentile, quantizer.format)
            pairs.append(scale_for_range(low, high, quantizer.format))
        return np.stack([scale for scale, _ in pairs]), np.stack([zero for _, zero in pairs])


def _forget(collector: Collector, names: Iterable[str], group: int) -> None:
    """Drop the summaries of a group after its last call."""
    for name in names:
        del collector.summaries[name, group]
