"""The sampling loop: one for all samplers, over any callable that predicts.

Calibration, noise fitting and production run this loop; only the denoiser differs. The random numbers are an argument,
so two runs can share them (float and quantized, Mezzotint and another library). Where calls use different networks
(precisions.py), the denoisers are a list by position of the call, because two calls may have one timestep.

`steps.py` has the arithmetic of a step, `solvers*.py` the scalars of each sampler; here they are a few float32 passes
over the batch. With a `Correction` the output is corrected before the step, and the sampler adds less noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from ..signature import Images, Predict, Timestep
from ..streams import noise_generator
from .correction import Correction
from .deployment import Deployment
from .schedule import Schedule
from .steps import Solver, State

NoiseSource = Callable[[int, tuple[int, ...]], Images]
"""`(index of the network call, shape [B, ...]) -> standard normal float32 noise`."""


@dataclass(frozen=True)
class StepInfo:
    """Input and output of one network call, for a callback. The loop does not write to the arrays again.

    `output` is the denoiser's own, before the correction (a denoiser may reuse that array); `state` is x and the
    remembered arrays of the solver before the call.
    """

    index: int
    timestep: Timestep
    x: Images
    output: Images
    x_next: Images
    state: State


Callback = Callable[[StepInfo], None]


def sample(
    denoiser: Predict | Sequence[Predict],
    x: Images,
    schedule: Schedule,
    deployment: Deployment,
    *,
    noise: NoiseSource | None = None,
    correction: Correction | None = None,
    callback: Callback | None = None,
) -> Images:
    """Denoise `x` `[B, ...]`, standard normal noise, by the sampler of `deployment`. Return a new float32 array.

    `denoiser` may be a list with one for each network call. Samplers that add noise need `noise`. Raises InputError,
    and TimestepNotDeployed for a correction of other calls.
    """
    return run_solver(denoiser, x, deployment.solver(schedule), noise=noise, correction=correction, callback=callback)


def run_solver(
    denoiser: Predict | Sequence[Predict],
    x: Images,
    solver: Solver,
    *,
    noise: NoiseSource | None = None,
    correction: Correction | None = None,
    callback: Callback | None = None,
) -> Images:
    """Return what `sample` returns, for a solver instead of a deployment."""
    if x.dtype != np.float32 or x.ndim < 2:
        raise InputError(f"x is {_kind(x)}; sampling begins with float32 [batch, ...]")
    calls = [denoiser] * len(solver.steps) if callable(denoiser) else denoiser
    if len(calls) != len(solver.steps):
        raise InputError(f"{len(calls)} denoisers for {len(solver.steps)} network calls", hint="give one for each")
    stepper = Stepper(solver, correction)
    if noise is None and any(step.sigma > 0 for step in solver.steps):
        raise _needs_noise()
    scratch = np.empty_like(x, order="C")
    state = stepper.begin(x)
    for index, step in enumerate(solver.steps):
        before, output = state, calls[index](state["x"], step.timestep)
        state = stepper.advance(index, before, output, noise, scratch=scratch)
        if callback is not None:
            callback(StepInfo(index, step.timestep, before["x"], output, state["x"], before))
    return state["x"]


def initial_noise(seed: int, shape: Sequence[int], *, first: int = 0) -> Images:
    """Return the initial noise, float32 `[B, ...]`; its image i is image `first + i` of `seed`."""
    return _normal(seed, 0, tuple(shape), first)


def seeded_noise(seed: int, *, first: int = 0) -> NoiseSource:
    """Return the noise of each (image, call), the same for all batch sizes; image i is image `first + i` of `seed`."""
    return lambda index, shape: _normal(seed, index + 1, shape, first)


def _normal(seed: int, draw: int, shape: tuple[int, ...], first: int) -> Images:
    if seed < 0 or first < 0:
        raise InputError(f"seed {seed} and first image {first} must not be negative")
    out = np.empty(shape, dtype=np.float32)
    for i in range(shape[0]):
        # One generator (8 microseconds) for each image makes the image independent of its batch.
        noise_generator(seed, first + i, draw).standard_normal(dtype=np.float32, out=out[i])
    return out


@dataclass(frozen=True)
class Stepper:
    """The computation between two network calls. It holds no latents, so several batches can be advanced side by side.

    `advance` is the body of the sampling loop; `run_solver` is that loop over one batch. `noise` is the standard
    deviation that each call really adds, after the correction.
    """

    solver: Solver
    correction: Correction | None = None
    noise: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.correction is None:
            object.__setattr__(self, "noise", tuple(step.sigma for step in self.solver.steps))
            return
        object.__setattr__(self, "noise", self.correction.noise(self.solver.steps))
        object.__setattr__(self, "solver", self.correction.redirected(self.solver))

    def begin(self, noise: Images) -> State:
        """Return the state before the first call, from standard normal noise `[B, ...]`."""
        return {"x": noise if self.solver.start == 1.0 else noise * np.float32(self.solver.start)}

    def advance(
        self,
        index: int,
        state: State,
        output: Images,
        noise: NoiseSource | None = None,
        *,
        scratch: Images | None = None,
    ) -> State:
        """Return the state after call `index`, as new arrays, from the state before it and the output for its x.

        `noise` as in `run_solver`; `scratch`, a C-ordered array like x, saves an allocation. Raises InputError.
        """
        step, x = self.solver.steps[index], state["x"]
        if output.shape != x.shape or output.dtype != np.float32:
            where = f"timestep {step.timestep:g}"
            raise InputError(f"the denoiser returned {_kind(output)} for x {_kind(x)}", where=where)
        if noise is None and step.sigma > 0:
            raise _needs_noise(f"timestep {step.timestep:g}")
        spare = np.empty_like(x, order="C") if scratch is None else scratch
        fixed = output if self.correction is None else self.correction.apply(output, index)
        after = step.advance(state, fixed, spare)
        if noise is not None and self.noise[index] > 0:
            after["x"] += np.multiply(noise(index, x.shape), np.float32(self.noise[index]), out=spare)
        return after


def _needs_noise(where: str | None = None) -> InputError:
    return InputError("this sampler adds noise at each step", where=where, hint="pass noise=seeded_noise(seed)")


def _kind(array: Images) -> str:
    return f"{array.dtype} {list(array.shape)}"
