"""Float branches of low rank that are added to quantized weights while a network is trained, and fade to nothing.

A network of few bits has large errors, whose gradients train it badly. QVGen (arXiv 2505.11497) lets a branch carry a
part of what was rounded away, and lowers its rank while the weights take over. When a share u of the fit is done, a
layer multiplies with

    w = Q(v) + s (A diag(g(u)) B)      A = U sqrt(S), B = sqrt(S) V^T of the rank r of (w_0 - Q(w_0)) / s at the start

where Q(v) is the moving weight on its grid, and s its scale at the start (of a codebook, times the mean distance of its
levels). A and B are trained too. The fit up to GONE has phases of equal length. In each of them one half of the
components fades, that of the smaller singular values: g_k = (1 + cos(pi p)) / 2 at the share p of the phase, and the
rank falls from r to r/2, r/4, .. 1, 0. Components keep the order of the start, where QVGen decomposes A B again for
each phase. Behind GONE, and in the images that judge, there is no branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi
from typing import Any

import torch
from torch import nn

from ..graph.nodes import name_of, numpy_of
from ..rounding.layer_inputs import Inputs
from ..torch_graph.convert import TorchGraph
from ..torch_graph.soft_rounding import quantizer_within

GONE = 0.5
"""The share of the fit behind which no branch is left: the weights settle alone."""


class FadingBranches:
    """The branches of quantized weights in a torch graph, of a `rank` at most."""

    def __init__(self, graph: TorchGraph, quantized: Sequence[Inputs], rank: int) -> None:
        paths = {module: path for path, module in graph.module.named_modules()}
        self._units: dict[str, torch.Tensor] = {}
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for inputs in quantized:
            part = quantizer_within(graph.quantizers[inputs.weight.quantize.name or ""])
            with torch.no_grad():
                parameter = graph.weights[name_of(inputs.weight.value)]
                unit = part.parameters_for(parameter)[0] * part.mean_gap(parameter.ndim)
                floats = torch.tensor(numpy_of(inputs.floats), dtype=parameter.dtype, device=parameter.device)
                lost = ((floats - part(parameter)) / unit).reshape(len(floats), -1)
                left, values, right = torch.linalg.svd(lost, full_matrices=False)
                root = values[:rank].sqrt()
                part.branch = torch.zeros((), device=parameter.device)
            path = f"{paths[part]}.branch"
            self._units[path] = unit.expand_as(parameter)
            self._factors[path] = nn.Parameter(left[:, :rank] * root), nn.Parameter(root[:, None] * right[:rank])

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return what an optimizer trains; `rate` is how far a step moves a factor, in steps of the grid."""
        factors = [factor for pair in self._factors.values() for factor in pair]
        return [{"params": factors, "lr": rate}] if factors else []

    def values(self, share: float) -> dict[str, torch.Tensor]:
        """Return the branches at a share of the fit, in the places of the module's own; none when they are gone."""
        if share >= GONE:
            return {}
        found = {}
        for path, (left, right) in self._factors.items():
            kept = torch.tensor(strengths(left.shape[1], share), dtype=left.dtype, device=left.device)
            unit = self._units[path]
            found[path] = unit * ((left * kept) @ right).reshape(unit.shape)
        return found


def strengths(rank: int, share: float) -> list[float]:
    """Return g of each of `rank` components, the largest first, when a share of the fit is done."""
    ranks = [rank]
    while ranks[-1]:
        ranks.append(ranks[-1] // 2)
    phases = len(ranks) - 1
    done = min(share / GONE, 1.0) * phases
    phase = min(int(done), phases - 1)
    fading = (1 + cos(pi * (done - phase))) / 2
    return [1.0 if k < ranks[phase + 1] else fading if k < ranks[phase] else 0.0 for k in range(rank)]
