"""Neighbouring units that are reconstructed as one, where something ties them most.

MRECG (arXiv 2303.11906) observes that the error of reconstruction swings up where a unit has far less capacity than the
one before it, and that units which are reconstructed together do not swing. The capacity of a unit is the bits of its
quantized weights, and a pair of neighbours is tied by the difference of its capacities.

What lies on the way from one of the units to the next, such as an activation function or the concatenation of a
shortcut, belongs to the joined unit: otherwise the second would not read what the first computes in the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from ..core.program import Program
from ..errors import RecipeError
from ..graph.nodes import name_of
from ..graph.ops import layers
from ..graph.topology import on_the_way
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


def ties_by_capacity(units: Sequence[GraphUnit], program: Program) -> list[float]:
    """Return the difference of capacities of each pair of neighbours."""
    return [abs(a - b) for a, b in pairwise(capacity_of(unit, program) for unit in units)]


def joined_units(units: Sequence[GraphUnit], ties: Sequence[float], pairs: int, graph: ir.Graph) -> list[GraphUnit]:
    """Return the units in their order, with the `pairs` of neighbours joined that are tied most.

    Units of two chosen pairs become one of three. Raise RecipeError where there are fewer neighbours.
    """
    if pairs > len(ties):
        raise RecipeError(
            f"{pairs} pairs of neighbouring units are to be joined, and there are {len(ties)}",
            where="reconstruct.joined",
            hint=f"set reconstruct.joined to {len(ties)} or less",
        )
    chosen = sorted(range(len(ties)), key=lambda i: (-ties[i], i))[:pairs]
    parts: list[list[GraphUnit]] = []
    for i, unit in enumerate(units):
        if i - 1 in chosen:
            parts[-1].append(unit)
        else:
            parts.append([unit])
    return [united(part, graph) for part in parts]


def united(units: Sequence[GraphUnit], graph: ir.Graph) -> GraphUnit:
    """Return these units of a graph as one, with what lies on the way between them."""
    if len(units) == 1:
        return units[0]
    computed = frozenset[str]().union(*(unit.computed for unit in units))
    return GraphUnit(" + ".join(unit.name for unit in units), computed | on_the_way(graph, computed))
