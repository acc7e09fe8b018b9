"""UniPC (Zhao et al., arXiv 2302.04867): a predictor of several images, and a corrector that needs no call of its own.

The network is called where the predictor went. With the image that it finds there, the corrector computes once more
where the step should have ended, and the next step begins from that. With h the step in lambda = log(alpha / sigma),
x the state, m the images (m0 the newest), r_k = (lambda_k - lambda_0) / h of an earlier image m_k:

    x' = (sigma' / sigma) x - alpha' (e^-h - 1) m0 - alpha' B sum over k of rho_k (m_k - m0) / r_k

where B is e^-h - 1 (bh2) or -h (bh1), and rho solves a small linear system. The corrector's sum has the newest image
itself, at r = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import ScheduleError
from .schedule import Schedule
from .sigma_grid import UNIPC, SigmaGrid, sigma_grid
from .steps import Solver, Step, Weights

_BEFORE = "sample before"  # where the step began that led here, corrected


def unipc(schedule: Schedule, steps: int) -> Solver:
    """Return UniPC of the configuration's `solver_order` (1 to 3); first steps are of lower order, last ones too."""
    read = schedule.reader
    order = read.integer("solver_order", 2, smallest=1)
    if order > 3:
        raise read.refuse(f"unipc with solver_order {order} is not supported", "set solver_order to 2")
    small = read.get("solver_type", "bh2") != "bh1"  # those of other classes are bh2
    lower_last = read.flag("lower_order_final", True)
    skipped = list(read.get("disable_corrector", []))
    grid = sigma_grid(schedule, steps, UNIPC)
    found, before = [], 1
    for i in range(steps):
        now = min(order, i + 1, steps - i if lower_last else order)
        if grid.sigmas[i + 1] == 0 and now > 1:
            raise ScheduleError(f"unipc of order {now} cannot end at sigma 0", hint="set lower_order_final to true")
        corrected: Weights = {"x": 1.0}
        if i > 0 and i - 1 not in skipped:
            names = [f"image {k}" for k in range(1, before + 1)]
            corrected = _moved(grid, i - 1, {_BEFORE: 1.0}, names, "image", small=small)
        images = ["image", *(f"image {k}" for k in range(1, now))]
        row = _moved(grid, i, corrected, images, None, small=small)
        keep: dict[str, Weights] = {_BEFORE: corrected, "image 1": {"image": 1.0}}
        keep |= {f"image {k}": {f"image {k - 1}": 1.0} for k in range(2, min(order, i + 1) + 1)}
        found.append(Step(grid.timesteps[i], *grid.image(schedule, i), row, keep))
        before = now
    return Solver(tuple(found), grid.start)


def _moved(
    grid: SigmaGrid, i: int, start: Weights, images: Sequence[str], reached: str | None, *, small: bool
) -> dict[str, float]:
    """Return the weights of a step from call i to the next, from the images at i and before.

    `reached` is the image at the step's end, for the corrector, and None for the predictor.
    """
    sigma, end, after = grid.sigmas[i], grid.sigmas[i + 1], grid.alphas[i + 1]
    h = math.log(sigma / end) if end else math.inf
    ratios = [math.log(sigma / grid.sigmas[i - k]) / h for k in range(1, len(images))]
    factor = math.expm1(-h)  # e^-h - 1
    scale = after * (factor if small else -h)
    newest, *older = images
    others = [*older, *([reached] if reached else [])]
    shares = _shares(h, [*ratios, 1.0], bool(reached), small=small)
    carry = end * after / (sigma * grid.alphas[i])
    found = {name: carry * weight for name, weight in start.items()}
    found[newest] = found.get(newest, 0.0) - after * factor
    for name, share, ratio in zip(others, shares, [*ratios, 1.0], strict=False):
        found[name] = found.get(name, 0.0) - scale * share / ratio
        found[newest] += scale * share / ratio
    return found


def _shares(h: float, ratios: list[float], corrects: bool, *, small: bool) -> list[float]:
    """Return rho: for all ratios (the corrector), or for all but the last."""
    count = len(ratios) if corrects else len(ratios) - 1
    if count <= 1:
        return [0.5] * count  # diffusers' simplified first order
    phi = math.expm1(-h) / -h - 1
    wanted, factorial = [], 1
    for k in range(1, count + 1):
        wanted.append(phi * factorial / (math.expm1(-h) if small else -h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = np.array([np.array(ratios[:count]) ** k for k in range(count)])
    return [float(share) for share in np.linalg.solve(powers, np.array(wanted))]
