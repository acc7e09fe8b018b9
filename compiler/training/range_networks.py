"""TDQ's networks of the timestep (arXiv 2306.02316) in torch, to be trained through the quantized graph.

They are those of compiler/scales/tdq.py, which fits them to histograms, with the same first weights and the same
embedding. Here their outputs are factors of the ends of each row's range, 1 at the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

from ..scales.tdq import Networks, embed


class RangeNetworks(nn.Module):
    """One network for each of some quantizers, evaluated at the timestep of each row of their tables."""

    embedding: torch.Tensor

    def __init__(self, quantizers: int, timesteps: Sequence[float], span: float, seed: int) -> None:
        super().__init__()
        networks = Networks([(seed, i) for i in range(quantizers)], np.float32)
        self.layers = nn.ParameterList([torch.from_numpy(array) for array in networks.parameters])
        embedding = embed(timesteps, span, len(timesteps), np.float32)
        self.register_buffer("embedding", torch.from_numpy(np.ascontiguousarray(embedding)))

    def forward(self) -> torch.Tensor:
        """Return the logarithms of the factors of both ends, `[quantizers, rows, 2]`."""
        value = self.embedding
        for i in range(0, len(self.layers) - 2, 2):
            value = torch.relu(value @ self.layers[i] + self.layers[i + 1])
        return torch.log(softplus(value @ self.layers[-2] + self.layers[-1]))
