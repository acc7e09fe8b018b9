"""Soft rounding of weights: each weight between two grid points, by a variable that is trained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import PassError
from .quantizers import Quantizer


class SoftRounding(nn.Module):
    """The weights of a layer between the two grid points around each (AdaRound; Nagel et al., 2020).

        w = (base + h(V) gap) s        h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)

    The gap is 1, or the distance of the two levels of a codebook, so that a V moves by its own step (FP4DiT).

    It takes the place of a weight's quantizer, and its forward ignores the weight that it is called with.

    Without `integers`, h starts at the fraction of each weight, and the soft weights are the float ones, to EDGE of a
    step; weights beyond the grid start at its end. `integers` are another method's choice (GPTQ): h starts on their
    side, between the fraction and the integer as `pull` says. An integer that is not next to the float weight stays,
    and its neighbour towards the float weight is the other choice.

    Behind `use_low_rank`, V = V_0 + A B with the start V_0, and the two factors alone are trained (CBQ's LoRA-Rounding,
    arXiv 2312.07950). Far fewer numbers are trained then, and the weights of a layer move together.
    """

    STRETCH, SHIFT = 1.2, 0.1
    EDGE = 1e-4  # h starts this far inside of [0, 1], where its gradient is not 0
    END = 6.0  # a V at which h is 1 exactly
    MARGIN = 0.02  # beyond 1/2, on the side of an integer that another method chose

    base: torch.Tensor
    gap: torch.Tensor

    def __init__(
        self, quantizer: Quantizer, weight: torch.Tensor, integers: torch.Tensor | None = None, pull: float = 0.5
    ) -> None:
        super().__init__()
        if quantizer.rows:
            raise PassError("weights have no table over the timestep", hint="round the weights of layers only")
        if not 0 <= pull <= 1:
            raise PassError(f"the pull towards the given integers is {pull}", hint="choose one from 0 to 1")
        self.quantizer = quantizer
        with torch.no_grad():
            scale, zero, _, _ = quantizer.parameters_for(weight)
            v, chosen = weight / scale, None if integers is None else integers.to(weight.dtype) - zero
            base, gap = quantizer.around(v, zero, chosen)
            step = gap.clamp(min=self.EDGE)  # two levels may be equal
            h = torch.clamp((v - base) / step, 0, 1)
            if chosen is not None:
                up = (chosen - base) / step
                h = h + pull * (up - h)
                h = torch.where(up > 0.5, h.clamp(min=0.5 + self.MARGIN), h.clamp(max=0.5 - self.MARGIN))
            self.register_buffer("gap", gap)
            self.register_buffer("base", base)
            share = (h.clamp(self.EDGE, 1 - self.EDGE) + self.SHIFT) / self.STRETCH
            self.v = nn.Parameter(torch.logit(share))
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None

    def use_low_rank(self, rank: int, rng: np.random.Generator) -> None:
        """Train a product of this rank beside the start: A `[rows, rank]` random, B `[rank, columns]` 0 at first.

        Rows are along the weight's first axis. A has the variance 1 / rank, so that a step of B moves V as far as one
        of its own would.
        """
        rows = self.v.shape[0]
        columns = self.v.numel() // rows
        start = rng.standard_normal((rows, rank)) / np.sqrt(rank)
        self.v.requires_grad_(False)
        self.a = nn.Parameter(torch.as_tensor(start, dtype=self.v.dtype, device=self.v.device))
        self.b = nn.Parameter(torch.zeros((rank, columns), dtype=self.v.dtype, device=self.v.device))

    def variables(self) -> list[nn.Parameter]:
        """Return what is trained: V, or the two factors."""
        return [self.v] if self.a is None or self.b is None else [self.a, self.b]

    def logits(self) -> torch.Tensor:
        """Return V."""
        return self.v if self.a is None or self.b is None else self.v + (self.a @ self.b).reshape(self.v.shape)

    def forward(self, weight: torch.Tensor | None = None, row: torch.Tensor | None = None) -> torch.Tensor:
        """Return the soft weights."""
        return self._weights(self.fractions())

    def fractions(self) -> torch.Tensor:
        """Return h(V): 0 is the lower grid point, 1 the upper."""
        return torch.clamp(self.STRETCH * torch.sigmoid(self.logits()) - self.SHIFT, 0, 1)

    def regularizer(self, beta: float) -> torch.Tensor:
        """Return the sum of 1 - |2h - 1|^beta, which is 0 where every weight is on the grid."""
        return (1 - (2 * self.fractions() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def ups(self) -> npt.NDArray[np.bool_]:
        """Return which weights round up."""
        up: npt.NDArray[np.bool_] = (self.logits() >= 0).cpu().numpy()
        return up

    @torch.no_grad()
    def choose(self, ups: npt.NDArray[np.bool_]) -> None:
        """Move every h to its end: 1 for the weights that round up, 0 for the others; factors become 0."""
        up = torch.from_numpy(np.array(ups)).to(self.v.device)
        self.v.copy_(torch.where(up, self.END, -self.END))
        if self.b is not None:
            self.b.zero_()

    @torch.no_grad()
    def hard(self) -> torch.Tensor:
        """Return the weights on the nearer grid points."""
        return self._weights((self.logits() >= 0).to(self.v.dtype))

    @torch.no_grad()
    def integers(self) -> torch.Tensor:
        """Return the integers of the nearer grid points, as floats of the weight's shape."""
        _, zero, low, high = self.quantizer.parameters_for(self.base)
        return torch.clamp(self.base + (self.logits() >= 0).to(self.v.dtype) * self.gap + zero, low, high)

    def _weights(self, fractions: torch.Tensor) -> torch.Tensor:
        scale, zero, low, high = self.quantizer.parameters_for(self.base)
        return (torch.clamp(self.base + fractions * self.gap + zero, low, high) - zero) * scale


def quantizer_within(part: nn.Module) -> Quantizer:
    """Return the quantizer that a module is, or whose grid it rounds to. Raise PassError for any other module."""
    quantizer = part.quantizer if isinstance(part, SoftRounding) else part
    if not isinstance(quantizer, Quantizer):
        raise PassError(f"a {type(part).__name__} stands for a quantizer", hint="use a Quantizer or a SoftRounding")
    return quantizer
