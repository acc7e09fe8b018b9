"""The rounding of a block's weights, learned against the block's outputs in the float graph.

AdaRound (arXiv 2004.10568, eq. 21 to 25) for one layer, BRECQ (arXiv 2102.05426) for a block. Each weight rounds down
or up by a variable h in [0, 1]; the loss over batches of one network call each is

    e(W_h) / e(W_start)  +  regularization mean(1 - |2h - 1|^beta),
    e(W) = sum over outputs |f(x; W) - f|^2 / |f|^2  +  inner sum over layers inside |l(x; W) - l|^2 / |l|^2,

where f is the float output and l the float output of a layer (EDA-DM, arXiv 2401.04585), and beta falls from 20 to 2
after a warm-up without the second term. Both terms are of the order of 1 for a block of any size, so one
`regularization` fits all; the papers' sums need another for each network.

QDrop (arXiv 2203.05740): in the fit, each element of an activation is with the probability `drop` not quantized. What
enters the block is that of the float graph there, and the quantizers inside pass it on. Errors are measured without.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.bundle.training import TrainedUnit
from mezzotint.runtime.signature import Signature

from ..core.execute import timestep_feed
from ..errors import PassError
from ..graph.nodes import name_of
from ..torch_graph.convert import TorchGraph
from ..torch_graph.quantizers import SoftRounding
from .block_data import Batch, LossWatcher
from .subgraph import Subgraph
from .torch_device import Precision, autocast

POINTS = 50  # of the curve in the manifest


@dataclass(frozen=True)
class Annealing:
    """The schedule of a fit.

    iterations       steps of Adam
    learning_rate    of Adam
    regularization   weight of the second term
    batch            samples of one step
    inner            weight of the errors inside
    drop             probability of QDrop
    precision        of the forward passes of the fit; errors are measured in float32
    warmup           share of the iterations without the second term
    betas            its exponent at the end of the warm-up and at the last iteration
    """

    iterations: int
    learning_rate: float
    regularization: float
    batch: int
    inner: float = 0.0
    drop: float = 0.0
    precision: Precision = "float32"
    warmup: float = 0.2
    betas: tuple[float, float] = (20.0, 2.0)

    def beta(self, iteration: int) -> float | None:
        """Return the exponent at an iteration, or None during the warm-up."""
        first = self.warmup * self.iterations
        if iteration < first:
            return None
        share = (iteration - first) / max(self.iterations - first, 1)
        high, low = self.betas
        return low + 0.5 * (high - low) * (1 + cos(share * pi))


class Batches:
    """The batches of a block, and the errors of its torch module on them."""

    def __init__(
        self,
        graph: TorchGraph,
        part: Subgraph,
        signature: Signature,
        data: Sequence[Batch],
        schedule: Annealing,
        seed: int,
        calls: int = 1,
    ) -> None:
        weights = [batch.weight for batch in data]
        self._chances = None if len(set(weights)) < 2 else [weight / sum(weights) for weight in weights]
        self._calls = calls
        self._graph, self._signature, self._batches = graph, signature, data
        self._outputs, self._schedule = part.outputs, schedule
        self._inputs = {name_of(value): value for value in part.model.graph.inputs}
        self._mixing = torch.Generator().manual_seed(seed)

    def draw(self, rng: np.random.Generator) -> tuple[Batch, slice]:
        """Return a batch and some successive samples of it, or all where it cannot be divided.

        A call is drawn as often as the allocation of samples says (allocate_steps).
        """
        most = self._schedule.batch
        batch = self._batches[int(rng.choice(len(self._batches), p=self._chances))]
        first = int(rng.integers(max(batch.samples - most, 0) + 1))
        return batch, slice(first, first + most) if batch.divisible else slice(None)

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Return the error with the layers inside, and with elements that are not quantized: of `calls` batches."""
        self._graph.module.train()
        drawn = [self._weighted(*self._errors(*self.draw(rng))) for _ in range(self._calls)]
        return torch.stack(drawn).mean()

    @torch.no_grad()
    def mean_errors(self) -> tuple[float, float]:
        """Return the mean error of the outputs over all batches, and the mean with that of the layers inside."""
        self._graph.module.eval()
        errors = [self._errors(batch, slice(None)) for batch in self._batches]
        outputs = float(np.mean([float(error) for error, _ in errors]))
        return outputs, float(np.mean([float(self._weighted(*error)) for error in errors]))

    def _weighted(self, outputs: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return outputs + self._schedule.inner * inside

    def _errors(self, batch: Batch, samples: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean squared errors over the mean squares in the float graph, summed: of outputs, and inside."""
        errors = {inside: torch.zeros((), device=self._graph.device) for inside in (True, False)}
        for name, value in zip(self._graph.outputs, self._call(batch, samples), strict=True):
            target = self._on_device(np.array(batch.targets[name][samples]))
            error = (value - target).square().mean() / target.square().mean().clamp_min(1e-12)
            errors[name in self._outputs] = errors[name in self._outputs] + error
        return errors[True], errors[False]

    def _call(self, batch: Batch, samples: slice) -> Sequence[torch.Tensor]:
        fed = {name: np.array(array[samples]) for name, array in batch.inputs.items()}
        if self._signature.timestep in self._inputs:
            count = len(range(*samples.indices(batch.samples)))
            fed |= timestep_feed(self._inputs, self._signature, count, batch.timestep)
        given = {name: self._on_device(fed[name]) for name in self._inputs}
        if self._graph.module.training and self._schedule.drop:
            for name, array in batch.floats.items():
                dropped = torch.rand(given[name].shape, generator=self._mixing) < self._schedule.drop
                floats = self._on_device(np.array(array[samples]))
                given[name] = torch.where(dropped.to(floats.device), floats, given[name])
        precision = self._schedule.precision if self._graph.module.training else "float32"
        with autocast(self._graph.device, precision):
            return self._run(batch, tuple(given.values()))

    def _on_device(self, array: AnyArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._graph.device)

    def _run(self, batch: Batch, arguments: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs: Sequence[torch.Tensor] = self._graph.module(*arguments)
        return outputs


def fit_rounding(
    batches: Batches,
    rounders: Sequence[SoftRounding],
    schedule: Annealing,
    seed: int,
    unit: str,
    by: str,
    step: LossWatcher,
) -> TrainedUnit:
    """Learn which way the weights round; the modules are hard afterwards. `step` is called after each iteration.

    Raise PassError for a loss that is not finite.
    """
    variables = [module.v for module in rounders]
    soft_start = [v.detach().clone() for v in variables]
    _harden(rounders)
    start, scale = batches.mean_errors()
    if scale == 0:  # the unit computes what the float graph does
        return TrainedUnit(unit, by, 0.0, 0.0, 0.0, (), kept=False)
    with torch.no_grad():
        for v, soft in zip(variables, soft_start, strict=True):
            v.copy_(soft)
    optimizer = torch.optim.Adam(variables, lr=schedule.learning_rate)
    rng = streams.TRAINING_BATCHES.generator(seed, zlib.crc32(unit.encode()))
    weights = sum(v.numel() for v in variables)
    losses = []
    for iteration in range(schedule.iterations):
        loss = error = batches.loss(rng) / scale
        if (beta := schedule.beta(iteration)) is not None:
            loss = loss + schedule.regularization * sum(m.regularizer(beta) for m in rounders) / weights
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
    _harden(rounders)
    hard, _ = batches.mean_errors()
    return TrainedUnit(unit, by, start, soft_error, hard, curve_of(losses), kept=hard < start)


def _harden(rounders: Sequence[SoftRounding]) -> None:
    """Move every h to its end: 0 or 1 exactly."""
    for rounder in rounders:
        rounder.choose(rounder.ups())


def curve_of(losses: Sequence[float]) -> tuple[float, ...]:
    """Return the curve in at most POINTS points: means of successive iterations, to four digits."""
    return tuple(float(f"{part.mean():.4g}") for part in np.array_split(losses, min(POINTS, len(losses))))
