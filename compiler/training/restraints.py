"""What keeps some variables of a fit where they are, for an iteration or longer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class Restraint(Protocol):
    """A rule that looks at the gradients of each iteration, before the optimizer takes its step."""

    def restrain(self, optimizer: torch.optim.Optimizer, values: Mapping[str, torch.Tensor], share: float) -> None:
        """Stop variables, when a `share` of the fit is done; `values` are those in the places of the module's own."""

    def memory(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the rule needs when a stopped fit goes on; they are written in place."""


@torch.no_grad()
def stop(optimizer: torch.optim.Optimizer, variable: torch.nn.Parameter, where: torch.Tensor) -> None:
    """Leave the elements `where` (bool, the variable's shape) as they are in the next step of Adam.

    Adam moves a variable without a gradient by its mean of earlier ones, so that is 0 from now on, too.
    """
    remembered = optimizer.state.get(variable, {})
    for tensor in (variable.grad, remembered.get("exp_avg")):
        if tensor is not None:
            tensor.masked_fill_(where, 0.0)
