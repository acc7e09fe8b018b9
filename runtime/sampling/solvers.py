"""DDPM, DDIM and few-step consistency sampling, which go from one training timestep to another, and flow matching.

    ddim   Song et al., arXiv 2010.02502, formula 12
    ddpm   Ho et al., arXiv 2006.11239, formula 7
    lcm    Luo et al., arXiv 2310.04378: the picture by a skip connection, noised again to the next timestep
    flow_euler   Euler's method on the velocity of a rectified flow (arXiv 2403.03206), with the schedule's shift

Where diffusers has a convention (where the last step ends, which timesteps "leading" means), it is that of the
scheduler named in `deployment.py`, option for option; what is not implemented is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..errors import InputError, ScheduleError
from ..signature import whole
from .flow_sigmas import flow_sigmas
from .schedule import FLOW_CLASSES, LEARNED, Schedule
from .steps import Solver, Step, image_of, noise_of

Timesteps = Sequence[int] | npt.NDArray[np.int64]


def ddim(schedule: Schedule, timesteps: Timesteps, *, eta: float = 0.0) -> Solver:
    """DDIM; eta 0 is deterministic, 1 as noisy as DDPM.

    For the schedule's own timesteps a step ends at t - train // steps, as in diffusers: with the spacings linspace and
    trailing that is not always where the next one begins. For any other list it ends where the next one begins.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta is {eta}", hint="0 is deterministic DDIM, 1 as noisy as DDPM; choose between")
    times = _checked_timesteps(schedule, timesteps)
    ends = [*times[1:], -1]
    if _are_own(schedule, times):
        ends = [t - schedule.num_train_timesteps // len(times) for t in times]
    steps = []
    for t, end in zip(times, ends, strict=True):
        bar = float(schedule.alphas_cumprod[t])
        bar_next = float(schedule.alphas_cumprod[end]) if end >= 0 else schedule.final_alpha_cumprod
        # At the last step bar_next may equal bar (set_alpha_to_one false): rounding must not make a root negative.
        sigma = eta * math.sqrt(max(0.0, (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)))
        direction = math.sqrt(max(0.0, 1 - bar_next - sigma**2))
        levels = math.sqrt(bar), math.sqrt(1 - bar)
        noise_x, noise_out = noise_of(schedule, *levels)
        # The direction is that of the network's noise, also where the image was clipped.
        row = {"image": math.sqrt(bar_next), "x": direction * noise_x, "out": direction * noise_out}
        steps.append(Step(t, *image_of(schedule, *levels), row, sigma=sigma, clip=_clip(schedule, True)))
    return Solver(tuple(steps))


def ddpm(schedule: Schedule, timesteps: Timesteps) -> Solver:
    """Ancestral sampling: each step ends where the next one begins, the last one at abar = 1."""
    times = _checked_timesteps(schedule, timesteps)
    if schedule.variance_type in LEARNED:
        raise ScheduleError(
            f"ddpm with variance_type {schedule.variance_type!r} reads a variance that the network predicts, and the "
            "compiled network keeps the image's channels only",
            hint="use ddim with eta 1, or set variance_type to fixed_small",
        )
    steps = []
    for t, end in zip(times, [*times[1:], -1], strict=True):
        bar = float(schedule.alphas_cumprod[t])
        bar_next = float(schedule.alphas_cumprod[end]) if end >= 0 else 1.0
        beta = 1 - bar / bar_next
        variance = beta if schedule.variance_type == "fixed_large" else (1 - bar_next) / (1 - bar) * beta
        image = image_of(schedule, math.sqrt(bar), math.sqrt(1 - bar))
        row = {
            "image": math.sqrt(bar_next) * beta / (1 - bar),
            "x": math.sqrt(bar / bar_next) * (1 - bar_next) / (1 - bar),
        }
        sigma = math.sqrt(variance) if t > 0 else 0.0
        steps.append(Step(t, *image, row, sigma=sigma, clip=_clip(schedule, True)))
    return Solver(tuple(steps))


def lcm(schedule: Schedule, steps: int) -> Solver:
    """Few-step consistency sampling, at timesteps of the `original_inference_steps` that the model was distilled on."""
    original, train = int(schedule.option("original_inference_steps")), schedule.num_train_timesteps
    if not 1 <= steps <= original <= train:
        raise ScheduleError(
            f"{steps} steps of lcm are not possible", hint=f"the model was distilled on {original}: ask for fewer"
        )
    known = (np.arange(original)[::-1] + 1) * (train // original) - 1
    times = whole(known[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)])
    found = []
    for i, t in enumerate(times):
        bar = float(schedule.alphas_cumprod[int(t)])
        scaled = float(t) * float(schedule.option("timestep_scaling"))
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)  # sigma_data is 0.5
        last = i == len(times) - 1
        bar_next = 1.0 if last else float(schedule.alphas_cumprod[int(times[i + 1])])
        row = {"image": math.sqrt(bar_next) * out, "x": math.sqrt(bar_next) * skip}
        image = image_of(schedule, math.sqrt(bar), math.sqrt(1 - bar))
        found.append(Step(t, *image, row, sigma=math.sqrt(1 - bar_next), clip=_clip(schedule, False)))
    return Solver(tuple(found))


