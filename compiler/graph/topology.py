"""Dependencies in a graph, by networkx: the values that depend on the timestep only, and their readers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from mezzotint.runtime.signature import Signature

from .nodes import is_constant, is_op, name_of


@dataclass(frozen=True, eq=False)
class TimeBranch:
    """The part of a denoiser that depends on the timestep alone.

    `values` depend on the contents of the timestep, and perhaps on the batch size, but on the contents of no other
    input. `frontier` are the values that nodes outside the branch read.
    """

    values: tuple[ir.Value, ...]
    frontier: tuple[ir.Value, ...]


def digraph(graph: ir.Graph) -> nx.DiGraph:
    """Return the values and nodes of a graph as a bipartite networkx graph (keys: `v:name` and `n:index`)."""
    g = nx.DiGraph()
    for i, node in enumerate(graph):
        g.add_node(f"n:{i}", node=node)
        for value in _read(node):
            g.add_edge(f"v:{name_of(value)}", f"n:{i}")
        for value in node.outputs:
            g.add_edge(f"n:{i}", f"v:{name_of(value)}")
    return g


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that a node reads: its inputs, and those that subgraphs of an If or Loop read from outside."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            yield from (v for n in inner.all_nodes() for v in n.inputs if v is not None)
            yield from inner.outputs


def _sizes_known(value: ir.Value) -> bool:
    """Return whether all sizes after the first dimension, which may be the batch, are known."""
    return value.shape is not None and all(isinstance(d, int) for d in list(value.shape)[1:])


def dependents(graph: ir.Graph, inputs: Iterable[str]) -> set[str]:
    """Return the names of these inputs and of all values that depend on their contents; sizes alone do not count."""
    g = digraph(graph)
    g.remove_nodes_from([key for key, data in g.nodes(data=True) if "node" in data and is_op(data["node"], "Shape")])
    keys = [f"v:{name}" for name in inputs if f"v:{name}" in g]
    found = {key for start in keys for key in (start, *nx.descendants(g, start))}
    return {key.removeprefix("v:") for key in found if key.startswith("v:")}


def on_the_way(graph: ir.Graph, values: Collection[str]) -> set[str]:
    """Return the first outputs of the nodes through which the contents of one of these values reach another.

    A node that computes one of the values is among them if another of the values reaches it.
    """
    g = digraph(graph)
    g.remove_nodes_from([key for key, data in g.nodes(data=True) if "node" in data and is_op(data["node"], "Shape")])
    keys = [f"v:{name}" for name in values if f"v:{name}" in g]
    g.add_edges_from(("start", key) for key in keys)
    g.add_edges_from((key, "end") for key in keys)
    behind = nx.descendants(g, "start") if keys else set()
    before = nx.ancestors(g, "end") if keys else set()
    return {name_of(g.nodes[key]["node"].outputs[0]) for key in behind & before if key.startswith("n:")}


def time_branch(graph: ir.Graph, signature: Signature) -> TimeBranch:
    """Return the branch that depends on the timestep alone, by taint analysis of the graph.

    A value belongs to the branch when the timestep reaches it and the *contents* of no other input do; a Shape node
    passes on sizes, not contents. A value whose height and width come from an open sample does not belong, because no
    table can hold it.
    """
    g = digraph(graph)
    timestep = f"v:{signature.timestep}"
    if timestep not in g:
        return TimeBranch((), ())
    # A Shape node passes on no contents: the values behind it are neither timely nor foreign.
    g.remove_nodes_from([key for key, data in g.nodes(data=True) if "node" in data and is_op(data["node"], "Shape")])
    others = [f"v:{name_of(v)}" for v in graph.inputs if name_of(v) != signature.timestep]
    foreign = set().union(*(nx.descendants(g, key) for key in others if key in g))
    timely = nx.descendants(g, timestep) - foreign
    values = [out for node in graph for out in node.outputs if f"v:{name_of(out)}" in timely and _sizes_known(out)]
    inside = set(values)
    frontier = [
        value
        for value in values
        if not is_constant(value)
        and (value.is_graph_output() or any(not inside.issuperset(use.node.outputs) for use in value.uses()))
    ]
    return TimeBranch(tuple(values), tuple(frontier))
