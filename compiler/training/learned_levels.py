"""The levels of weights' codebooks as functions of trainable offsets, which are 0 at the start.

A weight is s L[k], with the level L[k] nearest to it. The gradient of L[k] is the sum of s dE/dw over the weights of
its row with the code k; weights that move have the straight-through gradient at the same time, and so change their
codes (compiler/torch_graph/quantizers.py). PV-Tuning (arXiv 2405.14852) trains codes and what they stand for in turns.
With offsets a in steps of the mean distance g of two neighbours,

    L = sorted(rint(L_0 + g a))        within -127 .. 127, on the grid of the int8 kernels

and the rounding passes gradients on. Two levels may become equal; then one code is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..scales.codebooks import LARGEST_LEVEL
from ..torch_graph.convert import TorchGraph
from ..torch_graph.quantizers import Quantizer, with_gradient_of


class LearnedLevels:
    """The offsets of the levels of quantizers, by the names of their nodes; those without a codebook are left out."""

    def __init__(self, graph: TorchGraph, names: Sequence[str]) -> None:
        paths = {module: path for path, module in graph.module.named_modules()}
        modules = dict.fromkeys(graph.quantizers[name] for name in names)
        self._parts = [(paths[m], m) for m in modules if isinstance(m, Quantizer) and m.levels is not None]
        self._starts = [m.levels.clone() for _, m in self._parts if m.levels is not None]
        self._gaps = [_gap(levels) for levels in self._starts]
        self.offsets = [nn.Parameter(torch.zeros_like(levels)) for levels in self._starts]

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return what an optimizer trains; `rate` is how far a step moves a level, in mean distances."""
        return [{"params": self.offsets, "lr": rate}]

    def values(self) -> dict[str, torch.Tensor]:
        """Return the levels, and the ends of the grids, in the places of the module's own."""
        found: dict[str, torch.Tensor] = {}
        for (path, _), start, gap, offsets in zip(self._parts, self._starts, self._gaps, self.offsets, strict=True):
            free = start + gap * offsets
            whole = torch.clamp(torch.round(free), -LARGEST_LEVEL, LARGEST_LEVEL)
            levels, _ = torch.sort(with_gradient_of(whole, free), dim=-1)
            ends = levels.detach()
            found |= {f"{path}.levels": levels, f"{path}.qmin": ends[..., 0], f"{path}.qmax": ends[..., -1]}
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Write the levels into the modules."""
        found = self.values()
        for path, module in self._parts:
            module.levels, module.qmin, module.qmax = (found[f"{path}.{name}"] for name in ("levels", "qmin", "qmax"))


def _gap(levels: torch.Tensor) -> torch.Tensor:
    """Return the mean distance of neighbours `[..., 1]`, at least 1."""
    span = levels[..., -1:] - levels[..., :1]
    return torch.clamp(span / max(levels.shape[-1] - 1, 1), min=1.0)
