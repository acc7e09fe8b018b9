"""Residual blocks in a graph of nodes: by the modules in the names of nodes, and by dominators.

A *residual Add* sums a value and what layers made of the same value: its operands have an ancestor in common, and
different numbers of layers behind it. The sum with a time embedding has no ancestor in common, and the sum of the
pieces of a split layer (split_shortcuts) is a Sum. Those pieces count as readers of the concatenation, as the whole
layer was: the parts come from far apart, and the block between them would be the network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import networkx as nx
import onnx_ir as ir

from ..errors import PassError
from .nodes import is_op, name_of
from .scopes import CONSTANTS_SCOPE, SEPARATOR, TABLES_SCOPE, scope_of
from .topology import digraph

MOST_IN_BLOCK = 32  # of a block; what is larger is a network around a global shortcut

LAYER_WEIGHTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1, 2)),
    **dict.fromkeys(("MatMul", "MatMulInteger", "ConvInteger", "MatMulNBits"), (0, 1)),
    "MatMulIntegerToFloat": (1, 6),
    "QLinearConv": (3, 8),
    "QLinearMatMul": (3,),
    "QGemm": (3, 6),
}
"""The operations of layers, and those of their inputs that may hold constant weights and biases."""

_PAIR = ("QuantizeLinear", "DequantizeLinear", "Clip")


def plain_value(value: ir.Value) -> ir.Value:
    """Return the value in front of the quantizers of a value: the one that the float graph has too."""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None and is_pair(node):
        value = node.inputs[0]
        node = value.producer()
    return value


def is_pair(node: ir.Node) -> bool:
    """Return whether a node is a QuantizeLinear, a DequantizeLinear, or the Clip of integers between them."""
    if not is_op(node, *_PAIR):
        return False
    return node.op_type != "Clip" or (node.inputs[0] is not None and is_op(node.inputs[0].producer(), _PAIR[0]))


class NodeGraph:
    """The nodes of a graph, by index, and the edges between them.

    fed      the nodes that depend on the contents of an input
    sampled  those that depend on the contents of the sample
    layers   the nodes of layers that read an activation
    """

    def __init__(self, graph: ir.Graph, sample: str | None) -> None:
        self.graph, self.nodes = graph, list(graph)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        both = digraph(graph)
        self.flow = nx.DiGraph()  # from node to node
        self.flow.add_nodes_from(range(len(self.nodes)))
        self.readers = {key[2:]: [int(n[2:]) for n in both.successors(key)] for key in both if key.startswith("v:")}
        for i, node in enumerate(self.nodes):
            self.flow.add_edges_from((i, j) for out in node.outputs for j in self.readers.get(name_of(out), ()))
        self.contents = self.flow.copy()  # without Shape nodes, which pass on sizes only
        self.contents.remove_edges_from([(i, j) for i, j in self.flow.edges if is_op(self.nodes[i], "Shape")])
        self.fed = self._behind([name_of(v) for v in graph.inputs if v.const_value is None])
        self.sample = self._sample(sample)
        self.sampled = self._behind([self.sample])
        self.layers = {i for i in self.fed if self.nodes[i].op_type in LAYER_WEIGHTS}
        self.pieces = self._pieces()

    def _pieces(self) -> dict[int, int]:
        """Return the Concat of each piece of a layer that split_shortcuts took apart, where the graph has it."""
        found: dict[int, int] = {}
        concats = [i for i in sorted(self.fed) if is_op(self.nodes[i], "Concat")]
        joined = {tuple(plain_value(v) for v in self.nodes[i].inputs if v is not None): i for i in concats}
        for node in self.nodes:
            pieces = [self._layer_of(v) for v in node.inputs if v is not None] if is_op(node, "Sum") else []
            known = [i for i in pieces if i is not None]
            read = tuple(plain_value(v) for i in known if (v := self.nodes[i].inputs[0]) is not None)
            if len(known) == len(pieces) and read in joined:
                found |= dict.fromkeys(known, joined[read])
        return found

    def _layer_of(self, value: ir.Value) -> int | None:
        """Return the layer that computes a value, with quantizers and the Add of a bias behind it or not."""
        node = plain_value(value).producer()
        if is_op(node, "Add") and node is not None:
            fed = [v for v in node.inputs if v is not None and self.is_fed(v)]
            node = plain_value(fed[0]).producer() if fed else None
        return self.index[node] if node is not None and self.index[node] in self.layers else None

    def _sample(self, name: str | None) -> str:
        inputs = [v for v in self.graph.inputs if v.const_value is None]
        if name is None:
            rank = len(self.graph.outputs[0].shape or ()) if self.graph.outputs else 0
            name = next((name_of(v) for v in inputs if len(v.shape or ()) == rank), None)
            return name if name is not None else name_of(inputs[0]) if inputs else ""
        if name not in {v.name for v in inputs}:
            raise PassError(f"the graph has no input {name!r}", hint="name the input of the noisy sample")
        return name

    def _behind(self, names: Iterable[str]) -> set[int]:
        """Return the nodes that depend on the contents of these inputs."""
        start = {i for name in names for i in self.readers.get(name, ()) if not is_op(self.nodes[i], "Shape")}
        return start.union(*(nx.descendants(self.contents, i) for i in start))

    def modules(self) -> list[tuple[str, list[int]]]:
        """Return the modules that are blocks: (path, nodes)."""
        scopes = [scope_of(node).strip(SEPARATOR) for node in self.nodes]
        members: dict[str, list[int]] = defaultdict(list)
        for i, scope in enumerate(scopes):
            parts = scope.split(SEPARATOR)
            if parts[0] not in ("", TABLES_SCOPE, CONSTANTS_SCOPE) and not is_pair(self.nodes[i]):
                for depth in range(len(parts)):
                    members[SEPARATOR.join(parts[: depth + 1])].append(i)
        found = {scopes[i] for i in self._sums() if scopes[i] in members and self._is_residual(i, members[scopes[i]])}
        inner = [scope for scope in found if not any(other.startswith(scope + SEPARATOR) for other in found)]
        return [(scope, members[scope]) for scope in sorted(inner, key=lambda scope: members[scope][0])]

    def regions(self, owned: Iterable[int]) -> list[list[int]]:
        """Return the nodes between a fork of the sample's paths and a residual Add that overlap no owned node.

        Of the Adds behind one fork the last counts, unless another block lies in between.
        """
        root, taken = -1, set(owned)
        graph = self.contents.subgraph(self.sampled).copy()
        graph.add_edges_from((root, i) for i in self.readers.get(self.sample, ()) if i in self.sampled)
        for piece, concat in self.pieces.items():
            graph.remove_edges_from(list(graph.in_edges(piece)))
            graph.add_edge(concat, piece)
        if root not in graph:
            return []
        parent = nx.immediate_dominators(graph, root)
        found: list[tuple[int, set[int]]] = []
        for i in self._sums():
            fork = parent.get(i)
            if fork is None or any(self.source(v) not in graph for v in self.nodes[i].inputs if v is not None):
                continue
            region = (nx.descendants(graph, fork) & nx.ancestors(graph, i)) | {i}
            if self._is_residual(i, sorted(region)):
                found.append((fork, region))
        chosen: list[set[int]] = []
        for fork, region in sorted(found, key=lambda item: (len(item[1]), min(item[1]))):
            inside = [other for f, other in found if f != fork and other < region]
            if not inside and not region & taken:
                others = [other for other in chosen if not other < region]
                if not any(other & region for other in others):
                    chosen = [*others, region]
        return [sorted(region) for region in sorted(chosen, key=min)]

    def _sums(self) -> list[int]:
        return [i for i in sorted(self.sampled) if is_op(self.nodes[i], "Add") and len(self.nodes[i].inputs) == 2]

    def source(self, value: ir.Value | None) -> int:
        """Return the node that computes a value; -1 for the sample itself, -2 for other inputs and constants."""
        node = None if value is None else value.producer()
        return self.index[node] if node is not None else -1 if value is not None and value.name == self.sample else -2

    def _is_residual(self, add: int, members: Sequence[int]) -> bool:
        """Return whether an Add sums a value and what layers among `members` made of the same value."""
        inside = set(members)
        if not 2 <= len(inside & self.layers) <= MOST_IN_BLOCK:
            return False
        depth: dict[int, int] = {}
        sources: dict[int, frozenset[str]] = {}

        def of(value: ir.Value) -> tuple[int, frozenset[str]]:
            """Return the number of layers in front of a value, and the values from outside that it depends on."""
            if is_op(value.producer(), "Shape") or not self.is_fed(value):
                return 0, frozenset()
            for same in (value, plain_value(value)):
                i = self.source(same)
                if i in depth:
                    return depth[i], sources[i]
            return 0, frozenset({name_of(plain_value(value))})

        for i in members:
            if i in self.fed and i < add:
                read = self.nodes[self.pieces[i]].outputs if i in self.pieces else self.nodes[i].inputs
                ancestors = [of(v) for v in read if v is not None]
                depth[i] = max((n for n, _ in ancestors), default=0) + (i in self.layers)
                sources[i] = frozenset().union(*(names for _, names in ancestors))
        (first, a), (second, b) = (of(v) for v in self.nodes[add].inputs if v is not None)
        return first != second and bool(a & b)

    def is_fed(self, value: ir.Value) -> bool:
        """Return whether a value depends on the contents of an input of the graph."""
        node = value.producer()
        return value.const_value is None if node is None else self.index[node] in self.fed