def flow_euler(schedule: Schedule, steps: int) -> Solver:
    """x' = x + (sigma' - sigma) * velocity; with `stochastic_sampling` the image, noised again to sigma'."""
    if schedule.shift is None:
        raise ScheduleError("flow-euler needs a schedule of flow matching", hint="use another sampler")
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise ScheduleError(f"{steps} steps are not possible", hint=f"ask for 1 to {schedule.num_train_timesteps}")
    if schedule.config.get("_class_name") in FLOW_CLASSES:
        name = str(schedule.config["_class_name"])
        raise ScheduleError(f"flow-euler does not read the flow_shift of a {name}", hint=f"use {FLOW_CLASSES[name]}")
    train = schedule.num_train_timesteps
    sigmas = flow_sigmas(schedule.reader, schedule.shift, train, steps)
    times = whole(sigmas * np.float32(train))
    ends = [*sigmas[1:].astype(float), 0.0]
    found = []
    for t, sigma, end in zip(times, sigmas.astype(float).tolist(), ends, strict=True):
        image = image_of(schedule, 1 - sigma, sigma)
        if schedule.option("stochastic_sampling"):
            found.append(Step(t, *image, {"image": 1 - end}, sigma=end))
        elif schedule.prediction == "sample":  # velocity = (x - image) / sigma
            found.append(Step(t, *image, {"x": end / sigma, "image": 1 - end / sigma}))
        else:
            towards_noise = -1.0 if schedule.prediction == "reversed_flow_prediction" else 1.0
            found.append(Step(t, *image, {"x": 1.0, "out": towards_noise * (end - sigma)}))
    return Solver(tuple(found))


def _clip(schedule: Schedule, default: bool) -> float | None:
    return schedule.clip_sample_range if schedule.reader.flag("clip_sample", default) else None


def _are_own(schedule: Schedule, times: list[int]) -> bool:
    try:
        return np.array_equal(times, schedule.timesteps(len(times)))
    except ScheduleError:  # so many steps do not fit the schedule's offset
        return False


def _checked_timesteps(schedule: Schedule, timesteps: Timesteps) -> list[int]:
    if schedule.flow:
        raise ScheduleError("this sampler needs a schedule of betas", hint="use flow-euler for flow matching")
    times = [int(t) for t in timesteps]
    falling = all(a > b for a, b in pairwise(times))
    if not times or not falling or times[-1] < 0 or times[0] >= schedule.num_train_timesteps:
        raise InputError(
            f"timesteps {times[:4]}{'...' if len(times) > 4 else ''} are not a falling list of training timesteps",
            hint=f"use schedule.timesteps(steps), or any falling list within 0 to {schedule.num_train_timesteps - 1}",
        )
    return times
