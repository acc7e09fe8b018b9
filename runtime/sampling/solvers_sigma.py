"""Solvers of the probability flow that count in sigma = sqrt((1 - abar) / abar), the noise in x / alpha.

    euler, heun          Karras et al., arXiv 2206.00364, algorithms 1 and 2 without churn
    euler_ancestral      Euler to a smaller sigma, and noise on top
    dpmpp_2m, dpmpp_2m_sde   DPM-Solver++ (arXiv 2211.01095, algorithm 2) and its stochastic form

diffusers' Euler and Heun schedulers keep y = x / alpha = image + sigma * noise, and scale it before each network call.
Here the state is x = alpha * y, what the network sees (alpha = 1 / sqrt(sigma^2 + 1)), and the formulas are multiplied
out: a step from sigma to sigma' of  y' = a y + b image  is  x' = (a alpha' / alpha) x + b alpha' image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..arrays import Doubles
from ..errors import ScheduleError
from ..signature import Timestep, whole
from .schedule import SPACINGS, Schedule
from .steps import Solver, Step, image_of


@dataclass(frozen=True)
class _Grid:
    """Return timesteps and their sigmas, falling; `sigmas` has one more, the end of the last step."""

    timesteps: list[Timestep]
    sigmas: list[float]
    start: float

    def alpha(self, i: int) -> float:
        return 1 / math.hypot(1.0, self.sigmas[i])

    def image(self, schedule: Schedule, i: int) -> tuple[float, float]:
        return image_of(schedule, self.alpha(i), self.sigmas[i] * self.alpha(i))


def euler(schedule: Schedule, steps: int) -> Solver:
    """y' = y + (sigma' - sigma) (y - image) / sigma."""
    grid = _grid(schedule, steps, "euler")
    return Solver(tuple(_euler_step(schedule, grid, i, grid.sigmas[i + 1]) for i in range(steps)), grid.start)


def euler_ancestral(schedule: Schedule, steps: int) -> Solver:
    """Euler to sigma_down, then noise of sigma_up: sigma_down^2 + sigma_up^2 = sigma'^2."""
    grid = _grid(schedule, steps, "euler-ancestral")
    found = []
    for i in range(steps):
        sigma, end = grid.sigmas[i], grid.sigmas[i + 1]
        up = end * math.sqrt(max(0.0, 1 - (end / sigma) ** 2))
        down = math.sqrt(max(0.0, end**2 - up**2))
        found.append(_euler_step(schedule, grid, i, down, noise=up * grid.alpha(i + 1)))
    return Solver(tuple(found), grid.start)


def heun(schedule: Schedule, steps: int) -> Solver:
    """Euler, then the mean of the slopes at both ends; the last step, to sigma 0, has one call."""
    grid = _grid(schedule, steps, "heun")
    clip = schedule.clip_sample_range if schedule.reader.flag("clip_sample", False) else None
    found: list[Step] = []
    for i in range(steps):
        step = _euler_step(schedule, grid, i, grid.sigmas[i + 1], clip=clip)
        sigma, end = grid.sigmas[i], grid.sigmas[i + 1]
        if end == 0:
            found.append(step)
            continue
        half, alpha, after = (end - sigma) / 2, grid.alpha(i), grid.alpha(i + 1)
        halfway = {"x": (1 + half / sigma) * after / alpha, "image": -half / sigma * after}
        found.append(Step(step.timestep, step.image_x, step.image_out, step.next, {"halfway": halfway}, clip=clip))
        slope = {"halfway": 1.0, "x": half / end, "image": -half / end * after}
        found.append(Step(grid.timesteps[i + 1], *grid.image(schedule, i + 1), slope, clip=clip, stage=1))
    return Solver(tuple(found), grid.start)


