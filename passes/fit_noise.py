"""fit_noise: fit the noise that quantization adds to the prediction at each call, for the sampling loop to correct.

The float and the quantized denoiser are called on the same latents, those of the float trajectory; with guidance the
combined outputs are compared. From sums alone (runtime/sampling/noise_fit.py) come a scale, a shift for each channel,
and the variance that the error adds to the next state. The form `regression` is D2-DPM's regression on the quantized
output (arXiv 2501.08180); `ptqd` is the form of the PTQD paper (arXiv 2305.10657), and `ptqd-released` that of its
released code.

With `gate`, a second set of trajectories, from noise that the fit did not see, judges the fit. At each call only terms
that leave less error there are considered. Then whole images drawn from that noise decide between no correction, the
slope, the bias and both, and whether the sampler's noise is reduced. Single calls do not suffice: on the digits at W4A8
(DDPM, 10 steps) slope and bias together gain 2.7 dB of epsilon on float trajectories and lose 3.1 dB of the images; the
slope alone gains 1.9 and 2.0 dB. The quantized trajectory compensates by itself for the bias that is measured on float
latents.

Random subsets of the remaining error are tested for the assumptions of the methods: that it is Gaussian
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
"""Images that judge the candidates."""
EXACT_DB = 200.0  # the score of identical images
ALLOWED = {"none": ("none",), "slope": ("none", "slope"), "bias": ("none", "bias"), "both": PARTS}


@dataclass(frozen=True)
class FitNoise(Pass):
    """The correction of quantization noise in the sampling loop.

    - `form`: `regression`, `ptqd` or `ptqd-released`.
    - `gate`: keep only terms that help on held-out noise; otherwise all are kept, as in the papers.
    - `noise`: reduce the sampler's noise by the variance that the remaining error adds. PTQD does this; D2-DPM's
      deterministic form does not.
    """

    form: str = "regression"
    gate: bool = True
    noise: bool = True

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
        axis = program.signature.channel_axis
        fit, held_out, states = NoiseFit(axis), NoiseFit(axis), StateFit()
        drawn: list[Images] = []
        # Other noise than in calibration: the fit must not see the images that the ranges were chosen for.
        fitting = replace(context, seed=SeedOffset.NOISE_FIT.after(context.seed))
        self._follow(program, fitting, self.name, lambda info, got: fit.add(info.index, info.output, got))
        correction = fit.correction(program.deployment, steps, program.signature.prediction, self.form)
        residuals = Residuals(context.seed, axis)

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
        if not self.noise:
            correction = replace(correction, excess=np.zeros_like(correction.excess))
        candidates = {
            parts: fit.gated(correction, steps, held_out, states, allowed) for parts, allowed in ALLOWED.items()
        }
        rows = candidates["both"][1]
        scores: dict[str, float] = {}
        if self.gate:
            correction, rows, scores = self._chosen(program, fresh, candidates, np.concatenate(drawn)[:JUDGED])
        report = noise_report(correction, steps, rows, residuals, gate=self.gate, image_db=scores)
        return replace(program, correction=correction, noise_report=report, note=report["summary"])

    def _chosen(
        self, program: Program, context: Context, candidates: Mapping[str, tuple[Correction, list[Row]]], wanted: Images
    ) -> tuple[Correction, list[Row], dict[str, float]]:
        """Return the candidate whose images are nearest to those wanted, its rows, and the score of each candidate.

        The output's correction is chosen with the sampler's own noise; then the noise is reduced if that helps.
        """
        with Executor(lower(program), context.folder, threads=context.threads) as quantized:

            def score(table: Correction) -> float:
                return self._score(program, context, quantized, table, wanted)

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

    def _score(
        self, program: Program, context: Context, quantized: Executor, table: Correction, wanted: Images
    ) -> float:
        """Return the mean SQNR in dB of images drawn with this correction against those of the float network."""
        drawn: list[Images] = []
        last = len(program.deployment.calls) - 1

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            signature = program.signature
            return np.asarray(quantized.call(signature, x, t, conditions)[signature.output], np.float32)

        def keep(info: StepInfo) -> None:
            if info.index == last:
                drawn.append(info.x_next)

        few = replace(context, samples=min(context.samples, JUDGED))
        follow_trajectories(program, few, denoiser, f"{self.name}, images", keep, table)
        got = np.concatenate(drawn)[: len(wanted)]
        decibels = [sqnr_db(a, b) for a, b in zip(wanted, got, strict=True)]
        return float(np.mean(np.clip(decibels, -EXACT_DB, EXACT_DB)))

    @staticmethod
    def _follow(program: Program, context: Context, stage: str, see: See) -> None:
        """Call both networks along float trajectories; `see` gets each call and its quantized output."""
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
