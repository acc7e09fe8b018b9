"""fit_noise: what quantization adds to the prediction at each step, for the sampling loop to undo (PTQD, 2305.10657).

The float and the quantized denoiser are called on the same latents, those of the float trajectory. At each timestep the
difference D of the outputs is split into a part proportional to the float output, a bias per channel and a rest:

    D = k eps + r,   k = Cov(D, eps) / Var(eps),   bias_c = E[r_c] / (1 + k),   spread = std(r - E[r_c]) / (1 + k)

Only sums are kept. The tables hold for exactly this sampler, number of steps and eta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..compiler.calibrate import Conditions, Images, follow_trajectories
from ..compiler.errors import StatsError
from ..compiler.execute import Executor
from ..compiler.lowering import lower
from ..compiler.pipeline import Context, Pass
from ..compiler.program import Program
from ..runtime.correction import NoiseFit
from ..runtime.samplers import NOISE_FIT


@dataclass(frozen=True)
class FitNoise(Pass):
    """Runs the float graph (as it was before insert_qdq) beside the lowered quantized one."""

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"correction"})

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        signature = program.signature
        fit = NoiseFit()
        # Calibration saw other noise: the fit must not be made on the very pictures that the ranges were chosen for.
        fresh = replace(context, seed=context.seed + NOISE_FIT)
        with (
            Executor(program.float_model, context.folder, threads=context.threads) as exact,
            Executor(lower(program), context.folder, threads=context.threads) as quantized,
        ):

            def denoiser(x: Images, t: int, conditions: Conditions) -> Images:
                want = np.asarray(exact.call(signature, x, t, conditions)[signature.output], np.float32)
                got = quantized.call(signature, x, t, conditions)[signature.output]
                fit.add(t, want, got)
                return want

            calls = follow_trajectories(program, fresh, denoiser, self.name)
        correction = fit.correction(program.deployment)
        slopes = np.abs(correction.slope)
        note = f"{calls} paired calls, |slope| up to {slopes.max():.4f}, spread up to {correction.spread.max():.4f}"
        return replace(program, correction=correction, note=note)