def dpmpp_2m(schedule: Schedule, steps: int, *, stochastic: bool = False) -> Solver:
    """Second order from the images of this call and of the one before; the first step, and by the configuration the
    last, are of first order. `stochastic` is the SDE form, with noise at each step."""
    who = "dpmpp-2m-sde" if stochastic else "dpmpp-2m"
    read = schedule.reader
    order = schedule.option("solver_order")
    if order not in (1, 2):
        raise read.refuse(f"{who} with solver_order {order} is not supported", "set solver_order to 2")
    grid = _grid(schedule, steps, who)
    few = bool(schedule.option("lower_order_final")) and steps < 15
    lower_last = bool(schedule.option("euler_at_final")) or few or schedule.option("final_sigmas_type") == "zero"
    found = []
    for i in range(steps):
        sigma, end = grid.sigmas[i], grid.sigmas[i + 1]
        alpha, after = grid.alpha(i), grid.alpha(i + 1)
        shrink = end / sigma  # exp(-h), where h is the step in lambda = -log sigma
        share = after * (1 - shrink**2 if stochastic else 1 - shrink)
        carry = shrink * after / alpha * (shrink if stochastic else 1.0)
        row = {"x": carry, "image": share}
        if order == 2 and i > 0 and not (i == steps - 1 and lower_last):
            last_step = math.log(grid.sigmas[i - 1] / sigma)
            slope = 0.5 * share * math.log(sigma / end) / last_step
            row |= {"image": share + slope, "image before": -slope}
        keep = {"image before": {"image": 1.0}} if order == 2 else {}
        noise = end * after * math.sqrt(max(0.0, 1 - shrink**2)) if stochastic else 0.0
        found.append(Step(grid.timesteps[i], *grid.image(schedule, i), row, keep, sigma=noise))
    return Solver(tuple(found))


def _euler_step(
    schedule: Schedule, grid: _Grid, i: int, end: float, *, noise: float = 0.0, clip: float | None = None
) -> Step:
    """y' = (end / sigma) y + (1 - end / sigma) image, written for x; the state is then scaled for the next sigma."""
    shrink, after = end / grid.sigmas[i], grid.alpha(i + 1)
    row = {"x": shrink * after / grid.alpha(i), "image": (1 - shrink) * after}
    return Step(grid.timesteps[i], *grid.image(schedule, i), row, sigma=noise, clip=clip)


def _grid(schedule: Schedule, steps: int, who: str) -> _Grid:
    if schedule.flow:
        raise ScheduleError(f"{who} needs a schedule of betas", hint="use flow-euler for flow matching")
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise ScheduleError(f"{steps} steps are not possible", hint=f"ask for 1 to {schedule.num_train_timesteps}")
    read = schedule.reader
    if who == "euler-ancestral" and schedule.prediction == "sample":
        raise ScheduleError("diffusers has no euler-ancestral for prediction type sample", hint="use euler")
    multistep = who.startswith("dpmpp")
    spacing = read.choice("timestep_spacing", "linspace", SPACINGS)
    times = _multistep_times(schedule, steps, spacing) if multistep else _times(schedule, steps, spacing)
    bars = schedule.alphas_above_zero
    known = np.sqrt((1 - bars) / bars)
    sigmas = np.interp(times, np.arange(len(known)), known)
    if schedule.option("use_karras_sigmas") and who != "euler-ancestral":
        sigmas = _karras(schedule, known, sigmas, multistep, steps)
        times = _nearest_times(sigmas, np.log(known))
        if multistep and schedule.config.get("beta_schedule") != "squaredcos_cap_v2":
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
    return _Grid(whole(times), sigmas.tolist(), start)


def _times(schedule: Schedule, steps: int, spacing: str) -> Doubles:
    train = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    if spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (train // steps) + schedule.steps_offset
    return _falling(train, train / steps, steps)


def _multistep_times(schedule: Schedule, steps: int, spacing: str) -> Doubles:
    train = schedule.num_train_timesteps
    bars = schedule.alphas_above_zero
    lambdas = np.log(np.sqrt(bars)) - np.log(np.sqrt(1 - bars))
    last = train - int(np.searchsorted(lambdas[::-1], float(schedule.option("lambda_min_clipped"))))
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].astype(np.float64)
    if spacing == "leading":
        return np.arange(steps + 1, dtype=np.float64)[::-1][:-1] * (last // (steps + 1)) + schedule.steps_offset
    return _falling(last, train / steps, steps)


def _falling(begin: int, width: float, steps: int) -> Doubles:
    found: Doubles = np.arange(begin, 0, -width)[:steps].round().astype(np.float64)
    return found - 1


def _karras(schedule: Schedule, known: Doubles, own: Doubles, multistep: bool, steps: int) -> Doubles:
    """Return sigmas evenly spaced in sigma^(1/7) (arXiv 2206.00364, formula 5)."""
    # DPM-Solver++ spans the whole schedule, Euler and Heun the timesteps of the spacing.
    ends = (known[0], known[-1]) if multistep else (own[-1], own[0])
    low = schedule.option("sigma_min") or float(ends[0])
    high = schedule.option("sigma_max") or float(ends[1])
    ramp = np.linspace(0, 1, steps)
    found: Doubles = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return found


def _nearest_times(sigmas: Doubles, logs: Doubles) -> Doubles:
    """Return the timesteps of sigmas, interpolated between training timesteps over log sigma."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), logs, np.arange(len(logs)))
