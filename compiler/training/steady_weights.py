"""Training without weights that oscillate between two integers (OFQ, arXiv 2302.02210).

A learned scale moves the thresholds of all weights of a row at each step, and weights near them jump back and forth.
With statistical scales (StatsQ) the scale s of a row is no variable. It follows the mean magnitude of the row's weights
w, without a gradient:

    s = s_0 mean|w| / mean|w_0|

OFQ has 2 mean|w| / 2^(b - 1), on b bits without a level at 0. The grids here have one, and a ratio that is right at
every width: that of the start, s_0 / mean|w_0|.

In the last phase of the fit, behind SURE, weights that are sure of their integer stay (confidence-guided annealing).
Only those within a boundary range r of the threshold t between two neighbours move,

    |w / s - t| <= r        in distances of the two neighbours

and one that leaves the range stays too. Biases and scales of activations go on moving.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from ..torch_graph.convert import TorchGraph
from ..torch_graph.quantizers import Quantizer
from .moving_weights import MovingWeight
from .restraints import stop

SURE = 0.75
"""The share of the fit behind which weights far from thresholds stay."""


class StatisticalScales:
    """The scales of quantized weights that follow their mean magnitudes, in a torch graph."""

    def __init__(self, graph: TorchGraph, weights: Sequence[MovingWeight]) -> None:
        paths = {module: path for path, module in graph.module.named_modules()}
        members: dict[Quantizer, list[MovingWeight]] = defaultdict(list)
        for weight in weights:
            if weight.quantizer is not None:
                members[weight.quantizer].append(weight)
        self._parts = [
            (paths[part], part, own, part.scale.detach().clone(), _magnitudes(part, [w.start for w in own]))
            for part, own in members.items()
        ]

    @torch.no_grad()
    def values(self, moved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the scales for the moved weights, by the names of the module's parameters."""
        found = {}
        for path, part, own, scale, before in self._parts:
            now = _magnitudes(part, [moved[weight.path] for weight in own])
            found[f"{path}.scale"] = scale * torch.where(before > 0, now / before, torch.ones_like(now))
        return found

    @torch.no_grad()
    def settle(self, moved: Mapping[str, torch.Tensor]) -> None:
        """Write the scales into the modules."""
        found = self.values(moved)
        for path, part, *_ in self._parts:
            part.scale.copy_(found[f"{path}.scale"])


class SureWeights:
    """The restraint of weights farther than `reach` from a threshold, in distances of neighbours, behind SURE."""

    def __init__(self, graph: TorchGraph, weights: Sequence[MovingWeight], reach: float) -> None:
        paths = {module: path for path, module in graph.module.named_modules()}
        self._weights = [(paths[w.quantizer], w.quantizer, w) for w in weights if w.quantizer is not None]
        self._reach = reach

    @torch.no_grad()
    def restrain(self, optimizer: torch.optim.Optimizer, values: Mapping[str, torch.Tensor], share: float) -> None:
        """Stop the weights that are sure, when SURE of the fit is done."""
        if share < SURE:
            return
        for path, part, weight in self._weights:
            scale = values.get(f"{path}.scale", part.scale)
            away = distances_from_thresholds(part, values[weight.path] / _by_row(part, scale, weight.start.ndim))
            (offsets,) = weight.offsets
            stop(optimizer, offsets, away > self._reach)

    def memory(self) -> dict[str, torch.Tensor]:
        """Return nothing: where a weight is decides alone."""
        return {}


def distances_from_thresholds(part: Quantizer, v: torch.Tensor) -> torch.Tensor:
    """Return how far weights, in units of their scales, are from the nearest middle of two neighbours of the grid.

    In distances of the two neighbours, so at most 0.5 inside of the grid.
    """
    base, gap = part.around(v, torch.zeros((), dtype=v.dtype, device=v.device))
    return (v - (base + gap / 2)).abs() / gap.clamp_min(1)  # levels of a codebook may be equal


def _magnitudes(part: Quantizer, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of magnitudes of each row, of the shape of the quantizer's scale."""
    if part.axis is None:
        return torch.stack([weight.abs().sum() for weight in weights]).sum()
    rows = [weight.abs().movedim(part.axis, 0).flatten(1).sum(1) for weight in weights]
    return torch.stack(rows).sum(0)


def _by_row(part: Quantizer, scale: torch.Tensor, rank: int) -> torch.Tensor:
    return scale.reshape([-1 if d == part.axis % rank else 1 for d in range(rank)]) if part.axis is not None else scale
