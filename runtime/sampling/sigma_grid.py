"""Timesteps and sigmas of the solvers that count in the ratio of noise and image: solvers_sigma, solvers_unipc."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..arrays import Doubles
from ..errors import ScheduleError
from ..signature import Timestep, whole
from .flow_sigmas import EVEN_SIGMAS, dpm_flow_sigmas, karras_sigmas, unipc_flow_sigmas
from .schedule import FLOW_CLASSES, SPACINGS, Schedule
from .steps import image_of

UNIPC = "unipc"
RATIO_MULTISTEP = ("dpmpp", UNIPC)
"""Beginnings of the names of samplers that remember images of earlier calls, with one way to choose timesteps."""


@dataclass(frozen=True)
class SigmaGrid:
    """Timesteps and their sigmas, falling; `sigmas` has one more, the end of the last step, and so has `alphas`.

    A sigma is the noise in x / alpha, where alpha is the image's share in x.
    """

    timesteps: list[Timestep]
    sigmas: list[float]
    alphas: list[float]
    start: float

    def alpha(self, i: int) -> float:
        return self.alphas[i]

    def image(self, schedule: Schedule, i: int) -> tuple[float, float]:
        """Return (image_x, image_out) of call i, see steps.py."""
        return image_of(schedule, self.alphas[i], self.sigmas[i] * self.alphas[i])


def sigma_grid(schedule: Schedule, steps: int, who: str) -> SigmaGrid:
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise ScheduleError(f"{steps} steps are not possible", hint=f"ask for 1 to {schedule.num_train_timesteps}")
    if schedule.flow:
        return _flow_grid(schedule, steps, who)
    read = schedule.reader
    if who == "euler-ancestral" and schedule.prediction == "sample":
        raise ScheduleError("diffusers has no euler-ancestral for prediction type sample", hint="use euler")
    multistep = who.startswith(RATIO_MULTISTEP)
    spacing = read.choice("timestep_spacing", "linspace", SPACINGS)
    times = _multistep_times(schedule, steps, spacing, who) if multistep else _times(schedule, steps, spacing)
    bars = schedule.alphas_above_zero
    known = np.sqrt((1 - bars) / bars)
    sigmas = np.interp(times, np.arange(len(known)), known)
    if schedule.option("use_karras_sigmas") and who != "euler-ancestral":
        # Multistep solvers span the whole schedule, Euler and Heun the timesteps of the spacing.
        ends = (known[0], known[-1]) if multistep else (sigmas[-1], sigmas[0])
        low = schedule.option("sigma_min") or float(ends[0])
        high = schedule.option("sigma_max") or float(ends[1])
        sigmas = karras_sigmas(low, high, steps)
        times = _nearest_times(sigmas, np.log(known))
        if multistep and (who == UNIPC or schedule.config.get("beta_schedule") != "squaredcos_cap_v2"):
            times = times.round()
        times = times.astype(np.int64) if multistep else times.astype(np.float32)
    final = "zero" if who in ("euler-ancestral", "heun") else schedule.option("final_sigmas_type")
    last = 0.0 if final == "zero" else float(known[0])
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    if times[0] >= schedule.num_train_timesteps or (np.diff(sigmas) >= 0).any() or (np.diff(times) > 0).any():
        raise ScheduleError(f"{steps} steps of {who} do not fit the schedule", hint="ask for fewer steps")
    # With the spacing "leading" x begins as pure noise; else diffusers begins with y = sigma * noise, which is less.
    scaled = not multistep and spacing != "leading"
    start = float(sigmas[0]) / math.hypot(1.0, float(sigmas[0])) if scaled else 1.0
    return SigmaGrid(whole(times), sigmas.tolist(), [1 / math.hypot(1.0, sigma) for sigma in sigmas.tolist()], start)


def _flow_grid(schedule: Schedule, steps: int, who: str) -> SigmaGrid:
    """Return the sigmas of a multistep solver with `use_flow_sigmas`, whose x is (1 - sigma) image + sigma noise."""
    read, kind = schedule.reader, FLOW_CLASSES.get(str(schedule.config.get("_class_name")))
    if not who.startswith(RATIO_MULTISTEP) or kind is None:
        raise ScheduleError(f"{who} needs a schedule of betas", hint="use flow-euler for flow matching")
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if read.flag(key, False):
            raise read.refuse(f"{key} with use_flow_sigmas is not supported", f"set {key} to false")
    if (final := schedule.option("final_sigmas_type")) != "zero":
        raise read.refuse(f"final_sigmas_type {final!r} with use_flow_sigmas is not supported", "set it to zero")
    if who != UNIPC and read.flag(EVEN_SIGMAS, False):
        raise read.refuse(
            f"the pipeline of this model passes sigmas of its own, which {who} does not take", "use unipc"
        )
    of = unipc_flow_sigmas if who == UNIPC else dpm_flow_sigmas
    train = schedule.num_train_timesteps
    sigmas = of(read, schedule.shift or 1.0, train, steps)
    times = (sigmas * train).astype(np.int64)
    shares = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
    if (np.diff(shares) >= 0).any():
        raise ScheduleError(f"{steps} steps of {who} do not fit the schedule", hint="ask for fewer steps")
    return SigmaGrid(whole(times), (shares / (1 - shares)).tolist(), (1 - shares).tolist(), 1.0)


def _times(schedule: Schedule, steps: int, spacing: str) -> Doubles:
    train = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    if spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (train // steps) + schedule.steps_offset
    return _falling(train, train / steps, steps)


def _multistep_times(schedule: Schedule, steps: int, spacing: str, who: str) -> Doubles:
    train = schedule.num_train_timesteps
    bars = schedule.alphas_above_zero
    lambdas = np.log(np.sqrt(bars)) - np.log(np.sqrt(1 - bars))
    clipped = -math.inf if who == UNIPC else float(schedule.option("lambda_min_clipped"))
    last = train - int(np.searchsorted(lambdas[::-1], clipped))
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].astype(np.float64)
    if spacing == "leading":
        return np.arange(steps + 1, dtype=np.float64)[::-1][:-1] * (last // (steps + 1)) + schedule.steps_offset
    return _falling(last, train / steps, steps)


def _falling(begin: int, width: float, steps: int) -> Doubles:
    found: Doubles = np.arange(begin, 0, -width)[:steps].round().astype(np.float64)
    return found - 1


def _nearest_times(sigmas: Doubles, logs: Doubles) -> Doubles:
    """Return the timesteps of sigmas, interpolated between training timesteps over log sigma."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), logs, np.arange(len(logs)))
