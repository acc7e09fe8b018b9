"""A part of a graph as a model of its own: it reads what enters the part, and the timestep."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mezzotint.runtime.signature import Signature

from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import consumers, is_op, name_of, remove_dead
from ..graph.ops import MOVERS, layers
from ..graph.topology import dependents
from ..lowering.qdq import dequantizer, quantizer_chain
from .units import GraphUnit


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A part of a graph, as a model.

    inputs   names of the values that enter the part; the timestep is an input of the model too if the part has tables
    outputs  names of the values that leave it, behind the quantizer of a convolution's output
    targets  for each output the value that it stands for in the float graph
    inner    names of what layers inside compute, where it does not leave the part, and what each is in the float graph
    floats   names of what enters the part behind other nodes, and what each is in the float graph
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    targets: tuple[str, ...]
    inner: tuple[tuple[str, str], ...] = ()
    floats: tuple[tuple[str, str], ...] = ()


def cut_out_unit(program: Program, unit: GraphUnit) -> Subgraph:
    """Return a unit of a program behind insert_qdq, with what its layers compute in the float graph."""
    float_graph = program.require_float_model().graph
    floats = {name_of(v) for node in float_graph for v in node.outputs}
    of_layers = {name_of(layer.output) for layer in layers(float_graph) if layer.weight is not None}
    return cut_out(program.model, unit.computed, program.signature, floats, unit.name, of_layers)


def cut_out(
    model: ir.Model,
    computed: Collection[str],
    signature: Signature,
    floats: Collection[str],
    where: str,
    of_layers: Collection[str] = (),
) -> Subgraph:
    """Return the nodes of a quantized graph that compute these values, with the quantizers of what they read.

    Nodes are named by their first outputs, because nodes of an ONNX file may have no names. What depends on the
    timestep alone is computed inside the part, and leaves it only if nothing else does. `floats` are the names of the
    values of the float graph, and `of_layers` those that its layers compute. Raise PassError if nothing leaves the
    part.
    """
    clone = model.clone()
    graph = clone.graph
    time = [v for v in graph.inputs if v.name == signature.timestep]
    data = dependents(graph, [name_of(v) for v in graph.inputs if v not in time])
    chosen = _with_output_quantizers([n for n in graph if name_of(n.outputs[0]) in computed])
    inside = dict.fromkeys([*chosen, *_input_quantizers(chosen)])
    computed_here = [v for n in chosen for v in n.outputs if not _is_read_in(v, chosen)]
    sampled = [v for v in computed_here if name_of(v) in data]
    ends = [v for v in sampled or computed_here if _is_read_outside(v, inside)]
    if not ends:
        raise PassError("nothing leaves this part of the graph", where=where)
    entering = _entering(inside, data)
    outputs = tuple(name_of(v) for v in ends)
    targets = tuple(_in_float(v, floats, where) for v in ends)
    inner = _behind_layers(chosen, of_layers, ends)
    names = tuple(name_of(v) for v in entering)
    reals = [v for v in entering if v.producer() and v.dtype is not None and v.dtype.is_floating_point()]
    known = tuple((name_of(v), name) for v in reals if (name := _float_name(v, floats)))
    for value in entering:
        if value not in graph.inputs:
            replacement = ir.Value(name=name_of(value), shape=value.shape, type=value.type)
            value.name = f"{value.name}_outside"
            value.replace_all_uses_with(replacement)
            graph.inputs.append(replacement)
    graph.outputs[:] = ends
    remove_dead(graph)
    kept = {*names, signature.timestep}
    graph.inputs[:] = [v for v in graph.inputs if v.name in kept and (v.name != signature.timestep or v.uses())]
    return Subgraph(clone, names, outputs, targets, inner, known)


def _behind_layers(
    nodes: Collection[ir.Node], of_layers: Collection[str], ends: Collection[ir.Value]
) -> tuple[tuple[str, str], ...]:
    """Return what layers compute, behind a quantizer that alone reads it, and its name in the float graph.

    Where the integers are moved, it is what the quantizer reads: the moved value has another shape.
    """
    found = []
    for value in (v for node in nodes for v in node.outputs if v.name in of_layers):
        readers = consumers(value)
        quantized = len(readers) == 1 and is_op(readers[0], "QuantizeLinear")
        chain = _until_dequantized(readers[0]) if quantized else []
        moved = any(is_op(node, *MOVERS) for node in chain)
        last = chain[-1].outputs[0] if chain and not moved else value
        if last not in ends:
            found.append((name_of(last), name_of(value)))
    return tuple(found)


def _entering(inside: Collection[ir.Node], data: Collection[str]) -> list[ir.Value]:
    """Return the values that nodes read from outside, where contents or sizes of them matter.

    What is computed from sizes and from the timestep alone is computed in the part too. The value whose size is read
    enters it then, and not all that computes this value.
    """
    found: dict[ir.Value, None] = {}
    needed, seen = list(inside), set(inside)
    while needed:
        for value in needed.pop().inputs:
            producer = None if value is None else value.producer()
            if value is None or producer in seen:
                continue
            if name_of(value) in data:
                found[value] = None
            elif producer is not None:
                seen.add(producer)
                needed.append(producer)
    return list(found)


def _input_quantizers(nodes: Collection[ir.Node]) -> list[ir.Node]:
    """Return the nodes of the quantizers whose values these nodes read."""
    return [n for node in nodes for value in node.inputs if dequantizer(value) for n in quantizer_chain(value)]


def _with_output_quantizers(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes, and the quantizers that are the only readers of what they compute."""
    inside = dict.fromkeys(nodes)
    for node in nodes:
        for value in node.outputs:
            readers = consumers(value)
            if len(readers) == 1 and is_op(readers[0], "QuantizeLinear"):
                inside.update(dict.fromkeys(_until_dequantized(readers[0])))
    return list(inside)


def _until_dequantized(node: ir.Node) -> list[ir.Node]:
    """Return a node and what clips, moves and dequantizes its integers."""
    if is_op(node, "DequantizeLinear"):
        return [node]
    out = node.outputs[0]
    readers = [n for n in consumers(out) if n.inputs[0] is out and is_op(n, "Clip", "DequantizeLinear", *MOVERS)]
    return [node, *(n for reader in readers for n in _until_dequantized(reader))]


def _is_read_in(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Return whether a value is the quantized form of one that these nodes do not compute: they share the quantizer."""
    chain = quantizer_chain(value)
    source = chain[-1].inputs[0] if chain else None
    return bool(chain) and (source is None or source.producer() not in nodes)


def _is_read_outside(value: ir.Value, inside: Collection[ir.Node]) -> bool:
    """Return whether other nodes read the contents of a value; sizes do not count."""
    readers = [reader for reader in consumers(value) if not is_op(reader, "Shape", "Size")]
    return value.is_graph_output() or any(reader not in inside for reader in readers)


def _in_float(value: ir.Value, floats: Collection[str], where: str) -> str:
    """Return the name of the float value that this one stands for. Raise PassError if there is none."""
    name = _float_name(value, floats)
    if name is None:
        raise PassError(f"the float graph has no value {name_of(value)!r}", where=where)
    return name


def _float_name(value: ir.Value, floats: Collection[str]) -> str | None:
    """Return the name of the float value that this one stands for: itself, or what its quantizer rounds.

    Where integers are moved (clean_qdq), the mover's output has the name that it has in the float graph.
    """
    chain = quantizer_chain(value) if dequantizer(value) else ()
    names = (name_of(value), *(name_of(node.inputs[0]) for node in chain))
    return next((name for name in names if name in floats), None)
