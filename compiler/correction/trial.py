"""Trials: how good a quantized program is, measured where production runs and on noise that nobody calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from mezzotint.runtime.compare import StepSQNR, sqnr_db
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep
from mezzotint.runtime.streams import SeedOffset

from ..calibration.calibrate import batch_conditions, batch_spans, both_halves, guided_output
from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..lowering.lower import lower


@dataclass(frozen=True)
class Trial:
    """`prediction`: pooled SQNR of single calls on float latents, dB; `pictures`: of the pictures that the program
    draws by itself from the same noise, the mean of their dB."""

    prediction: float
    pictures: float


def compare_programs(programs: Sequence[Program], context: Context, samples: int, stage: str) -> list[Trial]:
    """A trial of each lowered program beside their float graph, on `samples` held-out pictures.

    The programs are variants of one: they share its float graph, deployment and inputs.
    """
    fresh = replace(context, seed=SeedOffset.HELD_OUT.after(context.seed), samples=samples)
    first = programs[0]
    assert first.float_model is not None
    errors = [StepSQNR() for _ in programs]
    pictures: list[list[float]] = [[] for _ in programs]
    spans = batch_spans(first, fresh)
    total, done = len(spans) * len(first.deployment.calls) * (1 + len(programs)), 0
    with ExitStack() as stack:
        models = [first.float_model, *(lower(program) for program in programs)]
        exact, *trials = [stack.enter_context(Executor(m, context.folder, threads=context.threads)) for m in models]

        def predictor(executor: Executor, conditions: Conditions) -> Callable[[Images, Timestep], Images]:
            def predict(x: Images, t: Timestep) -> Images:
                nonlocal done
                done += 1
                context.progress(stage, done, total)
                return _output(executor, first, x, t, conditions)

            return predict

        for start, rows in spans:
            conditions = batch_conditions(first, fresh, start, rows)
            x = samplers.initial_noise(fresh.seed, (rows, *first.shape), first=start)
            noise = samplers.seeded_noise(fresh.seed, first=start)

            def paired(info: samplers.StepInfo, conditions: Conditions = conditions) -> None:
                for error, trial in zip(errors, trials, strict=True):
                    error.add(info.index, info.output, _output(trial, first, info.x, info.timestep, conditions))

            want, *got = (
                samplers.sample(
                    predictor(executor, conditions),
                    x,
                    first.schedule,
                    first.deployment,
                    noise=noise,
                    callback=paired if executor is exact else None,
                )
                for executor in (exact, *trials)
            )
            for found, images in zip(pictures, got, strict=True):
                found += [sqnr_db(a, b) for a, b in zip(want, images, strict=True)]
    return [Trial(e.pooled(), float(np.mean(p))) for e, p in zip(errors, pictures, strict=True)]


def judged(before: Program, after: Program, context: Context, samples: int, note: str, by: str) -> Program:
    """The changed program, unless pictures of noise that it was not fitted to are worse for it; the note says which.

    Without `samples` the change is kept unseen.
    """
    if not samples:
        return after.noted(f"{note}; not judged")
    trials = compare_programs((before, after), context, samples, f"{by}, held out")
    kept = trials[1].pictures >= trials[0].pictures
    return (after if kept else before).noted(f"{note}; {_verdict(*trials, kept=kept)}")


def _verdict(before: Trial, after: Trial, *, kept: bool) -> str:
    """What a change did to held-out pictures, for the history."""
    return (
        f"{'kept' if kept else 'thrown away'}: on held-out noise pictures {before.pictures:.2f} -> "
        f"{after.pictures:.2f} dB, epsilon {before.prediction:.2f} -> {after.prediction:.2f} dB"
    )


def _output(executor: Executor, program: Program, x: Images, t: Timestep, conditions: Conditions) -> Images:
    signature = program.signature
    output = executor.call(signature, both_halves(program, x), t, conditions)[signature.output]
    return guided_output(program, np.asarray(output, np.float32))
