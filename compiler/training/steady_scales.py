"""Learned scales that stay for a while where their gradients ask for one direction alone (GAQAT, arXiv 2412.05551).

GAQAT trains quantized networks for flat minima and finds two gradients of a scale in conflict: that of the task, and
that of flatness. The disorder of a scale over a window of iterations is the share of changes of sign in its gradients,

    d = |{i : sgn g_i != sgn g_(i-1)}| / |{i}|       over successive gradients that are not 0

and scales with d below a threshold are frozen for the next window. Their gradients are computed on, so the disorder of
that window decides anew. GAQAT freezes the gradient of the task alone; there is no other one here, and a frozen scale
stays. A scale is each offset of learned_scales.py: of one end of a grid, for each channel that has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .restraints import stop


class OrderlyScales:
    """The restraint of scales whose disorder in the `window` iterations before was `below` a threshold."""

    def __init__(self, variables: Sequence[nn.Parameter], window: int, below: float) -> None:
        self._variables, self._window, self._below = variables, window, below
        self._done = torch.zeros((), dtype=torch.int64)
        self._signs, self._changes, self._pairs = (
            [torch.zeros_like(v, requires_grad=False) for v in variables] for _ in range(3)
        )
        self.frozen = [torch.zeros_like(v, dtype=torch.bool, requires_grad=False) for v in variables]

    @torch.no_grad()
    def restrain(self, optimizer: torch.optim.Optimizer, values: Mapping[str, torch.Tensor], share: float) -> None:
        """Count the changes of sign, and stop the frozen scales."""
        for k, variable in enumerate(self._variables):
            if variable.grad is None:  # of a row of tables that the batch did not use
                continue
            sign, before = variable.grad.sign(), self._signs[k]
            self._pairs[k] += (both := sign * before != 0)
            self._changes[k] += both & (sign != before)
            before.copy_(torch.where(sign != 0, sign, before))
            stop(optimizer, variable, self.frozen[k])
        self._done += 1
        if int(self._done) % self._window == 0:
            for frozen, changes, pairs in zip(self.frozen, self._changes, self._pairs, strict=True):
                frozen.copy_((pairs > 0) & (changes < self._below * pairs))
                changes.zero_()
                pairs.zero_()

    def memory(self) -> dict[str, torch.Tensor]:
        """Return the counts of this window, the signs, and what is frozen."""
        kinds = {"sign": self._signs, "changes": self._changes, "pairs": self._pairs, "frozen": self.frozen}
        found = {f"{kind}.{k}": tensor for kind, tensors in kinds.items() for k, tensor in enumerate(tensors)}
        return found | {"done": self._done}
