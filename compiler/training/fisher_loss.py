"""The squared error of a block's output, weighted by how much each of its changes moves the prediction.

FIMA-Q (arXiv 2506.11543) approximates the Fisher matrix F of a block's output by a diagonal and a part of low rank,
F = diag(rest) + L^T L, and reconstructs blocks with the loss d^T F d of a difference d. F comes from gradients of the
prediction (compiler/gradients/block_fisher.py). The mean of its diagonal is 1, so a loss keeps its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..core.pipeline import Context
from ..core.program import Program
from ..rounding.layer_inputs import Latents
from .subgraph import Subgraph


@dataclass(frozen=True, eq=False)
class BlockFisher:
    """F of one output: `rest` `[elements]` and L `factors` `[rank, elements]`, for the elements of one sample."""

    rest: torch.Tensor
    factors: torch.Tensor

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """Return d^T F d for a difference `[samples, ...]`, the mean over samples and elements."""
        flat = difference.flatten(1)
        along = flat @ self.factors.T
        return ((flat.square() @ self.rest).mean() + along.square().sum(1).mean()) / flat.shape[1]


Fishers = Mapping[str, BlockFisher]
"""F of outputs of a block, by their names in its graph. An output without one counts by its mean square."""

FisherSource = Callable[[Program, Context, Subgraph, Sequence[Latents], torch.device], Fishers]
"""Measures F of the outputs of a block that was cut out of a program."""
