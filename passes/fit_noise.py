"""fit_noise: what quantization adds to the prediction at each network call, for the sampling loop to undo.

The float and the quantized denoiser are called on the same latents, those of the float trajectory; under guidance the
combined outputs are compared. From sums alone (runtime/noise_fit.py) come a scale, a shift for each channel, and the
variance that the error brings into the next state: by D2-DPM's regression on the quantized output (form `regression`),
or as PTQD has it (arXiv 2305.10657), in the paper's form or in that of its released code.

A second set of trajectories, of noise that the fit did not see, judges each call: what does not help there is switched
off (`gate`), and random subsets of the remaining error are tested for what the methods assume of it: that it is
Gaussian (D'Agostino-Pearson) and independent of the signal. The tables hold for exactly this sampler, eta and guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..compiler.calibrate import Conditions, Images, follow_trajectories, guided_output
from ..compiler.errors import RecipeError, StatsError
from ..compiler.execute import Executor
from ..compiler.lowering import lower
from ..compiler.noise_report import Residuals, noise_report
from ..compiler.pipeline import Context, Pass
from ..compiler.program import Program
from ..runtime.correction import FORMS
from ..runtime.noise_fit import NoiseFit, StateFit
from ..runtime.samplers import HELD_OUT, NOISE_FIT, StepInfo
from ..runtime.steps import State, Timestep

Pair = tuple[Images, Images]
"""(float output, quantized output), combined under guidance."""
See = Callable[[int, Pair, State], None]


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
        # Calibration saw other noise: the fit must not be made on the very pictures that the ranges were chosen for.
        self._follow(
            program,
            replace(context, seed=context.seed + NOISE_FIT),
            self.name,
            lambda call, pair, _: fit.add(call, *pair),
        )
        correction = fit.correction(program.deployment, steps, program.signature.prediction, self.form)
        residuals = Residuals(correction, context.seed)

        def judge(call: int, pair: Pair, state: State) -> None:
            held_out.add(call, *pair)
            residuals.add(call, *pair)
            want, got = pair
            spare = np.empty_like(want)
            fixed = steps[call].advance(state, correction.apply(got, call), spare)
            states.add(call, steps[call].advance(state, want, spare)["x"], fixed["x"])

        self._follow(program, replace(context, seed=context.seed + HELD_OUT), f"{self.name}, held out", judge)
        if self.form == "regression":
            correction = states.measured(correction, steps)
        gated, rows = fit.gated(correction, steps, held_out, states)
        correction = gated if self.gate else correction
        report = noise_report(correction, steps, rows, residuals, gate=self.gate)
        return replace(program, correction=correction, noise_report=report, note=report["summary"])

    @staticmethod
    def _follow(program: Program, context: Context, stage: str, see: See) -> None:
        """Call both networks along float trajectories; `see` gets (call, both outputs, the state before the call)."""
        assert program.float_model is not None
        signature = program.signature
        latest: list[Images] = []
        with (
            Executor(program.float_model, context.folder, threads=context.threads) as exact,
            Executor(lower(program), context.folder, threads=context.threads) as quantized,
        ):

            def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
                want = np.asarray(exact.call(signature, x, t, conditions)[signature.output], np.float32)
                got = np.asarray(quantized.call(signature, x, t, conditions)[signature.output], np.float32)
                latest[:] = [guided_output(program, got)]
                return want

            def paired(info: StepInfo) -> None:
                see(info.index, (info.output, latest[0]), info.state)

            follow_trajectories(program, context, denoiser, stage, paired)
