"""fit_noise: what quantization adds to the prediction at each network call, for the sampling loop to undo.

The float and the quantized denoiser are called on the same latents, those of the float trajectory; under guidance the
combined outputs are compared. From sums alone (runtime/sampling/noise_fit.py) come a scale, a shift for each channel,
and the variance that the error brings into the next state: by D2-DPM's regression on the quantized output (form
`regression`), or as PTQD has it (arXiv 2305.10657), in the paper's form or in that of its released code.

A second set of trajectories, of noise that the fit did not see, judges (`gate`). At each call only what leaves less
error there is considered; and then whole pictures decide, drawn from that noise with nothing undone, the slope, the
bias, or both, and with the noise lessened. Single calls do not suffice: on the digits at W4A8 (DDPM, 10 steps) slope
and bias together gain 2.7 dB of epsilon on float trajectories and lose 3.1 dB of pictures, the slope alone gains 1.9
and 2.0 dB. The bias that is seen on float latents is one that the quantized trajectory makes up for by itself.

Random subsets of the remaining error are tested for what the methods assume of it: that it is Gaussian
(D'Agostino-Pearson) and independent of the signal. The tables hold for exactly this sampler, eta and guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mezzotint.compiler.calibration.calibrate import follow_trajectories, guided_output
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.noise_report import Residuals, noise_report
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.lowering.lower import lower
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.sampling.correction import FORMS, Correction
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.noise_fit import PARTS, NoiseFit, Row, StateFit
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.signature import Images, Timestep
from mezzotint.runtime.streams import SeedOffset

See = Callable[[StepInfo, Images], None]
JUDGED = 16
"""Pictures that candidates are judged by."""
EXACT_DB = 200.0  # identical pictures count as so near
ALLOWED = {"none": ("none",), "slope": ("none", "slope"), "bias": ("none", "bias"), "both": PARTS}


@dataclass(frozen=True)
class FitNoise(Pass):
    """Runs the float graph (as it was before insert_qdq) beside the lowered quantized one.

    `form` is regression, ptqd or ptqd-released. Without `gate` everything is kept, as the papers do.
    """

    form: str = "regression"
    gate: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"correction"})

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise RecipeError(
                f"{self.name}.form is {self.form!r}", where=self.name, hint=f"choose one of {', '.join(FORMS)}"
            )

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        steps = program.deployment.solver(program.schedule).steps
        fit, held_out, states = NoiseFit(), NoiseFit(), StateFit()
        drawn: list[Images] = []
        # Calibration saw other noise: the fit must not be made on the very pictures that the ranges were chosen for.
        fitting = replace(context, seed=SeedOffset.NOISE_FIT.after(context.seed))
        self._follow(program, fitting, self.name, lambda info, got: fit.add(info.index, info.output, got))
        correction = fit.correction(program.deployment, steps, program.signature.prediction, self.form)
        residuals = Residuals(context.seed)

        def judge(info: StepInfo, got: Images) -> None:
            held_out.add(info.index, info.output, got)
            residuals.add(info.index, info.output, got)
            step, spare = steps[info.index], np.empty_like(got)
            fixed = step.advance(info.state, correction.apply(got, info.index), spare)
            states.add(info.index, step.advance(info.state, info.output, spare)["x"], fixed["x"])
            if info.index == len(steps) - 1:
                drawn.append(info.x_next)

        fresh = replace(context, seed=SeedOffset.HELD_OUT.after(context.seed))
        self._follow(program, fresh, f"{self.name}, held out", judge)
        if self.form == "regression":
            correction = states.measured(correction, steps)
        candidates = {
            parts: fit.gated(correction, steps, held_out, states, allowed) for parts, allowed in ALLOWED.items()
        }
        rows = candidates["both"][1]
        scores: dict[str, float] = {}
        if self.gate:
            correction, rows, scores = self._chosen(program, fresh, candidates, np.concatenate(drawn)[:JUDGED])
        report = noise_report(correction, steps, rows, residuals, gate=self.gate, pictures=scores)
        return replace(program, correction=correction, noise_report=report, note=report["summary"])

    def _chosen(
        self, program: Program, context: Context, candidates: Mapping[str, tuple[Correction, list[Row]]], wanted: Images
    ) -> tuple[Correction, list[Row], dict[str, float]]:
        """The candidate whose pictures are nearest to those wanted, its rows, and how near each came.

        The output's correction is chosen with the sampler's own noise; then that noise is lessened, if it helps.
        """
        with Executor(lower(program), context.folder, threads=context.threads) as quantized:

            def score(table: Correction) -> float:
                return self._pictures(program, context, quantized, table, wanted)

            outputs = {parts: replace(table, excess=0 * table.excess) for parts, (table, _) in candidates.items()}
            scores = {parts: score(table) for parts, table in outputs.items()}
            best = max(scores, key=lambda parts: scores[parts])
            table, (lessened, rows) = outputs[best], candidates[best]
            if lessened.excess.any():
                scores["noise"] = score(lessened)
                if scores["noise"] > scores[best]:
                    table = lessened
        for row, excess in zip(rows, table.excess, strict=True):
            row["variance_kept"] = bool(excess > 0)
        return table, rows, scores

    def _pictures(
        self, program: Program, context: Context, quantized: Executor, table: Correction, wanted: Images
    ) -> float:
        """How near pictures drawn with this correction come to those of the float network: the mean of their dB."""
        found: list[Images] = []
        last = len(program.deployment.calls) - 1

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            signature = program.signature
            return np.asarray(quantized.call(signature, x, t, conditions)[signature.output], np.float32)

        def keep(info: StepInfo) -> None:
            if info.index == last:
                found.append(info.x_next)

        few = replace(context, samples=min(context.samples, JUDGED))
        follow_trajectories(program, few, denoiser, f"{self.name}, pictures", keep, table)
        got = np.concatenate(found)[: len(wanted)]
        decibels = [sqnr_db(a, b) for a, b in zip(wanted, got, strict=True)]
        return float(np.mean(np.clip(decibels, -EXACT_DB, EXACT_DB)))

    @staticmethod
    def _follow(program: Program, context: Context, stage: str, see: See) -> None:
        """Call both networks along float trajectories; `see` gets each call and the quantized output for it."""
        float_model, signature = program.require_float_model(), program.signature
        latest: list[Images] = []
        with (
            Executor(float_model, context.folder, threads=context.threads) as exact,
            Executor(lower(program), context.folder, threads=context.threads) as quantized,
        ):

            def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
                want = np.asarray(exact.call(signature, x, t, conditions)[signature.output], np.float32)
                got = np.asarray(quantized.call(signature, x, t, conditions)[signature.output], np.float32)
                latest[:] = [guided_output(program, got)]
                return want

            follow_trajectories(program, context, denoiser, stage, lambda info: see(info, latest[0]))
