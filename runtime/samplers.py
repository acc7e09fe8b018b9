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
    if deployment.sampler == "ddpm":
        steps = ddpm_coefficients(schedule, deployment.timesteps, correction=correction)
    else:
        steps = ddim_coefficients(schedule, deployment.timesteps, eta=deployment.eta, correction=correction)
    return _run(denoiser, x, schedule, steps, noise, correction, callback)


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
    return _run(denoiser, x, schedule, steps, noise, correction, callback)


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
    return _run(denoiser, x, schedule, steps, noise, correction, callback)


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


def _run(
    denoiser: Denoiser,
    x: Images,
    schedule: Schedule,
    steps: tuple[Coefficients, ...],
    noise: Noise | None,
    correction: Correction | None,
    callback: Callback | None,
) -> Images:
    if x.dtype != np.float32 or x.ndim != 4:
        raise InputError(f"x is {_kind(x)}; sampling begins with float32 [batch, channels, height, width]")
    if noise is None and any(step.sigma > 0 for step in steps):
        raise InputError("ddpm, and ddim with eta above 0, need noise", hint="pass noise=seeded_noise(seed)")
    limit = schedule.clip_sample_range if schedule.clip_sample else None
    scratch = np.empty_like(x, order="C")
    for index, step in enumerate(steps):
        output = denoiser(x, step.timestep)
        if output.shape != x.shape or output.dtype != np.float32:
            where = f"timestep {step.timestep}"
            raise InputError(f"the denoiser returned {_kind(output)} for x {_kind(x)}", where=where)
        fixed = output if correction is None else correction.apply(output, step.timestep)
        x_next = _advance(step, x, fixed, limit, scratch)
        if noise is not None and step.noise > 0:
            x_next += np.multiply(noise(index, x.shape), step.noise, out=scratch)
        if callback is not None:
            callback(StepInfo(index, step.timestep, x, output, x_next))
        x = x_next
    return x


def _advance(step: Coefficients, x: Images, output: Images, limit: float | None, scratch: Images) -> Images:
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
