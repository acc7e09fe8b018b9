"""The grids of some quantizers as functions of trainable offsets, which are 0 at the start.

A grid of the integers qmin .. qmax has u = z - qmin steps below 0 and v = qmax - z above. Offsets a and b move its two
ends by factors, in units that are the same for a scale of 1e-4 and one of 10:

    r = (u e^a + v e^b) / (u + v)        s' = s r        z' = qmin + u e^a / r

so that -low = u s becomes u s e^a, and high = v s becomes v s e^b. With a = b = 0 both are s and z exactly. A grid that
keeps its zero point (a weight's, or one of a table that has one for all rows) has one offset, s' = s e^a.

The rows of a table that batches use have offsets that they share, and each row has some of its own: a row alone sees
few batches. The other rows stay as they are. As a network of the timestep (TDQ, arXiv 2306.02316) the offsets of all
rows of a quantizer are

    (a, b)(t) = log softplus(W4 relu(W3 relu(W2 relu(W1 PE(t) + b1) + b2) + b3) + b4),   W4 = 0, b4 = softplus^-1(1)

at the start: s(t) = s_0(t) softplus(network(t)), where s_0 is the table that step_scales has fitted. All channels of a
table by channel have one network.

A weight that is on its grid already (rounded against its inputs) keeps its integers q, and s' q has the gradient q.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from ..errors import PassError
from ..torch_graph.convert import HOST, TorchGraph
from ..torch_graph.quantizers import Quantizer
from .range_networks import RangeNetworks

RowNetworks = Callable[[int], RangeNetworks]
NETWORK_SHARE = 1 / 16
"""Of the learning rate: a step of all weights of a network moves its output by some tens of a single weight's step."""


@dataclass(frozen=True, eq=False)
class LearnedGrid:
    """One quantizer module, the weight that it keeps on its integers (or None), and whether its zero point is learned.

    `path` and `weight_path` are the names of the module and of the weight's parameter in the torch module.
    """

    part: Quantizer
    path: str
    two_ends: bool
    weight_path: str | None = None
    weight: nn.Parameter | None = None

    @property
    def ends(self) -> int:
        return 2 if self.two_ends else 1

    @property
    def channels(self) -> int:
        return self.part.scale.shape[-1] if self.part.axis is not None else 1


