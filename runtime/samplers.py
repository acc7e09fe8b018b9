"""The sampling loop: one function for each sampler, over any callable that predicts.

Calibration, noise fitting and production run this same loop; only the denoiser differs. The random numbers are handed
in, so that two runs (float beside quantized, ours beside another library's) can share them.

`steps.py` has the formulas of a step; here they are a few float32 passes over the batch. With a `Correction` (PTQD) the
output is corrected before the step, and the sampler's own noise is a little less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .correction import Correction
from .errors import InputError
from .schedule import Deployment, Schedule
from .steps import Coefficients, ddim_coefficients, ddpm_coefficients

Images = npt.NDArray[np.float32]
Denoiser = Callable[[Images, int], Images]
"""`(x float32 [B, C, H, W], timestep) -> raw model output of the same shape`."""
Noise = Callable[[int, tuple[int, ...]], Images]
"""`(index of the step, shape [B, C, H, W]) -> standard normal float32 noise`."""


@dataclass(frozen=True)
class StepInfo:
    """What one step saw and made. The arrays belong to the callback: the loop does not write to them again.

    `output` is the denoiser's own, before the correction (and the denoiser's to reuse, if it does).
    """

    index: int
    timestep: int
    x: Images
    output: Images
    x_next: Images


Callback = Callable[[StepInfo], None]


def sample(
    denoiser: Denoiser,
    x: Images,
    schedule: Schedule,
    deployment: Deployment,
    *,
    noise: Noise | None = None,
    correction: Correction | None = None,
    callback: Callback | None = None,
) -> Images:
    """Denoise `x` `[B, C, H, W]` as `deployment` says: `ddim` or `ddpm` below, whose `noise` it needs."""
    return _run(denoiser, x, stepper(schedule, deployment, correction=correction), noise, callback)


def stepper(schedule: Schedule, deployment: Deployment, *, correction: Correction | None = None) -> Stepper:
    """The steps of a deployment, for a caller that loops over them itself."""
    if deployment.sampler == "ddpm":
        steps = ddpm_coefficients(schedule, deployment.timesteps, correction=correction)
    else:
        steps = ddim_coefficients(schedule, deployment.timesteps, eta=deployment.eta, correction=correction)
    return Stepper(schedule, steps, correction)


def ddim(
    denoiser: Denoiser,
    x: Images,
    schedule: Schedule,
    timesteps: Sequence[int] | npt.NDArray[np.int64],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    correction: Correction | None = None,
    callback: Callback | None = None,
) -> Images:
    """Denoise `x` `[B, C, H, W]` by DDIM; eta 0 is deterministic, more needs `noise`. Returns float32, a new array."""
    steps = ddim_coefficients(schedule, timesteps, eta=eta, correction=correction)
    return _run(denoiser, x, Stepper(schedule, steps, correction), noise, callback)


def ddpm(
    denoiser: Denoiser,
    x: Images,
    schedule: Schedule,
    timesteps: Sequence[int] | npt.NDArray[np.int64],
    *,
    noise: Noise | None,
    correction: Correction | None = None,
    callback: Callback | None = None,
) -> Images:
    """Denoise `x` `[B, C, H, W]` by ancestral sampling, which needs `noise`. Returns float32, a new array."""
    steps = ddpm_coefficients(schedule, timesteps, correction=correction)
    return _run(denoiser, x, Stepper(schedule, steps, correction), noise, callback)


# What is measured on noise that something was fitted to looks better than it is. Everyone adds a number of their own to
# the seed of the calibration.
NOISE_FIT, HELD_OUT, EVALUATION = 1, 2, 3


def initial_noise(seed: int, shape: Sequence[int], *, first: int = 0) -> Images:
    """The state that sampling begins with, float32 `[B, C, H, W]`; its image i is image `first + i` of `seed`."""
    return _normal(seed, 0, tuple(shape), first)


def seeded_noise(seed: int, *, first: int = 0) -> Noise:
    """Noise for each (image, step), whatever the batches: image i of a batch is image `first + i` of `seed`."""
    return lambda index, shape: _normal(seed, index + 1, shape, first)


def _normal(seed: int, draw: int, shape: tuple[int, ...], first: int) -> Images:
    if seed < 0 or first < 0:
        raise InputError(f"seed {seed} and first image {first} must not be negative")
    out = np.empty(shape, dtype=np.float32)
    for i in range(shape[0]):
        # One generator (8 microseconds) for each image: this is what makes an image independent of its batch.
        key = np.random.SeedSequence(seed, spawn_key=(first + i, draw))
        np.random.Generator(np.random.PCG64(key)).standard_normal(dtype=np.float32, out=out[i])
    return out


@dataclass(frozen=True)
class Stepper:
    """What happens between two network calls. It holds no latents: any number of batches can be advanced side by side.

    `advance` is the body of the sampling loop; `sample` is that loop over one batch.
    """

    schedule: Schedule
    steps: tuple[Coefficients, ...]
    correction: Correction | None = None

    def advance(
        self, index: int, x: Images, output: Images, noise: Noise | None = None, *, scratch: Images | None = None
    ) -> Images:
        """The state `[B, C, H, W]` behind step `index`, a new array, from the state before it and the model's output.

        `noise` as in `sample`; `scratch`, a C-ordered array like `x`, saves an allocation. Raises InputError.
        """
        step = self.steps[index]
        if output.shape != x.shape or output.dtype != np.float32:
            where = f"timestep {step.timestep}"
            raise InputError(f"the denoiser returned {_kind(output)} for x {_kind(x)}", where=where)
        if noise is None and step.sigma > 0:
            raise InputError(
                "ddpm, and ddim with eta above 0, need noise",
                where=f"timestep {step.timestep}",
                hint="pass noise=seeded_noise(seed)",
            )
        limit = self.schedule.clip_sample_range if self.schedule.clip_sample else None
        spare = np.empty_like(x, order="C") if scratch is None else scratch
        fixed = output if self.correction is None else self.correction.apply(output, step.timestep)
        x_next = _linear(step, x, fixed, limit, spare)
        if noise is not None and step.noise > 0:
            x_next += np.multiply(noise(index, x.shape), step.noise, out=spare)
        return x_next


def _run(denoiser: Denoiser, x: Images, stepper: Stepper, noise: Noise | None, callback: Callback | None) -> Images:
    if x.dtype != np.float32 or x.ndim != 4:
        raise InputError(f"x is {_kind(x)}; sampling begins with float32 [batch, channels, height, width]")
    if noise is None and any(step.sigma > 0 for step in stepper.steps):
        raise InputError("ddpm, and ddim with eta above 0, need noise", hint="pass noise=seeded_noise(seed)")
    scratch = np.empty_like(x, order="C")
    for index, step in enumerate(stepper.steps):
        output = denoiser(x, step.timestep)
        x_next = stepper.advance(index, x, output, noise, scratch=scratch)
        if callback is not None:
            callback(StepInfo(index, step.timestep, x, output, x_next))
        x = x_next
    return x


def _linear(step: Coefficients, x: Images, output: Images, limit: float | None, scratch: Images) -> Images:
    """The deterministic part of a step, as a new array; terms whose coefficient is 0 cost nothing."""
    if limit is None:
        x_next = x * np.float32(step.from_image * step.image_x + step.from_x)
        x_next += np.multiply(output, np.float32(step.gain), out=scratch)
        return x_next
    x_next = output * np.float32(step.image_out)
    if step.image_x:
        x_next += np.multiply(x, np.float32(step.image_x), out=scratch)
    np.clip(x_next, -limit, limit, out=x_next)
    x_next *= np.float32(step.from_image)
    for scale, array in ((step.from_x, x), (step.from_out, output)):
        if scale:
            x_next += np.multiply(array, np.float32(scale), out=scratch)
    return x_next


def _kind(array: Images) -> str:
    return f"{array.dtype} {list(array.shape)}"
