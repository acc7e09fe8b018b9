"""The loss of a whole quantized network against the float network, along the trajectory of the sampler.

What images need is not what a single call shows (docs/explanation/training.md has the measurements): the error of
rounded weights is nearly the same at successive calls and adds up, and the first calls, whose errors are the smallest,
move images the most. So the loss is that of images, a logarithm, which no call and no sample dominates:

    mean over samples of  log |x'(W) - x'|^2 - log e_i

where x' is the float sampler's latent `unroll` calls later: with one call that is the error of its prediction, and with
several the errors of successive calls add up in it as they do in images. e_i, the error of call i at the start, makes
the loss 0 there; it has no gradient. Further terms compare the outputs of blocks in the same way, and relations between
positions in them. Weights with nested widths (nested_widths.py) have the mean of the losses of all widths, weighted by
their shares, and so have the images of held-out noise that judge (fit_network.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import log

import numpy as np
import torch
from torch.nn import functional

from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.steps import Solver
from mezzotint.runtime.signature import Timestep

from ..errors import PassError
from .block_data import LossWatcher
from .movements import Moved, Movements
from .torch_device import Precision
from .trajectories import TorchDenoiser, Trajectory, unroll

SMALLEST_ERROR = 1e-12
"""Mean squared errors below it count as this: a float network's own rounding."""


@dataclass(frozen=True)
class NetworkFit:
    """How a network is trained.

    iterations    steps of Adam
    weight_steps  how far one of them moves a quantized weight at first, in steps of its grid
    float_shares, scale_shares  how far it moves other weights, and the ends of grids, in shares of their size
    level_steps   how far it moves levels of codebooks at first, in their mean distances
    batch         samples in a step, of one stretch of the trajectory
    unroll        calls in a row whose errors add up
    blocks, relations  weights of the errors of block outputs and of their relations, beside the loss of 1
    samples       images whose trajectories are trained on
    held_out      images of other noise that judge
    checks        how often they do
    minutes       about the longest that the fit may take; None means as long as it takes
    precision     of the forward passes of the fit; images are those of float32
    """

    iterations: int
    weight_steps: float
    float_shares: float
    scale_shares: float
    level_steps: float
    batch: int
    unroll: int
    blocks: float
    relations: float
    samples: int
    held_out: int
    checks: int
    minutes: float | None
    precision: Precision = "float32"