class LearnedScales:
    """The offsets of grids: one vector for the static ones, and for each row of the tables one, or networks of them.

    `seen` are the rows of the tables that batches use. `networks` makes the networks of so many quantizers.
    """

    def __init__(
        self, grids: Sequence[LearnedGrid], rows: int, seen: Collection[int], networks: RowNetworks | None = None
    ) -> None:
        self.static = [grid for grid in grids if not grid.part.rows]
        self.timed = [grid for grid in grids if grid.part.rows]
        for grid in self.timed:
            if grid.part.scale.shape[0] != rows:
                raise PassError(
                    f"a table has {grid.part.scale.shape[0]} rows, and the plan {rows}",
                    where=grid.path,
                    hint="put the pass behind insert_qdq, with nothing in between that groups the calls anew",
                )
        self.rows, self.seen = rows, frozenset(seen)
        self._device = grids[0].part.scale.device if grids else HOST
        self.offsets = self._zeros(self.static)
        self.networks = networks(len(self.timed)).to(self._device) if networks is not None and self.timed else None
        by_row = self.timed if self.networks is None else []
        self.shared = self._zeros(by_row)
        self.row_offsets = [self._zeros(by_row) for _ in range(rows if by_row else 0)]
        self._integers = {
            grid.path: grid.part.integers(grid.weight)  # a weight's zero point is 0
            for grid in self.static
            if grid.weight is not None
        }

    def _zeros(self, grids: Sequence[LearnedGrid]) -> nn.Parameter:
        return nn.Parameter(torch.zeros(sum(grid.ends * grid.channels for grid in grids), device=self._device))

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return what an optimizer trains, with learning rates. Of the rows only that of a batch has a gradient."""
        groups: list[dict[str, Any]] = [{"params": [self.offsets, self.shared, *self.row_offsets], "lr": learning_rate}]
        if self.networks is not None:
            groups.append({"params": list(self.networks.parameters()), "lr": learning_rate * NETWORK_SHARE})
        return groups

    def of_row(self, row: int | None) -> dict[str, torch.Tensor]:
        """Return the tensors that take the place of the module's parameters in a call of this row, by their names."""
        found: dict[str, torch.Tensor] = {}
        for grid, offsets in _parts(self.static, self.offsets):
            scale, zero = moved(grid.part, grid.part.scale.detach(), grid.part.zero_point.detach(), offsets)
            found |= {f"{grid.path}.scale": scale, f"{grid.path}.zero_point": zero}
            if grid.weight_path is not None:
                shape = [1] * self._integers[grid.path].ndim
                if grid.part.axis is not None:
                    shape[grid.part.axis % len(shape)] = -1
                found[grid.weight_path] = self._integers[grid.path] * scale.reshape(shape)
        if row is None or not self.timed:
            return found
        index = torch.tensor([row], device=self._device)
        for grid, offsets in self._of_tables(row):
            scales, zeros = grid.part.scale.detach(), grid.part.zero_point.detach()
            scale, zero = moved(grid.part, scales[row], zeros[row], offsets)
            found[f"{grid.path}.scale"] = scales.index_copy(0, index, scale[None])
            found[f"{grid.path}.zero_point"] = zeros.index_copy(0, index, zero[None])
        return found

    def _of_tables(self, row: int) -> list[tuple[LearnedGrid, torch.Tensor]]:
        """Return the offsets of one row of each table, `[ends, channels]`."""
        if self.networks is None:
            offsets = self.row_offsets[row]
            return _parts(self.timed, self.shared + offsets if row in self.seen else offsets)
        factors = self.networks()[:, row]
        return [
            (grid, ends[2 - grid.ends :, None].expand(grid.ends, grid.channels))
            for grid, ends in zip(self.timed, factors, strict=True)
        ]

    @torch.no_grad()
    def settle(self) -> dict[str, npt.NDArray[Any]]:
        """Write what was learned into the modules: scales, whole zero points, and the weights that keep integers.

        Return it by the names of the module's parameters.
        """
        rows: Sequence[int | None] = range(self.rows) if self.timed else (None,)
        tables: dict[str, list[torch.Tensor]] = {}
        last: Mapping[str, torch.Tensor] = {}
        for row in rows:
            last = self.of_row(row)
            for grid in self.timed:
                for name in (f"{grid.path}.scale", f"{grid.path}.zero_point"):
                    tables.setdefault(name, []).append(last[name][row])
        settled: dict[str, torch.Tensor] = {}
        for grid in (*self.static, *self.timed):
            for name, parameter in (("scale", grid.part.scale), ("zero_point", grid.part.zero_point)):
                key = f"{grid.path}.{name}"
                parameter.copy_(torch.stack(tables[key]) if grid.part.rows else last[key])
            grid.part.scale.copy_(grid.part.scales())
            grid.part.zero_point.copy_(grid.part.zero_points())
            settled |= {f"{grid.path}.scale": grid.part.scale, f"{grid.path}.zero_point": grid.part.zero_point}
            if grid.weight is not None and grid.weight_path is not None:
                grid.weight.copy_(last[grid.weight_path])
                settled[grid.weight_path] = grid.weight
        return {name: tensor.detach().cpu().numpy() for name, tensor in settled.items()}


def moved(
    part: Quantizer, scale: torch.Tensor, zero: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point, both `[]` or `[C]`, with offsets `[1 or 2 ends, C]`."""
    factors = torch.exp(offsets).reshape(len(offsets), *scale.shape)
    if len(offsets) == 1:
        return scale * factors[0], zero
    below, above = zero - part.qmin, part.qmax - zero
    ratio = (below * factors[0] + above * factors[1]) / (below + above)
    return scale * ratio, part.qmin + below * factors[0] / ratio


def learned_grids(
    graph: TorchGraph, names: Sequence[str], weights: Mapping[str, str], zero_points: bool
) -> list[LearnedGrid]:
    """Return the grids of the quantizers of these names; nodes that share a module are one.

    `weights` are the names of the constants that are on their grids already, by their quantizers. With `zero_points`
    the zero points of unsigned grids are learned too.
    """
    paths = {id(module): path for path, module in graph.module.named_modules()}
    parameters = {id(parameter): path for path, parameter in graph.module.named_parameters()}
    found: dict[Quantizer, LearnedGrid] = {}
    for name in names:
        part = graph.quantizers.get(name)
        if not isinstance(part, Quantizer) or part in found:
            continue
        two_ends = zero_points and part.qmin.ndim == 0 and float(part.qmin) >= 0
        weight = graph.weights.get(weights.get(name, ""))
        path = None if weight is None else parameters[id(weight)]
        found[part] = LearnedGrid(part, paths[id(part)], two_ends, path, weight)
    return list(found.values())


def _parts(grids: Sequence[LearnedGrid], offsets: torch.Tensor) -> list[tuple[LearnedGrid, torch.Tensor]]:
    """Return each grid with its part of a vector of offsets, `[ends, channels]`."""
    parts = torch.split(offsets, [grid.ends * grid.channels for grid in grids]) if grids else ()
    return [(grid, part.reshape(grid.ends, grid.channels)) for grid, part in zip(grids, parts, strict=True)]
