"""The rounding of a block's weights, learned against the block's outputs in the float graph.

AdaRound (arXiv 2004.10568, eq. 21 to 25) for one layer, BRECQ (arXiv 2102.05426) for a block. Each weight rounds down
or up by a variable h in [0, 1]; the loss over batches of one network call each is

    e(W_h) / e(W_start)  +  regularization mean(1 - |2h - 1|^beta),
    e(W) = sum over outputs |f(x; W) - f|^2 / |f|^2  +  inner sum over layers inside |l(x; W) - l|^2 / |l|^2,

where f is the float output and l the float output of a layer (EDA-DM, arXiv 2401.04585), and beta falls from 20 to 2
after a warm-up without the second term. Both terms are of the order of 1 for a block of any size, so one
`regularization` fits all; the papers' sums need another for each network.

Scales of the unit's activations move with the weights where the batches have learned ones: Adam's second group, whose
rate falls to 0 as half a cosine. A unit keeps both or neither.

QDrop (arXiv 2203.05740): in the fit, each element of an activation is with the probability `drop` not quantized. What
enters the block is that of the float graph there, and the quantizers inside pass it on. Errors are measured without.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from math import cos, pi

import numpy as np
import torch

from mezzotint.runtime import streams
from mezzotint.runtime.bundle.training import TrainedUnit

from ..errors import PassError
from ..torch_graph.soft_rounding import SoftRounding
from .block_data import LossWatcher
from .unit_batches import Annealing, Batches
from .unit_cache import Learned

POINTS = 50  # of the curve in the manifest


def fit_rounding(
    batches: Batches,
    rounders: Mapping[str, SoftRounding],
    schedule: Annealing,
    seed: int,
    unit: str,
    by: str,
    step: LossWatcher,
) -> tuple[TrainedUnit, Learned]:
    """Learn which way the weights round, and scales with them where the batches have learned ones.

    Return the fit and what was learned, which is empty where the start is better: the ups of weights by the names of
    `rounders`, and scales by the names of the module's parameters. The modules are hard afterwards. `step` is called
    after each iteration. Raise PassError for a loss that is not finite.
    """
    modules = list(rounders.values())
    variables = [variable for module in modules for variable in module.variables()]
    soft_start = [module.v.detach().clone() for module in modules]
    _harden(modules)
    start, scale = batches.mean_errors()
    if scale == 0:  # the unit computes what the float graph does
        return TrainedUnit(unit, by, 0.0, 0.0, 0.0, (), kept=False), {}
    with torch.no_grad():
        for module, soft in zip(modules, soft_start, strict=True):
            module.v.copy_(soft)
    groups = [] if batches.movements is None else batches.movements.groups
    optimizer = torch.optim.Adam([{"params": variables, "lr": schedule.learning_rate}, *groups])
    rng = streams.TRAINING_BATCHES.generator(seed, zlib.crc32(unit.encode()))
    weights = sum(module.v.numel() for module in modules)
    losses = []
    for iteration in range(schedule.iterations):
        for group in optimizer.param_groups[1:]:
            group["lr"] = schedule.scale_shares * 0.5 * (1 + cos(pi * iteration / schedule.iterations))
        loss = error = batches.loss(rng) / scale
        if (beta := schedule.beta(iteration)) is not None:
            loss = loss + schedule.regularization * sum(m.regularizer(beta) for m in modules) / weights
        losses.append(float(error.detach()))  # the second term would hide it in the curve
        if not torch.isfinite(loss):
            raise PassError(
                f"the loss is {float(loss.detach())} at iteration {iteration}",
                where=unit,
                hint=f"lower {by}.learning_rate, or leave this unit out ({by}.units)",
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step(losses[-1])
    soft_error, _ = batches.mean_errors()
    _harden(modules)
    arrays = batches.settle()
    hard, _ = batches.mean_errors()
    fit = TrainedUnit(unit, by, start, soft_error, hard, curve_of(losses), kept=hard < start)
    return fit, {**arrays, **{name: module.ups() for name, module in rounders.items()}} if fit.kept else {}


def _harden(rounders: Sequence[SoftRounding]) -> None:
    """Move every h to its end: 0 or 1 exactly."""
    for rounder in rounders:
        rounder.choose(rounder.ups())


def curve_of(losses: Sequence[float]) -> tuple[float, ...]:
    """Return the curve in at most POINTS points: means of successive iterations, to four digits."""
    return tuple(float(f"{part.mean():.4g}") for part in np.array_split(losses, min(POINTS, len(losses))))
