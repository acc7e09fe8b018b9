"""Trials: the fidelity of quantized programs, measured on their lowered graphs and on held-out noise."""

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

from ..calibration.calibrate import batch_conditions, batch_spans, guided_output, network_call
from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..lowering.lower import lower


@dataclass(frozen=True)
class Trial:
    """The fidelity of one program, dB.

    `prediction_db` is the pooled SQNR of single calls on float latents; `image_db` is the mean SQNR of images that the
    program samples from the same noise as the float network.
    """

    prediction_db: float
    image_db: float


def compare_programs(programs: Sequence[Program], context: Context, samples: int, stage: str) -> list[Trial]:
    """Compare each lowered program with their float graph on `samples` held-out images.

    The programs are variants of one: they share its float graph, deployment and inputs.
    """
    fresh = replace(context, seed=SeedOffset.HELD_OUT.after(context.seed), samples=samples)
    first = programs[0]
    float_model = first.require_float_model()
    errors = [StepSQNR() for _ in programs]
    image_db: list[list[float]] = [[] for _ in programs]
    spans = batch_spans(first, fresh)
    total, done = len(spans) * len(first.deployment.calls) * (1 + len(programs)), 0
    with ExitStack() as stack:
        models = [float_model, *(lower(program) for program in programs)]
        exact, *trials = [stack.enter_context(Executor(m, context.folder, threads=context.threads)) for m in models]

        def predictor(executor: Executor, conditions: Conditions) -> Callable[[Images, Timestep], Images]:
            def predict(x: Images, t: Timestep) -> Images:
                nonlocal done
                done += 1
                context.progress(stage, done, total)
                return _output(executor, first, fresh, x, t, conditions)

            return predict

        for start, rows in spans:
            conditions = batch_conditions(first, fresh, start, rows)
            x = samplers.initial_noise(fresh.seed, (rows, *first.shape), first=start)
            noise = samplers.seeded_noise(fresh.seed, first=start)

            def paired(info: samplers.StepInfo, conditions: Conditions = conditions) -> None:
                for error, trial in zip(errors, trials, strict=True):
                    error.add(info.index, info.output, _output(trial, first, fresh, info.x, info.timestep, conditions))

            exact_images, *trial_images = (
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
            for values, images in zip(image_db, trial_images, strict=True):
                values += [sqnr_db(a, b) for a, b in zip(exact_images, images, strict=True)]
    return [Trial(e.pooled(), float(np.mean(values))) for e, values in zip(errors, image_db, strict=True)]


def judged(before: Program, after: Program, context: Context, samples: int, note: str, by: str) -> Program:
    """Return `after` if its images from held-out noise are at least as good as those of `before`, else `before`.

    The note records the decision. With `samples` 0, `after` is returned without a trial.
    """
    if not samples:
        return after.noted(f"{note}; not judged")
    trials = compare_programs((before, after), context, samples, f"{by}, held out")
    kept = trials[1].image_db >= trials[0].image_db
    return (after if kept else before).noted(f"{note}; {_verdict(*trials, kept=kept)}")


def _verdict(before: Trial, after: Trial, *, kept: bool) -> str:
    """Return the effect of a change on held-out images, for the history."""
    return (
        f"{'kept' if kept else 'thrown away'}: on held-out noise pictures {before.image_db:.2f} -> "
        f"{after.image_db:.2f} dB, epsilon {before.prediction_db:.2f} -> {after.prediction_db:.2f} dB"
    )


def _output(executor: Executor, program: Program, context: Context, x: Images, t: Timestep, rows: Conditions) -> Images:
    signature = program.signature
    output = executor.call(signature, *network_call(program, context, x, t, rows))[signature.output]
    return guided_output(program, np.asarray(output, np.float32))
