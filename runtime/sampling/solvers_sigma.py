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

from .schedule import Schedule
from .sigma_grid import SigmaGrid, sigma_grid
from .steps import Solver, Step


def euler(schedule: Schedule, steps: int) -> Solver:
    """y' = y + (sigma' - sigma) (y - image) / sigma."""
    grid = sigma_grid(schedule, steps, "euler")
    return Solver(tuple(_euler_step(schedule, grid, i, grid.sigmas[i + 1]) for i in range(steps)), grid.start)


def euler_ancestral(schedule: Schedule, steps: int) -> Solver:
    """Euler to sigma_down, then noise of sigma_up: sigma_down^2 + sigma_up^2 = sigma'^2."""
    grid = sigma_grid(schedule, steps, "euler-ancestral")
    found = []
    for i in range(steps):
        sigma, end = grid.sigmas[i], grid.sigmas[i + 1]
        up = end * math.sqrt(max(0.0, 1 - (end / sigma) ** 2))
        down = math.sqrt(max(0.0, end**2 - up**2))
        found.append(_euler_step(schedule, grid, i, down, noise=up * grid.alpha(i + 1)))
    return Solver(tuple(found), grid.start)


def heun(schedule: Schedule, steps: int) -> Solver:
    """Euler, then the mean of the slopes at both ends; the last step, to sigma 0, has one call."""
    grid = sigma_grid(schedule, steps, "heun")
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
    grid = sigma_grid(schedule, steps, who)
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
    schedule: Schedule, grid: SigmaGrid, i: int, end: float, *, noise: float = 0.0, clip: float | None = None
) -> Step:
    """y' = (end / sigma) y + (1 - end / sigma) image, written for x; the state is then scaled for the next sigma."""
    shrink, after = end / grid.sigmas[i], grid.alpha(i + 1)
    row = {"x": shrink * after / grid.alpha(i), "image": (1 - shrink) * after}
    return Step(grid.timesteps[i], *grid.image(schedule, i), row, sigma=noise, clip=clip)
