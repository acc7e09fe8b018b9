"""Which layer of OpenVINO's compiled graph runs which node of the file.

1. By name: a layer has the names of the nodes that it runs, with suffixes of OpenVINO.
2. By the nodes behind: OpenVINO gives a product the name of the sum, or of the quantizer, that it computes with it.
   From that node the search goes up in the file's graph, to the nearest product that no other layer runs.
3. A `Subgraph` is a kernel of several operations; it runs each product that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from ..graph.nodes import is_op, name_of
from .groups import MATRICES, WRITTEN
from .openvino_built import INTEGER_TYPES, PRODUCT_LAYERS, CompiledLayer

_SUFFIX = re.compile(r"(_original|/WithoutBiases|/Dequantization\w+|/transpose_[ab])$")
_CONVOLUTIONS = ("Conv", "ConvTranspose", "QLinearConv", "ConvInteger")


class LayerMatch:
    """The layers of a file's products: `of(node)` is a layer, or None. `strays` run no product of the file."""

    def __init__(self, file: ir.Graph, layers: Iterable[CompiledLayer]) -> None:
        nodes = list(file.all_nodes())
        self._named = {name_of(out): node for node in nodes for out in node.outputs}
        self._named |= {node.name: node for node in nodes if node.name}
        self._runs: dict[ir.Node, CompiledLayer] = {}
        left = []
        for layer in layers:
            if layer.layer == "Subgraph":
                for node in filter(_is_product, self._nodes(layer)):
                    self._runs.setdefault(node, layer)
            elif layer.layer in PRODUCT_LAYERS and not self._claim(self._nodes(layer), layer):
                left.append(layer)
        self.strays = tuple(layer for layer in left if not self._claim(self._above(layer), layer))

    def of(self, node: ir.Node) -> CompiledLayer | None:
        return self._runs.get(node)

    def _claim(self, nodes: Iterable[ir.Node], layer: CompiledLayer) -> bool:
        node = next((node for node in nodes if _may_run(layer, node) and node not in self._runs), None)
        if node is not None:
            self._runs[node] = layer
        return node is not None

    def _nodes(self, layer: CompiledLayer) -> Iterator[ir.Node]:
        """Yield the nodes that a layer names."""
        for name in layer.names:
            node = self._named.get(name)
            while node is None and name != (shorter := _SUFFIX.sub("", name)):
                name = shorter
                node = self._named.get(name)
            if node is not None:
                yield node

    def _above(self, layer: CompiledLayer) -> Iterator[ir.Node]:
        """Yield the nearest products that the nodes a layer names are computed from."""
        todo, seen = list(self._nodes(layer)), set[ir.Node]()
        while todo:
            node = todo.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if _is_product(node):
                yield node
            else:
                todo += [maker for v in node.inputs if v is not None and (maker := v.producer()) is not None]


def runs_on_integers(layer: CompiledLayer, node: ir.Node) -> bool:
    """Return whether a layer multiplies the integers that a node of the file reads.

    A Subgraph shows the types of its own inputs only. All are 8-bit, or OpenVINO has moved the factors of this product
    behind it, for which it names a new node.
    """
    if layer.layer != "Subgraph":
        return layer.integer
    name = node.name or name_of(node.outputs[0])
    moved = (f"{name}_original", f"{name}/Dequantization")
    return all(kind in INTEGER_TYPES for kind in layer.inputs) or any(n.startswith(moved) for n in layer.names)


def _is_product(node: ir.Node) -> bool:
    return is_op(node, *MATRICES) or node.op_type in WRITTEN


def _may_run(layer: CompiledLayer, node: ir.Node) -> bool:
    if layer.layer in ("Convolution", "Deconvolution"):
        return node.op_type in _CONVOLUTIONS
    return _is_product(node) and node.op_type not in _CONVOLUTIONS
