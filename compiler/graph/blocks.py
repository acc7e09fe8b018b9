"""The blocks of a graph: the units that are trained one after the other (BRECQ; Li et al., 2021).

A block is a residual block or a transformer block, and each layer outside of these is a block of its own.

1. By modules, from the names of nodes (compiler/graph/scopes.py): a module whose own code has a residual Add
   (compiler/graph/residuals.py), and that contains no other such module.
2. By dominators, where names show no module: the nodes between the Add and the node that dominates it, on the paths of
   the sample. The attention and the feed-forward layers of a transformer block are two blocks then. Layers that depend
   on the timestep or a condition only belong to the block that alone reads them.

A pair of QuantizeLinear and DequantizeLinear belongs to the block that reads it first. That of a convolution's output
belongs to the convolution, whose integer kernel contains it. Nodes without a layer may be in no block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from .nodes import consumers, is_op, name_of
from .residuals import LAYER_WEIGHTS, NodeGraph, is_pair
from .scopes import SEPARATOR

_CONVOLUTIONS = ("Conv", "ConvTranspose", "QLinearConv", "ConvInteger")


@dataclass(frozen=True, eq=False)
class Block:
    """Some nodes of a graph, in executable order.

    layers      the names of its Conv, Gemm and MatMul nodes (and of their integer forms)
    inputs      the values that it reads from outside, without initializers
    activations those of them that depend on the contents of the sample
    outputs     the values that nodes outside read, and outputs of the graph
    parameters  the number of elements of its layers' constant weights and biases
    """

    name: str
    nodes: tuple[ir.Node, ...]
    layers: tuple[str, ...]
    inputs: tuple[ir.Value, ...]
    activations: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    parameters: int


def find_blocks(model: ir.Model, sample: str | None = None) -> list[Block]:
    """Return the blocks of a graph, float or with quantizers, in an order in which they can be executed.

    Each layer that reads an activation is in exactly one block. `sample` is the name of the sample's input; when left
    out, it is the first input with as many dimensions as the first output. Raises PassError for an unknown name.
    """
    owners = _Owners(NodeGraph(model.graph, sample))
    for name, members in owners.net.modules():
        owners.own(name, members)
    for members in owners.net.regions(owners.owner):
        owners.own("", members)
    owners.own_the_rest()
    return owners.blocks()


class _Owners:
    """The block that owns each node, by index."""

    def __init__(self, net: NodeGraph) -> None:
        self.net, self.nodes, self.flow, self.layers = net, net.nodes, net.flow, net.layers
        self.owner: dict[int, int] = {}
        self.names: list[str] = []

    def own(self, name: str, members: Iterable[int]) -> None:
        """Give nodes that have no owner to a new block. An empty name is that of its layers."""
        self.owner |= {i: len(self.names) for i in members if i not in self.owner}
        self.names.append(name)

    def own_the_rest(self) -> None:
        """Give each layer and each quantizer an owner, and take blocks apart that no order can execute."""
        self._own_conditioning()
        self._own_layers()
        while ring := next((part for part in nx.strongly_connected_components(self._order()) if len(part) > 1), None):
            inside = [part for part in ring if part[0] == "b"]
            if len(inside) == 1:  # nodes between two parts of a block belong to it
                self.owner |= {i: inside[0][1] for kind, i in ring if kind == "n"}
            else:
                blocks = {block for _, block in inside}
                self.owner = {i: block for i, block in self.owner.items() if block not in blocks}
                self._own_layers()
        self._own_quantizers()

    def _own_quantizers(self) -> None:
        """Give quantizers, and nodes that do not depend on the sample, to blocks that read them."""
        ranks = {part[1]: rank for rank, part in enumerate(self._sorted()) if part[0] == "b"}
        before = [self.net.source(node.inputs[0]) if node.inputs else -2 for node in self.nodes]
        for i in reversed(range(len(self.nodes))):
            if i in self.owner or (not is_pair(self.nodes[i]) and i in self.net.sampled):
                continue
            readers = {self.owner[j] for j in self.flow.successors(i) if j in self.owner}
            whole = all(j in self.owner for j in self.flow.successors(i))
            if before[i] in self.layers and self.nodes[before[i]].op_type in _CONVOLUTIONS and is_pair(self.nodes[i]):
                self.owner[i] = self.owner[before[i]]
            elif readers and (is_pair(self.nodes[i]) or (whole and len(readers) == 1)):
                self.owner[i] = min(readers, key=lambda block: ranks[block])
        for i, node in enumerate(self.nodes):  # a convolution's Clip and DequantizeLinear follow its QuantizeLinear
            if is_pair(node) and before[i] in self.owner and not is_op(node, "QuantizeLinear"):
                self.owner[i] = self.owner[before[i]]

    def _own_layers(self) -> None:
        """Make each layer without an owner a block, with the Add of its constant bias."""
        for i in sorted(self.layers - self.owner.keys()):
            add = self._bias_add(i)
            self.own(_layer_name(self.nodes[i]), [i] if add is None else [i, add[0]])

    def _bias_add(self, layer: int) -> tuple[int, ir.Value] | None:
        """Return the Add behind a layer that adds a constant, and the constant, or None."""
        out = self.nodes[layer].outputs[0]
        readers = consumers(out)
        if len(readers) != 1 or not is_op(readers[0], "Add"):
            return None
        other = next((v for v in readers[0].inputs if v is not None and v is not out), None)
        return None if other is None or self.net.is_fed(other) else (self.net.index[readers[0]], other)

    def _own_conditioning(self) -> None:
        """Give the layers that only one region reads, and that do not depend on the sample, to that region."""
        behind: dict[int, set[int | None]] = {}  # the blocks that read a node; None is anything else
        for i in reversed(range(len(self.nodes))):
            found: set[int | None] = {None} if any(out.is_graph_output() for out in self.nodes[i].outputs) else set()
            behind[i] = found.union(*(behind[j] for j in self.flow.successors(i)))
            if i in self.owner:
                behind[i] = {self.owner[i]}
            elif i in self.layers:
                (block, *others) = behind[i] or {None}
                if not others and block is not None and not self.names[block] and i not in self.net.sampled:
                    self.owner[i] = block
                behind[i] = {None}  # nor does the time embedding belong to the only block that reads it

    def _order(self) -> nx.DiGraph:
        """Return the graph of the blocks `("b", block)` and of the nodes in none `("n", index)`."""
        part = [("b", self.owner[i]) if i in self.owner else ("n", i) for i in range(len(self.nodes))]
        order = nx.DiGraph()
        order.add_nodes_from(part)
        order.add_edges_from((part[i], part[j]) for i, j in self.flow.edges if part[i] != part[j])
        return order

    def _sorted(self) -> list[tuple[str, int]]:
        first: dict[tuple[str, int], int] = {}
        for i in range(len(self.nodes)):
            first.setdefault(("b", self.owner[i]) if i in self.owner else ("n", i), i)
        return list(nx.lexicographical_topological_sort(self._order(), key=lambda part: first[part]))

    def blocks(self) -> list[Block]:
        """Return the blocks in order."""
        members: dict[int, list[int]] = defaultdict(list)
        for i in sorted(self.owner):
            members[self.owner[i]].append(i)
        order = [block for kind, block in self._sorted() if kind == "b"]
        return [self._block(self.names[block], members[block]) for block in order if self.layers & {*members[block]}]

    def _block(self, name: str, members: list[int]) -> Block:
        inside = set(members)
        nodes = tuple(self.nodes[i] for i in members)
        layers = tuple(_layer_name(self.nodes[i]) for i in members if i in self.layers)
        read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
        inputs = tuple(v for v in read if v.const_value is None and self.net.source(v) not in inside)
        sampled = {-1, *self.net.sampled}
        activations = tuple(
            v
            for v in inputs
            if self.net.source(v) in sampled
            and not is_op(v.producer(), "Shape")
            and any(not is_op(u.node, "Shape") for u in v.uses() if u.node in nodes)
        )
        outputs = tuple(
            v
            for node in nodes
            for v in node.outputs
            if v.is_graph_output() or any(j not in inside for j in self.net.readers.get(name_of(v), ()))
        )
        parameters = sum(self._parameters(i) for i in members if i in self.layers)
        return Block((name or _span(layers)).strip(SEPARATOR), nodes, layers, inputs, activations, outputs, parameters)

    def _parameters(self, layer: int) -> int:
        """Return the number of elements of a layer's constant weight and bias."""
        node = self.nodes[layer]
        values = [node.inputs[k] for k in LAYER_WEIGHTS[node.op_type] if k < len(node.inputs)]
        add = self._bias_add(layer)
        values += [] if add is None else [add[1]]
        return sum(_elements(v) for v in values if v is not None and not self.net.is_fed(v))


def _layer_name(node: ir.Node) -> str:
    """Return the name that `Layer.name` of compiler/graph/ops.py has."""
    return node.name or name_of(node.outputs[0])


def _span(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} .. {layers[-1]}"


def _elements(value: ir.Value) -> int:
    """Return the number of elements of a constant, from its own shape or from that of the constant it is made of."""
    while value.shape is None or not all(isinstance(size, int) for size in value.shape):
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return 0
        value = node.inputs[0]
    return math.prod(int(size) for size in value.shape if isinstance(size, int))
