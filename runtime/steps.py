"""What one step of a sampler computes, as scalars: a function of the schedule, the timesteps and eta alone.

Every step of DDIM (arXiv 2010.02502, formula 12) and DDPM (arXiv 2006.11239, formula 7) is linear in the state x and
the network's output o, apart from the clipping of the predicted image:

    x0 = image_x * x + image_out * o                       what the network says the image is
    x' = from_image * clip(x0) + from_x * x + from_out * o + noise * z

The scalars are worked out in float64, once for each step.

With a `Correction` (PTQD, arXiv 2305.10657) what quantization noise is left in o is taken out of the sampler's own:
noise^2 = max(0, sigma^2 - gain^2 * spread^2), where sigma is the schedule's and gain the coefficient of o in x'
(clipping aside). Only the noise shrinks; the direction term keeps the sigma that the gain was derived with. With eta 0
there is nothing to shrink; where the error outweighs sigma the step becomes deterministic (`noise` 0, `sigma` not).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .correction import Correction
from .errors import InputError, ScheduleError, TimestepNotDeployed
from .schedule import Schedule


@dataclass(frozen=True)
class Coefficients:
    """The scalars of one step, see the module's formulas; `sigma` is the schedule's, `noise` what is really added."""

    timestep: int
    image_x: float
    image_out: float
    from_image: float
    from_x: float
    from_out: float
    sigma: float
    noise: float

    @property
    def gain(self) -> float:
        """The coefficient of the network's output in the next state, where nothing is clipped."""
        return self.from_image * self.image_out + self.from_out


def ddim_coefficients(
    schedule: Schedule,
    timesteps: Sequence[int] | npt.NDArray[np.int64],
    *,
    eta: float = 0.0,
    correction: Correction | None = None,
) -> tuple[Coefficients, ...]:
    """The scalars of each DDIM step.

    For the schedule's own timesteps a step ends at t - train // steps, as in diffusers: with the spacings linspace and
    trailing that is not always where the next one begins. For any other list it ends where the next one begins.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta is {eta}", hint="0 is deterministic DDIM, 1 as noisy as DDPM; choose between")
    times = _checked_timesteps(schedule, timesteps)
    ends = [*times[1:], -1]
    if _are_own(schedule, times):
        ends = [t - schedule.num_train_timesteps // len(times) for t in times]
    found = []
    for t, end in zip(times, ends, strict=True):
        bar = float(schedule.alphas_cumprod[t])
        bar_next = float(schedule.alphas_cumprod[end]) if end >= 0 else schedule.final_alpha_cumprod
        # At the last step bar_next may equal bar (set_alpha_to_one false): rounding must not make a root negative.
        sigma = eta * math.sqrt(max(0.0, (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)))
        direction = math.sqrt(max(0.0, 1 - bar_next - sigma**2))
        noise_x, noise_out = _noise_of(schedule, bar)
        found.append(
            Coefficients(
                t,
                *_image_of(schedule, bar),
                from_image=math.sqrt(bar_next),
                from_x=direction * noise_x,
                from_out=direction * noise_out,
                sigma=sigma,
                noise=sigma,
            )
        )
    return _shrink_noise(found, correction)


def ddpm_coefficients(
    schedule: Schedule,
    timesteps: Sequence[int] | npt.NDArray[np.int64],
    *,
    correction: Correction | None = None,
) -> tuple[Coefficients, ...]:
    """The scalars of each DDPM step, which ends where the next one begins, the last one at abar = 1."""
    times = _checked_timesteps(schedule, timesteps)
    found = []
    for t, end in zip(times, [*times[1:], -1], strict=True):
        bar = float(schedule.alphas_cumprod[t])
        bar_next = float(schedule.alphas_cumprod[end]) if end >= 0 else 1.0
        beta = 1 - bar / bar_next
        variance = beta if schedule.variance_type == "fixed_large" else (1 - bar_next) / (1 - bar) * beta
        sigma = math.sqrt(variance) if t > 0 else 0.0
        found.append(
            Coefficients(
                t,
                *_image_of(schedule, bar),
                from_image=math.sqrt(bar_next) * beta / (1 - bar),
                from_x=math.sqrt(bar / bar_next) * (1 - bar_next) / (1 - bar),
                from_out=0.0,
                sigma=sigma,
                noise=sigma,
            )
        )
    return _shrink_noise(found, correction)


def _image_of(schedule: Schedule, bar: float) -> tuple[float, float]:
    """The image as image_x * x + image_out * output."""
    if schedule.prediction == "epsilon":
        return 1 / math.sqrt(bar), -math.sqrt((1 - bar) / bar)
    if schedule.prediction == "v_prediction":
        return math.sqrt(bar), -math.sqrt(1 - bar)
    return 0.0, 1.0


def _noise_of(schedule: Schedule, bar: float) -> tuple[float, float]:
    """The noise in x as noise_x * x + noise_out * output."""
    if schedule.prediction == "epsilon":
        return 0.0, 1.0
    if schedule.prediction == "v_prediction":
        return math.sqrt(1 - bar), math.sqrt(bar)
    return 1 / math.sqrt(1 - bar), -math.sqrt(bar / (1 - bar))


def _shrink_noise(steps: list[Coefficients], correction: Correction | None) -> tuple[Coefficients, ...]:
    if correction is None:
        return tuple(steps)
    missing = [step.timestep for step in steps if step.timestep not in correction.rows]
    if missing:
        raise TimestepNotDeployed(
            f"the correction has no row for timestep {missing[0]} ({len(missing)} of {len(steps)} steps are missing)",
            hint=f"sample as it was fitted ({correction.fitted_for}), or without a correction",
        )
    spreads = [correction.spread_at(step.timestep) for step in steps]
    return tuple(
        replace(step, noise=math.sqrt(max(0.0, step.sigma**2 - (step.gain * spread) ** 2)))
        for step, spread in zip(steps, spreads, strict=True)
    )


def _are_own(schedule: Schedule, times: list[int]) -> bool:
    try:
        return np.array_equal(times, schedule.timesteps(len(times)))
    except ScheduleError:  # so many steps do not fit the schedule's offset
        return False


def _checked_timesteps(schedule: Schedule, timesteps: Sequence[int] | npt.NDArray[np.int64]) -> list[int]:
    times = [int(t) for t in timesteps]
    falling = all(a > b for a, b in pairwise(times))
    if not times or not falling or times[-1] < 0 or times[0] >= schedule.num_train_timesteps:
        raise InputError(
            f"timesteps {times[:4]}{'...' if len(times) > 4 else ''} are not a falling list of training timesteps",
            hint=f"use schedule.timesteps(steps), or any falling list within 0 to {schedule.num_train_timesteps - 1}",
        )
    return times
