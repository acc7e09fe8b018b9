"""Neighbouring units that are reconstructed as one: where something ties them most, or in windows that overlap.

MRECG (arXiv 2303.11906) observes that the error of reconstruction swings up where a unit has far less capacity than the
one before it, and that units which are reconstructed together do not swing. The capacity of a unit is the bits of its
quantized weights, and a pair of neighbours is tied by the difference of its capacities. Q-VLM ties it by the entropy of
activations (compiler/training/unit_entropies.py).

CBQ (arXiv 2312.07950) reconstructs windows of neighbours that overlap: each starts at the rounding that the one before
it left, and a unit is trained with those in front of it and with those behind it.

What lies on the way from one of the units to the next, such as an activation function or the concatenation of a
shortcut, belongs to the joined unit: otherwise the second would not read what the first computes in the fit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


def joined_units(
    units: Sequence[GraphUnit], ties: Sequence[float], pairs: int, graph: ir.Graph, most: int = 0
) -> list[GraphUnit]:
    """Return the units in their order, with the `pairs` of neighbours joined that are tied most.

    Units of two chosen pairs become one of three. Where `most` is not 0, a pair that would make one of more than `most`
    units is passed over. Raise RecipeError where there are fewer pairs.
    """
    chosen: set[int] = set()
    for i in sorted(range(len(ties)), key=lambda i: (-ties[i], i)):
        if len(chosen) < pairs and (not most or _length(chosen, i) <= most):
            chosen.add(i)
    if pairs > len(chosen):
        bound = f" with at most {most} units in one" if most else ""
        raise RecipeError(
            f"{pairs} pairs of neighbouring units are to be joined, and there are {len(chosen)}{bound}",
            where="reconstruct.joined",
            hint=f"set reconstruct.joined to {len(chosen)} or less",
        )
    parts: list[list[GraphUnit]] = []
    for i, unit in enumerate(units):
        if i - 1 in chosen:
            parts[-1].append(unit)
        else:
            parts.append([unit])
    return [united(part, graph) for part in parts]


def windows_of(units: Sequence[GraphUnit], size: int, graph: ir.Graph) -> list[GraphUnit]:
    """Return all runs of `size` neighbours, one for each place to begin; one of all units where there are fewer."""
    count = max(len(units) - size + 1, min(len(units), 1))
    return [united(units[i : i + size], graph) for i in range(count)]


def _length(chosen: Collection[int], pair: int) -> int:
    """Return how many units the one would have that a pair is in, if it were chosen too."""
    first, last = pair, pair
    while first - 1 in chosen:
        first -= 1
    while last + 1 in chosen:
        last += 1
    return last - first + 2


def united(units: Sequence[GraphUnit], graph: ir.Graph) -> GraphUnit:
    """Return these units of a graph as one, with what lies on the way between them."""
    if len(units) == 1:
        return units[0]
    computed = frozenset[str]().union(*(unit.computed for unit in units))
    return GraphUnit(" + ".join(unit.name for unit in units), computed | on_the_way(graph, computed))
