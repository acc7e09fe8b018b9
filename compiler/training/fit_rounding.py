"""The rounding of a block's weights, learned against the block's outputs in the float graph.

AdaRound (arXiv 2004.10568, eq. 21 to 25) for one layer, BRECQ (arXiv 2102.05426) for a block. Each weight rounds down
or up by a variable h in [0, 1]; the loss over batches of one network call each is

    sum |f(x; W_h) - f_float(x_float)|^2 / sum |f(x; W_start) - f_float(x_float)|^2  +  weight mean(1 - |2h - 1|^beta),

and beta falls from 20 to 2 after a warm-up without the second term. Both terms are of the order of 1 for a block of
any size, so one `weight` fits all; the papers' sums need another for each network.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch

from mezzotint.runtime import streams
from mezzotint.runtime.signature import Signature

from ..errors import PassError
from ..torch_graph.convert import TorchGraph
from ..torch_graph.quantizers import SoftRounding
from .block_data import Batch, BlockData

HARD = 6.0  # a V at which h is 1 exactly


@dataclass(frozen=True)
class Annealing:
    """The schedule of a fit.

    iterations   steps of Adam
    rate         learning rate of Adam
    weight       weight of the regulariser
    warmup       share of the iterations without it
    betas        its exponent at the end of the warm-up and at the last iteration
    rows         samples of one step
    """

    iterations: int
    rate: float
    weight: float
    warmup: float = 0.2
    betas: tuple[float, float] = (20.0, 2.0)
    rows: int = 8

    def beta(self, iteration: int) -> float | None:
        """Return the exponent at an iteration, or None during the warm-up."""
        first = self.warmup * self.iterations
        if iteration < first:
            return None
        share = (iteration - first) / max(self.iterations - first, 1)
        high, low = self.betas
        return low + 0.5 * (high - low) * (1 + cos(share * pi))


@dataclass(frozen=True)
class Curve:
    """Errors of a block's outputs: hard before the fit, soft and hard behind it; and the loss of each iteration."""

    start: float
    soft: float
    hard: float
    losses: tuple[float, ...]


class TrainedBlock:
    """A block in torch with its data: calls it on a batch, and measures its error."""

    def __init__(self, graph: TorchGraph, names: Sequence[str], outputs: Sequence[str], signature: Signature) -> None:
        self.graph, self.names, self.outputs, self._signature = graph, names, outputs, signature

    def call(self, batch: Batch, rows: slice) -> dict[str, torch.Tensor]:
        """Return the outputs for some rows of a batch, by name."""
        arguments = []
        for name in self.names:
            if name == self._signature.timestep:
                arguments.append(torch.tensor([self._signature.network_time(batch.timestep)]))
            else:
                arguments.append(torch.from_numpy(np.array(batch.inputs[name][rows])))
        return dict(zip(self.outputs, self.graph.module(*arguments), strict=True))

    def loss(self, batch: Batch, rows: slice) -> torch.Tensor:
        """Return the sum of squared errors of all outputs, each over its own mean square in the float graph."""
        total = torch.zeros(())
        for name, value in self.call(batch, rows).items():
            target = torch.from_numpy(np.array(batch.targets[name][rows]))
            scale = target.square().mean().clamp_min(1e-12)
            total = total + (value - target).square().mean() / scale
        return total

    def error(self, data: BlockData) -> float:
        """Return the mean loss over all batches."""
        with torch.no_grad():
            losses = [float(self.loss(batch, slice(None))) for batch in data.batches]
        return float(np.mean(losses))


def fit_rounding(
    block: TrainedBlock,
    rounders: Mapping[str, SoftRounding],
    data: BlockData,
    schedule: Annealing,
    seed: int,
    where: str,
    step: Callable[[float], None],
) -> Curve:
    """Learn which way the weights round; the modules are hard afterwards. `step` gets the loss of each iteration.

    Raise PassError for a loss that is not finite.
    """
    softened = {name: module.v.detach().clone() for name, module in rounders.items()}
    _harden(rounders)
    start = block.error(data)
    if start <= 0:
        return Curve(start, start, start, ())
    with torch.no_grad():
        for name, module in rounders.items():
            module.v.copy_(softened[name])
    variables = [module.v for module in rounders.values()]
    optimizer = torch.optim.Adam(variables, lr=schedule.rate)
    sizes = sum(v.numel() for v in variables)
    rng = streams.TRAINING_BATCHES.generator(seed, zlib.crc32(where.encode()))
    losses = []
    for iteration in range(schedule.iterations):
        batch = data.batches[int(rng.integers(len(data.batches)))]
        count = len(next(iter(batch.targets.values())))
        first = int(rng.integers(max(count - schedule.rows, 0) + 1))
        loss = block.loss(batch, slice(first, first + schedule.rows)) / start
        beta = schedule.beta(iteration)
        if beta is not None:
            loss = loss + schedule.weight * sum(m.regularizer(beta) for m in rounders.values()) / sizes
        if not torch.isfinite(loss):
            raise PassError(
                f"the loss is {float(loss.detach())} at iteration {iteration}", where=where, hint="lower the rate"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        step(losses[-1])
    soft = block.error(data)
    _harden(rounders)
    return Curve(start, soft, block.error(data), tuple(losses))


@torch.no_grad()
def _harden(rounders: Mapping[str, SoftRounding]) -> None:
    """Move every h to its end: 0 or 1 exactly."""
    for module in rounders.values():
        module.v.copy_(torch.where(module.v >= 0, HARD, -HARD))