class NetworkLoss:
    """The loss of a step, and the fidelity of images, of a network that moves."""

    def __init__(
        self,
        denoiser: TorchDenoiser,
        teacher: TorchDenoiser | None,
        solver: Solver,
        trajectories: Sequence[Trajectory],
        held_out: Sequence[Trajectory],
        schedule: NetworkFit,
    ) -> None:
        self._denoiser, self._teacher, self._solver, self._schedule = denoiser, teacher, solver, schedule
        self._trained, self._device = denoiser.computing_in(schedule.precision), denoiser.device
        self._trajectories, self._held_out = trajectories, held_out
        self._starts = len(solver.steps) - schedule.unroll + 1
        self._at_start: dict[int | None, list[float]] = {}

    @torch.no_grad()
    def measure_start(self, movements: Movements, step: LossWatcher) -> None:
        """Measure the loss of each stretch on the first batch. Raise PassError if it is not finite."""
        batch, weights = self._trajectories[0], movements.weights()
        every = slice(0, min(batch.samples, self._schedule.batch))
        for width in movements.widths:
            errors = self._at_start[width] = list[float]()
            for first in range(self._starts):
                errors.append(float(self._error(movements, weights, batch, first, every, width)))
                step()
        if not np.isfinite([*self._at_start.values()]).all():
            raise PassError("the quantized network predicts numbers that are not finite", hint="look at `debug`")

    def draw(self, movements: Movements, rng: np.random.Generator, share: float) -> torch.Tensor:
        """Return the loss of some samples of a batch at a stretch of the trajectory, with a `share` of the fit done."""
        batch = self._trajectories[int(rng.integers(len(self._trajectories)))]
        first = int(rng.integers(self._starts))
        begin = int(rng.integers(max(batch.samples - self._schedule.batch, 0) + 1))
        samples = slice(begin, begin + self._schedule.batch)
        weights = movements.weights(share)
        loss = torch.zeros((), device=self._device)
        for width, counts in movements.widths.items():
            error = self._error(movements, weights, batch, first, samples, width)
            loss = loss + counts * (error - self._at_start[width][first])
        if self._teacher is None:
            return loss
        return loss + self._inside(movements, weights, batch, first, samples)

    @torch.no_grad()
    def image_db(self, movements: Movements, step: LossWatcher) -> float:
        """Return the mean PSNR of images of held-out noise (peak 2), behind the quantized network, in dB.

        With several widths it is the mean of theirs, weighted by their shares.
        """
        weights, found, shares = movements.weights(), list[float](), list[float]()
        for batch, (width, share) in product(self._held_out, movements.widths.items()):

            def predict(
                x: torch.Tensor, t: Timestep, rows: Conditions = batch.conditions, width: int | None = width
            ) -> torch.Tensor:
                step()
                return self._denoiser(x, t, rows, movements.at(t, weights, width))[0]

            images = unroll(predict, self._solver, batch, 0, len(self._solver.steps), slice(None), self._device)
            exact = batch.states[-1]["x"].to(self._device)
            errors = (images.clamp(-1, 1) - exact.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-12)
            found += (10 * torch.log10(4 / errors)).tolist()
            shares += [share] * len(errors)
        return float(np.average(found, weights=shares))

    def _error(
        self,
        movements: Movements,
        weights: Moved,
        batch: Trajectory,
        first: int,
        samples: slice,
        width: int | None,
    ) -> torch.Tensor:
        rows = _rows(batch.conditions, samples, batch.samples)

        def predict(x: torch.Tensor, t: Timestep) -> torch.Tensor:
            return self._trained(x, t, rows, movements.at(t, weights, width))[0]

        if self._schedule.unroll == 1:
            out = predict(batch.states[first]["x"][samples].to(self._device), self._solver.steps[first].timestep)
            return _log_error(out, batch.outputs[first][samples].to(self._device))
        last = first + self._schedule.unroll
        x = unroll(predict, self._solver, batch, first, last, samples, self._device)
        return _log_error(x, batch.states[last]["x"][samples].to(self._device))

    def _inside(
        self, movements: Movements, weights: Moved, batch: Trajectory, first: int, samples: slice
    ) -> torch.Tensor:
        """Return the errors of the outputs of blocks and of their relations at one call."""
        schedule, t = self._schedule, self._solver.steps[first].timestep
        rows = _rows(batch.conditions, samples, batch.samples)
        x, total = batch.states[first]["x"][samples].to(self._device), torch.zeros((), device=self._device)
        teacher = self._teacher
        if teacher is None:
            return total
        with torch.no_grad():
            wanted = teacher(x, t, rows, {})[1:]
        found = self._trained(x, t, rows, movements.at(t, weights))[1:]
        for value, target in zip(found, wanted, strict=True):
            if schedule.blocks:
                total = total + schedule.blocks * _log_error(value, target) / len(found)
        if schedule.relations and found:
            total = total + schedule.relations * relation_error(found[-1], wanted[-1])
        return total


def _log_error(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over samples of the logarithm of the mean squared error."""
    return (value - target).square().flatten(1).mean(1).clamp_min(SMALLEST_ERROR).log().mean()


def relation_error(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the divergence of the relations between positions (MPQ-DM, arXiv 2412.11549): KL of softmaxed cosines.

    Both `[B, C, ...]`. It has gradients, which the features of the published code, detached, have not.
    """
    found, wanted = (_relations(features) for features in (value, target))
    size = log(max(found.shape[-1], 2))
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True) / (found.shape[-2] * size)


def _relations(features: torch.Tensor) -> torch.Tensor:
    """Return log softmax of the cosines between positions, `[B, positions, positions]`."""
    places = features.flatten(2).transpose(1, 2) if features.ndim > 3 else features
    unit = functional.normalize(places if places.ndim == 3 else places[:, None], dim=-1)
    return functional.log_softmax(unit @ unit.transpose(1, 2), dim=-1)


def _rows(conditions: Conditions, samples: slice, count: int) -> Conditions:
    """Return the rows of some samples, of both halves where there are two."""
    halves = {name: len(array) // count for name, array in conditions.items()}
    return {
        name: np.concatenate([array[k * count : (k + 1) * count][samples] for k in range(max(halves[name], 1))])
        for name, array in conditions.items()
    }
