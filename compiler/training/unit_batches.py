"""The batches of a unit that is trained, its errors on them, and the schedule of its fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.func import functional_call

from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.signature import Signature

from ..core.execute import timestep_feed
from ..graph.nodes import name_of
from ..torch_graph.convert import TorchGraph
from .block_data import Batch
from .fisher_loss import Fishers
from .movements import Moved, Movements
from .subgraph import Subgraph
from .torch_device import Precision, autocast


@dataclass(frozen=True)
class Annealing:
    """The schedule of a fit.

    iterations       steps of Adam
    learning_rate    of Adam
    regularization   weight of the term that drives weights to the grid
    batch            samples of one step
    inner            weight of the errors inside
    drop             probability of QDrop
    precision        of the forward passes of the fit; errors are measured in float32
    scale_shares     how far a step moves the ends of activations' grids at first, in shares; 0 leaves them
    warmup           share of the iterations without that term
    betas            its exponent at the end of the warm-up and at the last iteration
    """

    iterations: int
    learning_rate: float
    regularization: float
    batch: int
    inner: float = 0.0
    drop: float = 0.0
    precision: Precision = "float32"
    scale_shares: float = 0.0
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
    """The batches of a block, and the errors of its torch module on them, weighted by `fishers` where there are any.

    `movements` are weights and scales in the places of the module's own, until they are settled. A step of the fit
    takes the samples of `calls` batches in equal parts.
    """

    def __init__(
        self,
        graph: TorchGraph,
        part: Subgraph,
        signature: Signature,
        data: Sequence[Batch],
        schedule: Annealing,
        seed: int,
        calls: int = 1,
        *,
        movements: Movements | None = None,
        fishers: Fishers | None = None,
    ) -> None:
        weights = [batch.weight for batch in data]
        self._chances = None if len(set(weights)) < 2 else [weight / sum(weights) for weight in weights]
        self._calls = calls
        self._graph, self._signature, self._batches = graph, signature, data
        self._outputs, self._schedule = part.outputs, schedule
        self._inputs = {name_of(value): value for value in part.model.graph.inputs}
        self._mixing = torch.Generator().manual_seed(seed)
        self.movements, self._fishers = movements, fishers or {}

    def draw(self, rng: np.random.Generator) -> tuple[Batch, slice]:
        """Return a batch and some successive samples of it, or all where it cannot be divided: the part of one call.

        A call is drawn as often as the allocation of samples says (allocate_steps).
        """
        most = max(self._schedule.batch // self._calls, 1)
        batch = self._batches[int(rng.choice(len(self._batches), p=self._chances))]
        first = int(rng.integers(max(batch.samples - most, 0) + 1))
        return batch, slice(first, first + most) if batch.divisible else slice(None)

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Return the error with the layers inside, and with elements that are not quantized: of `calls` batches."""
        self._graph.module.train()
        weights = self._moved_weights()
        drawn = [self._weighted(*self._errors(*self.draw(rng), weights)) for _ in range(self._calls)]
        return torch.stack(drawn).mean()

    @torch.no_grad()
    def mean_errors(self) -> tuple[float, float]:
        """Return the mean error of the outputs over all batches, and the mean with that of the layers inside."""
        self._graph.module.eval()
        weights = self._moved_weights()
        errors = [self._errors(batch, slice(None), weights) for batch in self._batches]
        outputs = float(np.mean([float(error) for error, _ in errors]))
        return outputs, float(np.mean([float(self._weighted(*error)) for error in errors]))

    def _weighted(self, outputs: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return outputs + self._schedule.inner * inside

    def _moved_weights(self) -> Moved:
        return {} if self.movements is None else self.movements.weights()

    def _errors(self, batch: Batch, samples: slice, weights: Moved) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean squared errors over the mean squares in the float graph, summed: of outputs, and inside."""
        errors = {inside: torch.zeros((), device=self._graph.device) for inside in (True, False)}
        for name, value in zip(self._graph.outputs, self._call(batch, samples, weights), strict=True):
            target = self._on_device(np.array(batch.targets[name][samples]))
            fisher = self._fishers.get(name)
            lost = (value - target).square().mean() if fisher is None else fisher.error(value - target)
            error = lost / target.square().mean().clamp_min(1e-12)
            errors[name in self._outputs] = errors[name in self._outputs] + error
        return errors[True], errors[False]

    def _call(self, batch: Batch, samples: slice, weights: Moved) -> Sequence[torch.Tensor]:
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
            values = {} if self.movements is None else self.movements.at(batch.timestep, weights)
            outputs: Sequence[torch.Tensor] = functional_call(self._graph.module, values, tuple(given.values()))
            return outputs

    def _on_device(self, array: AnyArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._graph.device)

    def settle(self) -> dict[str, npt.NDArray[Any]]:
        """Write what moves into the module; return what was written by the names of its parameters."""
        settled = {} if self.movements is None else self.movements.settle()
        self.movements = None
        return settled
