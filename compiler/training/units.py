"""The parts of a quantized graph that are trained one after the other, and which of them each quantizer belongs to.

A unit is a layer, a block (compiler/graph/blocks.py) or the whole network. Its error is measured at its outputs, behind
the quantizer of a convolution's output. So a quantizer belongs

- to the unit that computes the value in front of it, where only the quantizer reads this (a convolution's output),
- else to the unit that reads its values, where it is the only one.

Quantizers that share their constants belong to a unit together or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ..core.program import Program
from ..graph.blocks import find_blocks
from ..graph.nodes import consumers, is_constant, is_op, name_of
from ..graph.ops import MOVERS, layers
from ..graph.topology import time_branch
from ..rounding.weights import find_weights, layer_name

Through = Literal["layer", "block", "network"]
NETWORK = "the network"
TIME = "the time branch"


@dataclass(frozen=True)
class GraphUnit:
    """A part that is trained as one: `computed` are the names of the first outputs of its nodes."""

    name: str
    computed: frozenset[str]


@dataclass(frozen=True)
class UnitToTrain(GraphUnit):
    """A unit with what is trained in it, as plain values: a graph behind other trained units has the same names.

    `weights` are the names of quantized weights, `quantizers` those of QuantizeLinear nodes whose scales are learned.
    `timely` says that all of it depends on the timestep alone: its data are all deployed timesteps, and a step of its
    fit takes several of them.
    """

    weights: tuple[str, ...] = ()
    quantizers: tuple[str, ...] = ()
    timely: bool = False

    def __str__(self) -> str:
        return self.name


def find_units(program: Program, through: Through) -> list[GraphUnit]:
    """Return the layers with weights, the blocks, or the whole network, in the order of the graph."""
    if through == "network":
        return [GraphUnit(NETWORK, frozenset(name_of(node.outputs[0]) for node in program.graph))]
    if through == "block":
        blocks = find_blocks(program.model, program.signature.sample)
        return [GraphUnit(block.name, frozenset(name_of(node.outputs[0]) for node in block.nodes)) for block in blocks]
    floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
    units = []
    for weight in find_weights(program.graph):
        computed = [name_of(node.outputs[0]) for node in weight.readers]
        known = [floats[name] for node in weight.readers if (name := layer_name(node)) in floats]
        units.append(GraphUnit(weight.name, frozenset([*computed, *(name_of(layer.output) for layer in known)])))
    return units


def time_unit(program: Program) -> GraphUnit | None:
    """Return all that depends on the timestep alone as a unit, or None where nothing does."""
    values = time_branch(program.graph, program.signature).values
    return GraphUnit(TIME, frozenset(map(name_of, values))) if values else None


def quantizers_of_units(
    graph: ir.Graph, units: Sequence[GraphUnit], *, weights: bool, activations: bool
) -> tuple[dict[str, list[str]], int]:
    """Return the names of the QuantizeLinear nodes of each unit, by its name, and the number that belong to none.

    Where units overlap, the last one that computes a value counts.
    """
    unit_of = {name: unit.name for unit in units for name in unit.computed}
    chosen = [
        node
        for node in graph
        if is_op(node, "QuantizeLinear") and (weights if is_constant(node.inputs[0]) else activations)
    ]
    together: dict[tuple[ir.Value | None, ...], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if is_op(node, "QuantizeLinear"):
            together[tuple(node.inputs[1:])].append(node)
    found: dict[str, list[str]] = defaultdict(list)
    left = 0
    for node in chosen:
        owners = {_owner(other, unit_of) for other in together[tuple(node.inputs[1:])]}
        owner = owners.pop() if len(owners) == 1 else None
        if owner is None or not node.name:
            left += 1
        else:
            found[owner].append(node.name)
    return dict(found), left


def _owner(quantize: ir.Node, unit_of: Mapping[str, str]) -> str | None:
    """Return the name of the unit that a quantizer belongs to, or None."""
    value = quantize.inputs[0]
    maker = None if value is None else value.producer()
    if value is not None and maker is not None and len(consumers(value)) == 1:
        unit = unit_of.get(name_of(maker.outputs[0]))
        if unit is not None and is_op(maker, "Conv"):
            return unit
    owners = {unit_of.get(name_of(node.outputs[0])) for node in _readers(quantize)}
    return owners.pop() if len(owners) == 1 else None


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes that read the dequantized values, without those that read their sizes."""
    for reader in consumers(node.outputs[0]):
        if is_op(reader, "DequantizeLinear"):
            yield from (r for r in consumers(reader.outputs[0]) if not is_op(r, "Shape", "Size"))
        elif is_op(reader, "Clip", *MOVERS):
            yield from _readers(reader) if reader.inputs[0] is node.outputs[0] else ()
        elif not is_op(reader, "Shape", "Size"):
            yield reader
