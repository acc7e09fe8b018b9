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

A batch of samples is a piece for the workers of `--cluster` (compiler/correction/noise_runs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import ClassVar

import numpy as np

from mezzotint.compiler.calibration.calibrate import batch_spans
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.noise_report import Residuals, noise_report
from mezzotint.compiler.correction.noise_runs import DrawnBatch, FittedBatch, JudgedBatch, NoiseRuns, Span
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.sampling.correction import FORMS, Correction
from mezzotint.runtime.sampling.noise_fit import PARTS, NoiseFit, Row, StateFit
from mezzotint.runtime.signature import Images
from mezzotint.runtime.streams import SeedOffset

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
        with NoiseRuns(program, context) as runs:
            return self._fitted(program, context, runs)

    def _fitted(self, program: Program, context: Context, runs: NoiseRuns) -> Program:
        steps = program.deployment.solver(program.schedule).steps
        axis = program.signature.channel_axis
        spans = batch_spans(program, context)
        # Other noise than in calibration: the fit must not see the images that the ranges were chosen for.
        seed, fresh = SeedOffset.NOISE_FIT.after(context.seed), SeedOffset.HELD_OUT.after(context.seed)
        fit, held_out, states = NoiseFit(axis), NoiseFit(axis), StateFit()
        for part in runs([FittedBatch(seed, span) for span in spans], self.name):
            fit += part
        correction = fit.correction(program.deployment, steps, program.signature.prediction, self.form)
        residuals, drawn = Residuals(context.seed), []
        judged = []
        for span in spans:
            size = span[1] * prod(program.shape)
            places = {call: residuals.choose(call, size) for call in range(len(steps))}
            judged.append(JudgedBatch(fresh, span, correction, places))
        for found in runs(judged, f"{self.name}, held out"):
            held_out, states = held_out + found.fit, states + found.states
            drawn += found.drawn
            for call, values in found.residuals.items():
                residuals.add(call, values)
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
            wanted = np.concatenate(drawn)[:JUDGED]
            few = batch_spans(program, replace(context, samples=min(context.samples, JUDGED)))
            correction, rows, scores = self._chosen(candidates, wanted, partial(self._images, runs, fresh, few))
        report = noise_report(correction, steps, rows, residuals, gate=self.gate, image_db=scores)
        return replace(program, correction=correction, noise_report=report, note=report["summary"])

    @staticmethod
    def _chosen(
        candidates: Mapping[str, tuple[Correction, list[Row]]],
        wanted: Images,
        draw: Callable[[Sequence[Correction]], list[Images]],
    ) -> tuple[Correction, list[Row], dict[str, float]]:
        """Return the candidate whose images are nearest to those wanted, its rows, and the score of each candidate.

        The output's correction is chosen with the sampler's own noise; then the noise is reduced if that helps.
        """
        outputs = {parts: replace(table, excess=0 * table.excess) for parts, (table, _) in candidates.items()}
        images = draw(list(outputs.values()))
        scores = {parts: _score(got, wanted) for parts, got in zip(outputs, images, strict=True)}
        best = max(scores, key=lambda parts: scores[parts])
        table, (lessened, rows) = outputs[best], candidates[best]
        if lessened.excess.any():
            scores["noise"] = _score(draw([lessened])[0], wanted)
            if scores["noise"] > scores[best]:
                table = lessened
        for row, excess in zip(rows, table.excess, strict=True):
            row["variance_kept"] = bool(excess > 0)
        return table, rows, scores

    def _images(self, runs: NoiseRuns, seed: int, spans: Sequence[Span], tables: Sequence[Correction]) -> list[Images]:
        """Return the images of the batches drawn with each correction."""
        pieces = [DrawnBatch(seed, span, table) for table in tables for span in spans]
        found = list(runs(pieces, f"{self.name}, images"))
        each = len(spans)
        return [np.concatenate(found[i : i + each]) for i in range(0, len(found), each)]


def _score(got: Images, wanted: Images) -> float:
    """Return the mean SQNR in dB of images against those of the float network."""
    decibels = [sqnr_db(a, b) for a, b in zip(wanted, got[: len(wanted)], strict=True)]
    return float(np.mean(np.clip(decibels, -EXACT_DB, EXACT_DB)))
