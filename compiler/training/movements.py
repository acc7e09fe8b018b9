"""All that moves while a unit or the whole network is trained: weights, and the scales of quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import torch

from mezzotint.runtime.signature import Timestep

from .fading_branches import FadingBranches
from .learned_levels import LearnedLevels
from .learned_scales import LearnedScales
from .moving_weights import MovingWeights
from .nested_widths import NestedWidths
from .restraints import Restraint
from .steady_weights import StatisticalScales

Moved = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rates:
    """How far an iteration moves each kind at first.

    weight_steps  quantized weights, and the branches that are added to them, in steps of their grids
    float_shares  other weights, in shares of their size
    scale_shares  the ends of grids, in shares of their size
    level_steps   levels of codebooks, in their mean distances
    """

    weight_steps: float
    float_shares: float
    scale_shares: float
    level_steps: float = 0.0


class Movements:
    """Weights, scales, levels and branches that move, and what an optimizer trains of them, in `groups` with rates.

    `row_of` are the rows of tables by timestep, `statistics` the scales of weights that follow them, and `restraints`
    keep variables where they are. `widths` are those of the loss with their shares; None is the width that is written.
    """

    def __init__(
        self,
        weights: MovingWeights | None,
        scales: LearnedScales | None,
        rates: Rates,
        row_of: Mapping[Timestep, int] = MappingProxyType({}),
        levels: LearnedLevels | None = None,
        branches: FadingBranches | None = None,
        statistics: StatisticalScales | None = None,
        restraints: Sequence[Restraint] = (),
        nested: NestedWidths | None = None,
    ) -> None:
        self._weights, self._scales, self._row_of, self._levels = weights, scales, row_of, levels
        self._branches, self._statistics, self._restraints = branches, statistics, restraints
        self._nested = nested
        one: dict[int | None, float] = {None: 1.0}
        self.widths = one if nested is None else nested.shares
        moving = [] if weights is None else weights.parameter_groups(rates.weight_steps, rates.float_shares)
        learned = [] if scales is None else scales.parameter_groups(rates.scale_shares)
        tables = [] if levels is None else levels.parameter_groups(rates.level_steps)
        added = [] if branches is None else branches.parameter_groups(rates.weight_steps)
        self.groups: list[dict[str, Any]] = [*moving, *learned, *tables, *added]
        self.variables = [v for group in self.groups for v in group["params"]]

    def at(self, t: Timestep | None, weights: Moved | None = None, width: int | None = None) -> dict[str, torch.Tensor]:
        """Return what takes the places of the module's parameters in a call; `weights` may be computed already.

        Without a timestep it leaves out the tables. `width` is one of `widths`.
        """
        values = dict(self.weights() if weights is None else weights)
        if self._scales is not None:
            values |= self._scales.of_row(None if t is None else self._row_of.get(t))
        return values if self._nested is None or width is None else self._nested.at(width, values)

    def weights(self, share: float = 1.0) -> dict[str, torch.Tensor]:
        """Return the moved weights and levels, which all calls of one step share.

        `share` is how much of the fit is done; at 1 they are what is written, without branches.
        """
        weights = {} if self._weights is None else self._weights.values()
        weights |= {} if self._statistics is None else self._statistics.values(weights)
        weights |= {} if self._levels is None else self._levels.values()
        return weights if self._branches is None else weights | self._branches.values(share)

    def restrain(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        """Stop variables before a step of the optimizer, with a `share` of the fit done."""
        values = self.at(None) if self._restraints else {}
        for restraint in self._restraints:
            restraint.restrain(optimizer, values, share)

    def memory(self) -> dict[str, torch.Tensor]:
        """Return what restraints need when a stopped fit goes on, by the number of each and its name of it."""
        each = enumerate(restraint.memory() for restraint in self._restraints)
        return {f"{k}.{name}": tensor for k, tensors in each for name, tensor in tensors.items()}

    def settle(self) -> dict[str, npt.NDArray[Any]]:
        """Write everything into the module; return what was written by the names of its parameters, without levels."""
        if self._levels is not None:
            self._levels.settle()
        if self._statistics is not None and self._weights is not None:
            self._statistics.settle(self._weights.values())
        weights = {} if self._weights is None else self._weights.settle()
        weights |= {} if self._scales is None else self._scales.settle()
        if self._nested is not None:
            self._nested.settle()
        return weights
