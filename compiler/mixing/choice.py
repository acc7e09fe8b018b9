"""The choice of a precision for each network call from measured signal to noise ratios, costs of a call and a budget.

PTQD (arXiv 2305.10657, section on step-aware mixed precision) takes at each call the cheapest precision whose
prediction is cleaner than the schedule's x:

    SNR_Q = |eps|^2 / |eps_q - eps|^2  >  SNR_F = alpha^2 / sigma^2,        margin = SNR_Q / SNR_F

That is `by_margin` with threshold 1. The paper's definition of SNR_F could not be verified (no code for it was
released); the schedule's own ratio is our reading. The paper's threshold has no budget. Ours is a number tau, the same
for all calls: each call takes the cheapest precision with margin >= tau, or the one with the largest margin if none has
that. The mean cost of a call rises with tau, in steps at the measured margins. The largest tau within the budget is
taken, which need not use up the budget.

That rule protects the end of the trajectory. A paired image mostly depends on its beginning, so there is a second rule,
ours, `picture_weights`: in u = x / alpha, whose last value is the image, an error e of the output at call i moves u by
(B_i / alpha_i+1) e, with B_i the coefficient of the newest output. With margin = 1 / (weight * |e|^2) the same algebra
bounds the error that one call adds to the image. It ignores the network's response to a moved x, the memory of a
solver, and the sum over calls. Measured on the digits (20 steps of DDIM, 8 images from held-out noise; PSNR of the
median and of the worst image, dB), float mixed with one other precision:

    budget       w8a8, schedule   w8a8, picture   w8a8-best, schedule   picture       w4a8, schedule   picture
    0.6          44.8, 24.7       51.6, 39.9      52.8, 47.6            51.9, 43.3    42.9, 21.8       43.8, 21.6
    0.75         44.6, 24.4       55.5, 52.6      53.1, 48.4            54.0, 51.7    49.1, 22.6       44.0, 26.6
    (alone)      44.5, 24.7                       52.6, 47.4                          42.6, 21.8

So neither rule is always better, and w8a8-best alone, at 0.52, beats most mixes of worse precisions.

PCR (arXiv 2311.06322) gives the last part of the trajectory the highest precision, or the first part for SDXL, without
a measurement: `relaxed`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.steps import Step

PTQD = 1.0
"""The threshold of the paper's rule."""
_FAINTEST = 2.0**-12  # smaller alphas are replaced by this one before a division
_ROUNDING = 1e-9  # tolerance for a budget that equals a cost


@dataclass(frozen=True)
class PrecisionChoice:
    """`calls` has the index of a precision for each network call; `mean_cost` is relative to the dearest precision."""

    calls: tuple[int, ...]
    mean_cost: float
    threshold: float | None = None


def by_margin(margins: Doubles, costs: Sequence[float], budget: float | None = None) -> PrecisionChoice:
    """Return the choice for `margins` `[precisions, calls]` and the cost of a call of each precision.

    `budget` is the largest mean cost, relative to the dearest precision. Without one, the threshold is PTQD's. Raises
    InputError if no choice meets the budget.
    """
    relative = _relative(costs)
    if margins.ndim != 2 or len(margins) != len(relative) or margins.shape[1] == 0 or np.isnan(margins).any():
        raise InputError(f"margins of shape {list(margins.shape)} for {len(relative)} precisions, or not a number")
    if budget is None:
        return _at(PTQD, margins, relative)
    if not 0 < budget <= 1:
        raise InputError(f"a budget of {budget:g} is not possible", hint="it is relative to the dearest precision")
    if budget < relative.min() * (1 - _ROUNDING):
        raise InputError(
            f"a budget of {budget:g} cannot be met: the cheapest precision alone costs {relative.min():.4g} of the "
            "dearest",
            hint=f"allow {math.ceil(relative.min() * 1e4) / 1e4:g} or more, or add a cheaper precision",
        )
    falling = np.unique(margins)[::-1].tolist()

    def kept(tau: float) -> bool:
        return _at(tau, margins, relative).mean_cost <= budget * (1 + _ROUNDING)

    # In falling tau the cost falls, so bisection finds the first tau within the budget; the last one always is.
    return _at(falling[bisect.bisect_left(falling, True, key=kept)], margins, relative)


def picture_weights(steps: Sequence[Step], schedule: Schedule) -> Doubles:
    """Return the factor by which the mean square of an error of each call's output reaches the image."""
    after = [schedule.levels(step.timestep)[0] for step in steps[1:]] + [1.0]
    return np.array([(step.gain / max(alpha, _FAINTEST)) ** 2 for step, alpha in zip(steps, after, strict=True)])


def relaxed(
    calls: int, costs: Sequence[float], precise: int, fraction: float, *, first: bool = False
) -> PrecisionChoice:
    """Return precision `precise` for the last (or `first`) `fraction` of the calls, the cheapest one for all others."""
    relative = _relative(costs)
    if not 0 < fraction < 1:
        raise InputError(f"relaxing {fraction:g} of the calls is not possible", hint="choose between 0 and 1")
    cheap = int(relative.argmin())
    if cheap == precise:
        raise InputError(
            "the cheapest precision is also the most precise, so there is nothing to relax",
            hint="mix bundles of which one costs less, or state their costs",
        )
    count = min(calls, math.ceil(fraction * calls - _ROUNDING))
    chosen = [precise] * count + [cheap] * (calls - count)
    chosen = chosen if first else chosen[::-1]
    return PrecisionChoice(tuple(chosen), float(relative[chosen].mean()))


def _at(tau: float, margins: Doubles, relative: Doubles) -> PrecisionChoice:
    """Return the choice with one threshold. Of equal costs and of equal margins, the first precision is taken."""
    order = np.argsort(relative, kind="stable")
    ranked = margins[order]
    enough = ranked >= tau
    rows = np.where(enough.any(axis=0), enough.argmax(axis=0), ranked.argmax(axis=0))
    chosen = order[rows]
    return PrecisionChoice(tuple(chosen.tolist()), float(relative[chosen].mean()), tau)


def _relative(costs: Sequence[float]) -> Doubles:
    array = np.asarray(costs, np.float64)
    if array.ndim != 1 or array.size == 0 or not np.all(np.isfinite(array)) or np.any(array <= 0):
        raise InputError(f"costs {list(costs)} are not positive numbers")
    relative: Doubles = array / array.max()
    return relative
