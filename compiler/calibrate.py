"""Drives the sampling loop with a denoiser of the compiler: calibration and fitting see what production sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime import samplers
from .errors import ConditionError
from .pipeline import Context
from .program import Program

Images = npt.NDArray[np.float32]
Conditions = dict[str, npt.NDArray[Any]]
CalibrationDenoiser = Callable[[Images, int, Conditions], Images]


def follow_trajectories(program: Program, context: Context, denoiser: CalibrationDenoiser, stage: str) -> int:
    """Sample `context.samples` images with the deployed sampler from seeded noise; returns the number of calls.

    A graph with its batch written in gets whole batches, a few images more than asked for perhaps.
    The denoiser is called as `(x [B, C, H, W], timestep, conditions of the same rows) -> output`; nothing is kept.
    """
    deployment = program.deployment
    check_conditions(program, context)
    starts = range(0, context.samples, program.fixed_batch or context.batch)
    total = len(starts) * len(deployment.timesteps)
    calls = 0
    for first in starts:
        rows = program.fixed_batch or min(context.batch, context.samples - first)
        conditions = context.condition_rows(first, rows)

        def call(x: Images, t: int, conditions: Conditions = conditions) -> Images:
            nonlocal calls
            output = denoiser(x, t, conditions)
            calls += 1
            context.progress(stage, calls, total)
            return output

        x = samplers.initial_noise(context.seed, (rows, *program.shape), first=first)
        noise = samplers.seeded_noise(context.seed, first=first)
        samplers.sample(call, x, program.schedule, deployment, noise=noise)
    return calls


def check_conditions(program: Program, context: Context) -> None:
    """Refuse to calibrate a conditional model on conditions that nobody chose, or that do not fit its inputs."""
    for name, value in program.conditions().items():
        rows = context.conditions.get(name)
        if rows is None:
            raise ConditionError(
                f"the model has a condition {name!r} ({value.dtype}{value.shape}), and no data to calibrate it on",
                where=f"input {name}",
                hint="give --conditions FILE.npz with an array of that name, [rows, ...]; or --conditions random",
            )
        if value.dtype is not None and rows.dtype != value.dtype.numpy():
            raise ConditionError(
                f"the data for {name!r} is {rows.dtype}; the model wants {value.dtype.numpy()}",
                where=f"input {name}",
                hint=f"convert it: array.astype(numpy.{value.dtype.numpy()})",
            )
        fixed = [] if value.shape is None else list(value.shape)[1:]
        fits = rows.ndim == len(fixed) + 1 and all(
            not isinstance(want, int) or want == have for want, have in zip(fixed, rows.shape[1:], strict=False)
        )
        if not fits or not len(rows):
            raise ConditionError(
                f"the data for {name!r} has the shape {list(rows.shape)}; the model wants {value.shape}",
                where=f"input {name}",
                hint="the first dimension counts rows, the others must be the model's",
            )
    if extra := set(context.conditions) - set(program.conditions()):
        raise ConditionError(
            f"the model has no condition {sorted(extra)[0]!r}",
            hint=f"its conditions are: {', '.join(program.conditions()) or 'none'}",
        )


def random_conditions(program: Program, rows: int, seed: int) -> Conditions:
    """Standard normal rows for every float condition: for speed and size, not for quality.

    Integer conditions (class labels) are refused: nobody knows their range. Open dimensions too.
    """
    rng = np.random.default_rng([seed, 0xC])
    made: Conditions = {}
    for name, value in program.conditions().items():
        sizes = [] if value.shape is None else list(value.shape)[1:]
        if value.dtype is None or not value.dtype.is_floating_point() or not all(isinstance(d, int) for d in sizes):
            raise ConditionError(
                f"no random values can be drawn for the condition {name!r} ({value.dtype}{value.shape})",
                hint="give --conditions FILE.npz with real ones",
            )
        shape = [rows, *(int(d) for d in sizes if isinstance(d, int))]
        made[name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return made
