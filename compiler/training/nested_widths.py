"""Quantized weights whose integers at several widths are those of the widest, read to fewer bits.

Of a weight w and the scale s of its row the widest integer, of W bits, is q = clamp(round(w / s)). With b bits it is

    rounded   q_b = clamp(round(q / 2^(W - b)))     half to even
    cut       q_b = trunc(q / 2^(W - b))            the leading bits of the magnitude

within -(2^(b-1) - 1) .. 2^(b-1) - 1, in steps of s 2^(W - b). Matryoshka quantization (arXiv 2502.06786) and Double
Rounding (arXiv 2502.01199) both round a second time; all that is cut is nearer to 0. The loss is the mean of those of
all widths, weighted by their shares.

At the start s is the largest magnitude of a row over 2^(W-1) - 1, whatever width is written, and weights move in steps
of the width with the largest share (the middle one of several). So files of all widths come from the same training, and
the integers of one are those of another, rounded or cut. Only a row whose scale is raised to make room for its bias
(write_back.py) is an exception.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..core.formats import SMALLEST_SCALE
from ..errors import PassError
from ..graph.nodes import name_of, numpy_of
from ..rounding.layer_inputs import Inputs
from ..torch_graph.convert import TorchGraph
from ..torch_graph.quantizers import Quantizer

Nesting = Literal["none", "cut", "rounded"]
_ONE_WIDTH = "choose weights of one width, without levels, or set distill.nested to none"


@dataclass(frozen=True, eq=False)
class _Nested:
    """The quantizer at `path`, the width that it writes, and the weights that it rounds."""

    path: str
    part: Quantizer
    bits: int
    weights: list[torch.nn.Parameter]


class NestedWidths:
    """The nested widths of weights in a torch graph, and the share of each in the loss.

    The quantizers of the graph have the plan's widths; here they get the nested rounding and the scales of the start.
    Raise PassError for a weight without one width, or with more bits than the widest.
    """

    def __init__(
        self, graph: TorchGraph, quantized: Sequence[Inputs], way: Nesting, shares: Mapping[int, float]
    ) -> None:
        self.shares: Mapping[int | None, float] = dict(shares.items())
        self.widest = max(shares)
        loudest = sorted(width for width, share in shares.items() if share == max(shares.values()))
        self._unit = loudest[len(loudest) // 2]
        paths = {module: path for path, module in graph.module.named_modules()}
        members: dict[Quantizer, list[Inputs]] = defaultdict(list)
        for inputs in quantized:
            part = graph.quantizers[inputs.weight.quantize.name or ""]
            if not isinstance(part, Quantizer) or part.levels is not None or part.qmax.ndim:
                raise PassError("the weight has no grid of one width", where=inputs.weight.name, hint=_ONE_WIDTH)
            members[part].append(inputs)
        self._parts: list[_Nested] = []
        for part, own in members.items():
            bits = int(part.qmax).bit_length() + 1
            if bits > self.widest:
                wrong = f"the weight has {bits} bits, and the widest of the nested widths {self.widest}"
                raise PassError(wrong, where=own[0].weight.name, hint="add its width to distill.nested_widths")
            self._parts.append(_Nested(paths[part], part, bits, [graph.weights[name_of(i.weight.value)] for i in own]))
            with torch.no_grad():
                ends = [_largest(part, torch.tensor(numpy_of(i.floats), device=part.scale.device)) for i in own]
                widest = torch.stack(ends).amax(0) / _end(self.widest)
                part.nest(2.0 ** (self.widest - bits), cut=way == "cut")
                part.scale.copy_(widest.clamp_min(float(SMALLEST_SCALE)) * 2.0 ** (self.widest - bits))

    def step(self, part: Quantizer) -> float:
        """Return the step of the width that counts most, in those of the width that a quantizer writes."""
        bits = next(nested.bits for nested in self._parts if nested.part is part)
        return 2.0 ** (bits - self._unit)

    def at(self, width: int, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values that take the places of the module's own, with those of quantizers at this width."""
        found = dict(values)
        for nested in self._parts:
            path, part = nested.path, nested.part
            end = torch.full_like(part.qmax, _end(width))
            found[f"{path}.scale"] = values.get(f"{path}.scale", part.scale) * 2.0 ** (nested.bits - width)
            found |= {f"{path}.qmin": -end, f"{path}.qmax": end}
            found[f"{path}.finer"] = torch.full_like(part.qmax, 2.0 ** (self.widest - width))
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Round the weights in the module, whose other values are settled, to the widths that are written."""
        for nested in self._parts:
            for weight in nested.weights:
                weight.copy_(nested.part(weight))


def _end(width: int) -> int:
    return int((1 << (width - 1)) - 1)


def _largest(part: Quantizer, weight: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row, of the shape of the quantizer's scale."""
    return weight.abs().amax() if part.axis is None else weight.abs().movedim(part.axis, 0).flatten(1).amax(1)
