"""Weights that move while a network is trained, as functions of trainable offsets that are 0 at the start.

A quantized weight moves in steps of its grid, so one learning rate fits all layers. Its quantizer rounds what it moves
to, with a straight-through gradient:

    all         w = w_0 + s d               d: an offset for each element
    adapters    w = w_0 + s (B A)           rank r: A is random, B is 0 (EfficientDM's QALoRA, arXiv 2310.03270)

s is the scale that the weight has at the start (of a codebook, times the mean distance of its levels); a step of its
size is what EfficientDM calls scale-aware. The start w_0 is the float weight, moved into the cell of the integer that
the graph has, CELL of a step around it: behind round_weights the rounding is that of GPTQ, and the elements that GPTQ
rounded the other way are near their boundary. With nested widths (nested_widths.py) it is the float weight itself, and
s the scale of the width that counts most.

With a share `critical` below 1, only so many rows (output channels) of each quantized weight move, those of the largest
mean magnitude (EfQAT, arXiv 2411.11038). The others keep their integers.

Weights that are not quantized (biases, rows of tables of biases, factors and offsets of norms) move by shares of their
root mean square: w = w_0 + rms d. They cost nothing at run time. Weights of layers that stay in float do not move.
Nothing of the offsets is left behind the training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of, numpy_of
from ..graph.ops import layers
from ..rounding.layer_inputs import Inputs
from ..torch_graph.convert import TorchGraph
from ..torch_graph.quantizers import Quantizer
from .nested_widths import NestedWidths

CELL = 0.45
SMALLEST_RMS = 1e-3
"""Of the root mean squares of float weights: one that is 0 moves too."""

Moving = Literal["all", "adapters", "none"]


@dataclass(frozen=True, eq=False)
class MovingWeight:
    """One parameter of the module at `path`: w_0, the unit of its offset, and its quantizer or None."""

    path: str
    parameter: nn.Parameter
    start: torch.Tensor
    unit: torch.Tensor
    offsets: tuple[nn.Parameter, ...]
    quantizer: Quantizer | None = None

    def value(self) -> torch.Tensor:
        if len(self.offsets) == 1:
            return self.start + self.unit * self.offsets[0]
        left, right = self.offsets
        return self.start + self.unit * (left @ right).reshape(self.start.shape)


class MovingWeights:
    """The weights of a torch graph that move; `values` are the tensors that take their places.

    `quantized` are those that quantizers round.
    """

    def __init__(
        self,
        program: Program,
        graph: TorchGraph,
        quantized: Sequence[Inputs],
        *,
        moving: Moving,
        floats: bool,
        rank: int,
        rng: np.random.Generator,
        critical: float = 1.0,
        nested: NestedWidths | None = None,
    ) -> None:
        paths = {id(parameter): path for path, parameter in graph.module.named_parameters()}
        self._critical, self._nested = critical, nested
        self.quantized = [] if moving == "none" else [self._of(graph, i, paths, moving, rank, rng) for i in quantized]
        self._floats = list(_float_weights(program, graph, paths)) if floats else []

    def values(self) -> dict[str, torch.Tensor]:
        """Return the moved weights by the paths of the module's parameters."""
        return {weight.path: weight.value() for weight in (*self.quantized, *self._floats)}

    def parameter_groups(self, steps: float, shares: float) -> list[dict[str, Any]]:
        """Return what an optimizer trains: quantized weights move by `steps`, the others by `shares`, an iteration."""
        both = ((self.quantized, steps), (self._floats, shares))
        return [{"params": [o for w in weights for o in w.offsets], "lr": rate} for weights, rate in both if weights]

    @torch.no_grad()
    def settle(self) -> dict[str, npt.NDArray[Any]]:
        """Write the moved weights into the module; return them by the names of its parameters."""
        for weight in (*self.quantized, *self._floats):
            weight.parameter.copy_(weight.value())
        return {w.path: w.parameter.detach().cpu().numpy() for w in (*self.quantized, *self._floats)}

    def _of(
        self,
        graph: TorchGraph,
        inputs: Inputs,
        paths: Mapping[int, str],
        moving: Moving,
        rank: int,
        rng: np.random.Generator,
    ) -> MovingWeight:
        weight = inputs.weight
        quantizer, parameter = graph.quantizers[weight.quantize.name or ""], graph.weights.get(name_of(weight.value))
        if not isinstance(quantizer, Quantizer) or parameter is None:
            raise PassError("the weight has no quantizer that can be trained", where=weight.name)
        with torch.no_grad():
            floats = torch.tensor(numpy_of(inputs.floats), dtype=parameter.dtype, device=parameter.device)
            scale, zero, _, _ = quantizer.parameters_for(parameter)
            integers = quantizer.integers(parameter) - zero
            v = floats / scale
            _, gap = quantizer.around(v, zero, integers)
            start = torch.clamp(v, integers - CELL * gap, integers + CELL * gap) * scale
            step = quantizer.mean_gap(start.ndim)
            if self._nested is not None:
                start, step = floats, step * self._nested.step(quantizer)
            unit = (scale * step).detach().expand_as(start)
            if self._critical < 1:
                unit = unit * _critical_rows(floats, weight.axis, self._critical)
        shape = (start.shape[0], start[0].numel())
        offsets: tuple[nn.Parameter, ...] = (nn.Parameter(torch.zeros_like(start)),)
        if moving == "adapters":
            r = min(rank, *shape)
            right = rng.standard_normal((r, shape[1]), dtype=np.float32) / np.float32(np.sqrt(r))
            factors = torch.zeros(shape[0], r), torch.from_numpy(right)
            offsets = tuple(nn.Parameter(factor.to(start.device)) for factor in factors)
        return MovingWeight(paths[id(parameter)], parameter, start, unit, offsets, quantizer)


def _critical_rows(floats: torch.Tensor, axis: int, share: float) -> torch.Tensor:
    """Return 1 for the share of the rows with the largest mean magnitude, 0 for the others, to multiply a weight."""
    rows = floats.movedim(axis, 0).flatten(1).abs().mean(dim=1)
    mask = torch.zeros_like(rows)
    mask[torch.topk(rows, max(1, round(share * len(rows)))).indices] = 1
    return mask.reshape([-1 if d == axis % floats.ndim else 1 for d in range(floats.ndim)])


def _float_weights(program: Program, graph: TorchGraph, paths: Mapping[int, str]) -> list[MovingWeight]:
    """Return the weights that no quantizer rounds and that no layer multiplies with."""
    fixed = _multiplied(program)
    found = []
    for name, parameter in graph.weights.items():
        if name in fixed or id(parameter) not in paths:
            continue
        start = parameter.detach().clone()
        rms = start.square().mean().sqrt().clamp_min(SMALLEST_RMS)
        offsets = (nn.Parameter(torch.zeros_like(start)),)
        found.append(MovingWeight(paths[id(parameter)], parameter, start, rms, offsets))
    return found


def _multiplied(program: Program) -> Collection[str]:
    """Return the names of the constants that are quantized or that are the weight of a layer."""
    quantized = {name_of(node.inputs[0]) for node in program.graph if node.op_type == "QuantizeLinear"}
    return quantized | {name_of(layer.weight) for layer in layers(program.graph) if layer.weight is not None}
