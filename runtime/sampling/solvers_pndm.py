"""PNDM and PLMS: pseudo linear multistep sampling (Liu et al., arXiv 2202.09778), as diffusers runs it.

A step from timestep t to t' along an epsilon e is formula 11 of the paper, a transfer that is exact for a constant e:

    x' = sqrt(abar' / abar) x - (abar' - abar) e / (abar sqrt(1 - abar') + sqrt(abar (1 - abar) abar'))

e mixes the newest output with up to three before it. The first steps have none: with `skip_prk_steps` (Stable
Diffusion) the first step is made twice, its second call with the mean of both slopes (so 50 steps make 51 calls); else
the first three steps are Runge-Kutta steps of four calls each.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ScheduleError
from .schedule import SPACINGS, Schedule
from .steps import Solver, Step, Weights, image_of

# Adams-Bashforth weights of the newest output and of those before it.
MULTISTEP: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
OLDER = ("out before", "out 2 before", "out 3 before")


def pndm(schedule: Schedule, steps: int) -> Solver:
    """Return the solver. The calls of a Runge-Kutta step differ by their stage."""
    if schedule.flow or schedule.prediction not in ("epsilon", "v_prediction"):
        raise ScheduleError(f"pndm cannot sample {schedule.prediction}", hint="it needs epsilon or v_prediction")
    times = _times(schedule, steps)
    if schedule.option("skip_prk_steps"):
        return Solver(tuple(_multistep(schedule, steps, times, first=0)))
    if steps < 4:
        raise ScheduleError(f"{steps} steps of pndm are not possible", hint="ask for 4, or set skip_prk_steps")
    return Solver(tuple(_runge_kutta(schedule, steps, times[:4]) + _multistep(schedule, steps, times[3:], first=3)))


def _times(schedule: Schedule, steps: int) -> list[int]:
    train = schedule.num_train_timesteps
    if not 1 <= steps <= train:
        raise ScheduleError(f"{steps} steps are not possible", hint=f"ask for 1 to {train}")
    spacing = schedule.reader.choice("timestep_spacing", "leading", SPACINGS)
    found: npt.NDArray[np.floating[Any]]
    if spacing == "linspace":
        found = np.round(np.linspace(0.0, train - 1, steps))[::-1]
    elif spacing == "leading":
        found = np.arange(steps)[::-1] * float(train // steps) + schedule.steps_offset
    else:
        found = np.round(np.arange(train, 0, -train / steps))[:steps] - 1
    return [int(t) for t in found]


def _multistep(schedule: Schedule, steps: int, times: list[int], first: int) -> list[Step]:
    """Return the calls of the linear multistep form; `first` outputs are remembered already."""
    ratio = schedule.num_train_timesteps // steps
    # The first step is made twice, the second time from where it led to.
    again = first == 0 and len(times) > 1
    calls = [times[0], times[1], *times[1:]] if again else times
    found: list[Step] = []
    known = first
    for k, t in enumerate(calls):
        repeated = again and k == 1
        weights = (0.5, 0.5) if repeated else MULTISTEP[min(known, 3)]
        begin, end = (t + ratio, t) if repeated else (t, t - ratio)
        mix = dict(zip(("out", *OLDER), weights, strict=False))
        row = _transfer(schedule, begin, end, mix, base="base" if repeated else "x")
        keep: dict[str, Weights] = {}
        for younger, older in zip(("out", *OLDER[: known if known < 3 else 2]), OLDER, strict=False):
            keep[older] = {younger: 1.0}
        if repeated:
            keep = {OLDER[0]: {OLDER[0]: 1.0}}
        elif again and k == 0:
            keep["base"] = {"x": 1.0}
        found.append(_step(schedule, t, row, keep, stage=1 if repeated else 0))
        known += 0 if repeated else 1
    return found


def _runge_kutta(schedule: Schedule, steps: int, times: list[int]) -> list[Step]:
    """Return the calls of three steps with four calls each."""
    half = schedule.num_train_timesteps // steps // 2
    found: list[Step] = []
    for k, (t, after) in enumerate(pairwise(times)):
        remembered: dict[str, Weights] = {name: {name: 1.0} for name in OLDER[: k + 1]}
        shifted: dict[str, Weights] = {
            new: {old: 1.0} for old, new in zip(("out", *OLDER), OLDER[: k + 1], strict=False)
        }
        middle = after + half
        calls = (t, middle, middle, after)
        for stage, call in enumerate(calls):
            # The second half of a step of odd length is longer: diffusers ends where the call's own timestep says.
            end = call - (0 if stage % 2 else half)
            mix = {"sum": 1.0, "out": 1 / 6} if stage == 3 else {"out": 1.0}
            row = _transfer(schedule, t, end, mix, base="x" if stage == 0 else "base")
            if stage == 0:
                keep = {**shifted, "base": {"x": 1.0}, "sum": {"out": 1 / 6}}
            elif stage < 3:
                keep = {**remembered, "base": {"base": 1.0}, "sum": {"sum": 1.0, "out": 1 / 3}}
            else:
                keep = remembered
            found.append(_step(schedule, call, row, keep, stage=stage))
    return found


def _step(schedule: Schedule, t: int, row: Weights, keep: dict[str, Weights], stage: int) -> Step:
    bar = float(schedule.alphas_cumprod[t])
    return Step(t, *image_of(schedule, math.sqrt(bar), math.sqrt(1 - bar)), row, keep, stage=stage)


def _transfer(schedule: Schedule, t: int, end: int, mix: Weights, base: str) -> Weights:
    """Return x' as weights, from the state `base` at timestep t along the mixed output."""
    bar = float(schedule.alphas_cumprod[t])
    final = 1.0 if schedule.reader.flag("set_alpha_to_one", False) else float(schedule.alphas_cumprod[0])
    bar_next = float(schedule.alphas_cumprod[end]) if end >= 0 else final
    share = (bar_next - bar) / (bar * math.sqrt(1 - bar_next) + math.sqrt(bar * (1 - bar) * bar_next))
    carry = math.sqrt(bar_next / bar)
    if schedule.prediction == "v_prediction":
        # epsilon = sqrt(abar) v + sqrt(1 - abar) x, and all of the mixed v are taken for those of this x.
        carry -= share * math.sqrt(1 - bar)
        share *= math.sqrt(bar)
    return {base: carry, **{name: -share * weight for name, weight in mix.items()}}
