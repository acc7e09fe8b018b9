"""Neighbouring units that are reconstructed as one, where their capacities differ most.

MRECG (arXiv 2303.11906) observes that the error of reconstruction swings up where a unit has far less capacity than the
one before it, and that units which are reconstructed together do not swing. The capacity of a unit is the bits of its
quantized weights, and of all pairs of neighbours those with the largest squared differences are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..core.program import Program
from ..errors import RecipeError
from ..graph.nodes import name_of
from ..graph.ops import layers
from ..rounding.layer_inputs import Inputs
from ..rounding.weights import find_weights
from .units import GraphUnit


def capacity_of(unit: GraphUnit, program: Program) -> float:
    """Return the bits of the quantized weights whose readers are all in a unit; rows may have different widths."""
    plan = program.require_plan()
    floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
    total = 0.0
    for weight in find_weights(program.graph):
        if {name_of(node.outputs[0]) for node in weight.readers} <= unit.computed:
            quantizer = plan.of(Inputs.of(weight, floats, "reconstruct").float_weights[0], weight.name)
            widths: float = weight.format.bits if quantizer is None else quantizer.bits
            if quantizer is not None and quantizer.row_bits is not None:
                widths = float(np.mean(quantizer.row_bits))
            total += weight.rows().size * widths
    return total


def joined_by_capacity(units: Sequence[GraphUnit], capacities: Sequence[float], pairs: int) -> list[GraphUnit]:
    """Return the units in their order, with the `pairs` of neighbours joined whose capacities differ most.

    Units of two chosen pairs become one of three. Raise RecipeError where there are fewer neighbours.
    """
    if pairs > max(len(units) - 1, 0):
        most = max(len(units) - 1, 0)
        raise RecipeError(
            f"{pairs} pairs of neighbouring units are to be joined, and there are {most}",
            where="reconstruct.joined",
            hint=f"set reconstruct.joined to {most} or less",
        )
    differences = [abs(a - b) for a, b in pairwise(capacities)]
    chosen = set(sorted(range(len(differences)), key=lambda i: (-differences[i], i))[:pairs])
    found: list[GraphUnit] = []
    for i, unit in enumerate(units):
        if i - 1 in chosen:
            before = found.pop()
            unit = GraphUnit(f"{before.name} + {unit.name}", before.computed | unit.computed)
        found.append(unit)
    return found
