"""MixDQ's metric-decoupled search (arXiv 2405.17873): content and quality are scored, and budgeted, apart.

The content of an image is decided by the layers of cross-attention and feed-forward (compiler/bits/content.py), its
quality by all others, and a squared error of epsilon measures the second alone. So content units are scored by 1 - SSIM
of the images that a short trajectory ends with, the others by their squared error. The two do not add up; the budget is
split between them in several ways, each group is solved separately, and the whole allocation whose images are most
similar to the float network's is kept: this is measured, not predicted. A network without content layers, such as an
unconditional UNet, is one group, solved by squared errors alone.

Network calls, each for all samples: those of the profile (units * widths * calls), content units * widths * `length`,
and splits * `length`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from mezzotint.runtime.compare import ssim
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.samplers import initial_noise, run_solver
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.solvers import ddim
from mezzotint.runtime.sampling.steps import Solver, Step
from mezzotint.runtime.signature import CHANNELS_FIRST, Images, Timestep

from ..calibration.calibrate import batch_conditions, batch_spans, guided_output, network_call
from ..core.execute import Feeds
from ..core.pipeline import Context
from ..core.program import Program
from ..graph.require import required
from .allocation import Allocation, allocate, smallest
from .profile import Profiler
from .simulate import Simulator
from .units import FLOAT, BitChoice, Unit

FeedsAtCall = Callable[[int], Feeds]


@dataclass(frozen=True, eq=False)
class ShortTrajectories:
    """Images of short trajectories from seeded noise: `length` of the deployment's timesteps, by DDIM.

    Timesteps between two training timesteps are rounded; a flow is followed by Euler's method.
    """

    program: Program
    context: Context
    samples: int
    length: int

    def draw(self, simulator: Simulator, fed: FeedsAtCall | None = None) -> Images:
        """Return all samples. `fed` gives the feeds of each network call in addition to the plain inputs."""
        timesteps = self.program.deployment.timesteps
        chosen = np.unique(np.linspace(0, len(timesteps) - 1, self.length).round().astype(int))
        calls = {timesteps[k]: int(k) for k in chosen}
        if not self.program.schedule.flow:
            calls = {round(t): k for t, k in calls.items()}
        few = replace(self.context, samples=self.samples)
        drawn = []
        for first, rows in batch_spans(self.program, few):
            conditions = batch_conditions(self.program, few, first, rows)

            def call(x: Images, t: Timestep, conditions: Conditions = conditions) -> Images:
                call = network_call(self.program, few, x, t, conditions)
                output = simulator.output(*call, fed(calls[t]) if fed else None)
                return guided_output(self.program, output)

            x = initial_noise(few.seed, (rows, *self.program.shape), first=first)
            drawn.append(run_solver(call, x, _short(self.program.schedule, list(calls))))
        return np.concatenate(drawn)

    def unlike(self, reference: Images, images: Images) -> float:
        """Return `unlike` of samples of the program."""
        return unlike(reference, images, self.program.signature.channel_axis)


def _short(schedule: Schedule, times: Sequence[Timestep]) -> Solver:
    """A deterministic solver that calls the network at these falling timesteps."""
    if not schedule.flow:
        return ddim(schedule, [int(t) for t in times])
    sigmas = [t / schedule.num_train_timesteps for t in (*times, 0)]
    pairs = zip(times, pairwise(sigmas), strict=True)
    return Solver(tuple(Step(t, 1.0, -sigma, {"x": 1.0, "out": end - sigma}) for t, (sigma, end) in pairs))


def unlike(reference: Images, images: Images, channel_axis: int = CHANNELS_FIRST) -> float:
    """Return 1 - SSIM, the mean over the images. Both are shifted by the minimum of the reference.

    Samples `[B, C]` have no sides: their windows are over the channels.
    """
    low, peak = reference.min(), max(float(np.ptp(reference)), 1e-12)
    one, other = (np.moveaxis(samples - low, channel_axis, 1) for samples in (reference, images))
    if one.ndim == 2:
        one, other = one[:, None], other[:, None]
    return 1.0 - float(np.mean(ssim(one, other, peak=peak)))


def content_scores(
    profiler: Profiler,
    simulator: Simulator,
    pictures: ShortTrajectories,
    reference: Images,
    choices: Sequence[Sequence[BitChoice]],
    errors: Sequence[Sequence[float]],
    content: Sequence[bool],
) -> list[list[float]]:
    """Return the errors of each choice of each unit; in the rows of content units what it changes in the `reference`
    images."""

    def moved(unit: Unit, choice: BitChoice) -> float:
        if choice == FLOAT:
            return 0.0
        return pictures.unlike(
            reference, pictures.draw(simulator, partial(profiler.quantized, simulator, unit, choice))
        )

    scores = []
    for k, (unit, row) in enumerate(zip(profiler.units, choices, strict=True)):
        profiler.context.progress(f"{profiler.by}: images", k + 1, len(profiler.units))
        scores.append([moved(unit, choice) for choice in row] if content[k] else list(errors[k]))
    return scores


def split_budget(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    content: Sequence[bool],
    budget: int,
    splits: int,
    measured: Callable[[tuple[int, ...]], float],
) -> tuple[Allocation, list[float]]:
    """Return (the allocation whose `measured` error is least, the measured errors of all splits).

    The budget must suffice. Splits that come to the same allocation are measured once. There is nothing to split where
    one of the groups is empty.
    """
    groups = [[k for k, c in enumerate(content) if c == side] for side in (True, False)]
    spans = [(smallest([costs[k] for k in g]), sum(max(costs[k]) for k in g)) for g in groups]
    (least, most), (other_least, other_most) = spans
    low, high = max(least, budget - other_most), min(most, budget - other_least)
    found: dict[tuple[int, ...], tuple[float, Allocation]] = {}
    for share in np.linspace(0.0, 1.0, splits if high > low else 1):
        allowed = round(low + float(share) * (high - low)) if high > low else min(most, budget - other_least)
        one = _part(errors, costs, groups[0], allowed)
        two = _part(errors, costs, groups[1], budget - one.cost)
        chosen = [0] * len(errors)
        for group, part in zip(groups, (one, two), strict=True):
            for k, c in zip(group, part.chosen, strict=True):
                chosen[k] = c
        whole = Allocation(tuple(chosen), one.error + two.error, one.cost + two.cost, max(one.gap, two.gap))
        if whole.chosen not in found:
            found[whole.chosen] = (measured(whole.chosen), whole)
    return min(found.values(), key=lambda pair: pair[0])[1], [error for error, _ in found.values()]


def _part(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], group: Sequence[int], budget: int
) -> Allocation:
    part = allocate([errors[k] for k in group], [costs[k] for k in group], budget)
    return required(part, "an allocation within the share of the budget of one group")
