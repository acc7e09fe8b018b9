"""The weights of a float graph that can be pruned, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..bits.units import Unit, units_of
from ..core.islands import Islands
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of
from ..graph.ops import Layer, layers
from ..graph.require import shape_of
from ..rounding.gram import Unfold
from ..rounding.layer_inputs import FloatInputs
from .patterns import PruningPattern


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """A weight with the layers that read it; `channels` are the input channels of one group of a convolution."""

    unit: Unit
    inputs: FloatInputs
    channels: int

    @property
    def name(self) -> str:
        """The name of the first layer that reads the weight."""
        return self.unit.name

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.unit.size

    def shaped(self, rows: Floats) -> Floats:
        """Return values `[outputs, inputs of an output]` in the shape of the weight."""
        shape, axis = shape_of(self.inputs.floats).numpy(), self.inputs.axis
        turned = (shape[axis], *(n for i, n in enumerate(shape) if i != axis))
        return np.ascontiguousarray(np.moveaxis(rows.reshape(turned), 0, axis), dtype=np.float32)


def find_prunable(
    program: Program, islands: Sequence[str], pattern: PruningPattern, where: str
) -> tuple[list[PrunableWeight], dict[str, str]]:
    """Return (the weights that can be pruned, in the order of the graph, and why other layers stay dense)."""
    every_layer = list(layers(program.graph))
    kept = Islands(program, every_layer, tuple(islands), where)
    found: list[PrunableWeight] = []
    dense: dict[str, str] = {}
    for unit in units_of([layer for layer in every_layer if layer.weight is not None]):
        reasons = [reason for layer in unit.layers if (reason := kept.reason(layer)) is not None]
        reason = reasons[0] if reasons else _obstacle(unit)
        if reason is None:
            weight = _prunable(unit)
            if pattern.fits(weight.channels):
                found.append(weight)
                continue
            reason = f"{weight.channels} input channels are no multiple of {pattern.unit}"
        dense[unit.name] = reason
    return found, dense


def _obstacle(unit: Unit) -> str | None:
    """Return why a weight cannot be pruned at all, or None."""
    value = unit.require_weight()
    if {layer.node for layer in unit.layers} != {use.node for use in value.uses()} or value.is_graph_output():
        return "something that is no layer reads the weight too"
    if len({layer.weight_axis for layer in unit.layers}) > 1:
        return "layers read the weight along different axes"
    try:
        if len({_unfold(layer).groups for layer in unit.layers}) > 1:
            return "convolutions of different groups read the weight"
    except PassError as error:
        return error.what
    return None


def _unfold(layer: Layer) -> Unfold:
    return Unfold.of(layer.node, shape_of(layer.weight).numpy())


def _prunable(unit: Unit) -> PrunableWeight:
    layer = unit.layers[0]
    value, axis = layer.require_weight(), layer.require_weight_axis()
    shape = shape_of(value).numpy()
    taps = tuple(name_of(each.activations[0]) for each in unit.layers)
    inputs = FloatInputs(value, axis, taps, tuple(map(_unfold, unit.layers)), unit.size // int(shape[axis]))
    channels = int(shape[1]) if layer.kind == "conv" else inputs.inputs
    return PrunableWeight(unit, inputs, channels)
