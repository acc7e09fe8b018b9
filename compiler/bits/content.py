"""The layers that decide the content of an image, as MixDQ (arXiv 2405.17873) groups them.

MixDQ scores two groups apart: cross-attention and feed-forward layers, which decide the content of the image, and all
others (convolutions, self-attention, projections in and out of a block), which decide its quality. Its code tells them
by their names (attn2, ff); here the graph does:

- Cross-attention: a product of attention weights (behind a Softmax) and values, where the keys or the values come from
  a condition and not from the sample. Its layers are both products, the projections of queries, keys and values, and
  the one behind it.
- Feed-forward: two linear layers with an activation function between them and no norm, on the way of the sample.
  Layers of the time embedding and of an adaptive norm's table, which the sample does not reach, are none.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ..core.program import Program
from ..graph.nodes import consumers, is_constant, is_op, name_of
from ..graph.ops import Layer, layers
from ..graph.topology import dependents

ACTIVATIONS = (
    *("Gelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish", "Softplus", "QuickGelu", "Clip"),
    *("Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu"),
)
_NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization")


def content_layers(program: Program) -> frozenset[str]:
    """Return the names of the layers that decide the content of the image."""
    reader = _Reader(program)
    return frozenset(layer.name for layer in (*reader.cross_attention(), *reader.feed_forward()))


class _Reader:
    """What the layers of one graph read and feed, up to the next layers."""

    def __init__(self, program: Program) -> None:
        graph = program.graph
        every_layer = list(layers(graph))
        self._linear = [layer for layer in every_layer if layer.kind == "linear"]
        self._attention = [layer for layer in every_layer if layer.kind == "attention"]
        self._made_by = {v: layer for layer in every_layer for v in (layer.node.outputs[0], layer.output)}
        self._at = {node: layer for layer in every_layer for node in (layer.node, layer.bias_add) if node is not None}
        signature = program.signature
        self._from_sample = dependents(graph, [signature.sample])
        self._from_condition = dependents(graph, signature.conditions)
        self._normed = set(self._behind_norms(graph))

    def cross_attention(self) -> Iterator[Layer]:
        """Yield the layers of every attention whose keys or values come from a condition."""
        for mix in self._attention:
            for weights, values in (mix.activations, mix.activations[::-1]):
                softmax, scores = self._weights(weights)
                if not softmax or not scores:
                    continue
                inner = [v for layer in scores for v in layer.activations]
                projections = [layer for v in (*inner, values) for layer in self._above(v)]
                if any(self._of_condition(layer) for layer in projections):
                    yield from (mix, *scores, *projections, *self._below(mix.output))

    def feed_forward(self) -> Iterator[Layer]:
        """Yield both layers of every pair with an activation function in between."""
        for second in self._linear:
            if name_of(second.activations[0]) not in self._from_sample:
                continue
            for first in self._activated(second.activations[0]):
                if name_of(first.activations[0]) in self._from_sample:
                    yield from (first, second)

    def _of_condition(self, layer: Layer) -> bool:
        read = name_of(layer.activations[0])
        return layer.kind == "linear" and read in self._from_condition and read not in self._from_sample

    def _weights(self, value: ir.Value) -> tuple[bool, list[Layer]]:
        """Return (whether a Softmax made a value, the products of activations that it was made from)."""
        seen, found = self._up(value)
        return any(is_op(v.producer(), "Softmax") for v in seen), [x for x in found if x.kind == "attention"]

    def _above(self, value: ir.Value) -> list[Layer]:
        return [layer for layer in self._up(value)[1] if layer.kind != "attention"]

    def _up(self, value: ir.Value) -> tuple[list[ir.Value], list[Layer]]:
        """Return the values that a value is computed from, up to layers, and those layers."""
        seen: dict[ir.Value, None] = {}
        found: dict[Layer, None] = {}
        waiting = [value]
        while waiting:
            current = waiting.pop()
            if current in seen or not _holds_data(current):
                continue
            seen[current] = None
            if current in self._made_by:
                found[self._made_by[current]] = None
            elif (node := current.producer()) is not None:
                waiting.extend(v for v in node.inputs if v is not None)
        return list(seen), list(found)

    def _below(self, value: ir.Value) -> Iterator[Layer]:
        """Yield the layers that read a value, with no addition of another one on the way."""
        waiting = [value]
        while waiting:
            for node in consumers(waiting.pop()):
                if node in self._at:
                    yield self._at[node]
                elif not (is_op(node, "Add", "Sum") and sum(_holds_data(v) for v in node.inputs if v is not None) > 1):
                    waiting.extend(node.outputs)

    def _activated(self, value: ir.Value) -> Iterator[Layer]:
        """Yield the linear layers that a value is computed from through an activation function and no norm."""
        seen: set[tuple[ir.Value, bool]] = set()
        waiting = [(value, False)]
        while waiting:
            current, active = waiting.pop()
            if (current, active) in seen or not _holds_data(current) or current in self._normed:
                continue
            seen.add((current, active))
            layer = self._made_by.get(current)
            if layer is not None:
                if active and layer.kind == "linear":
                    yield layer
            elif (node := current.producer()) is not None:
                active = active or is_op(node, *ACTIVATIONS)
                waiting.extend((v, active) for v in node.inputs if v is not None)

    def _behind_norms(self, graph: ir.Graph) -> Iterator[ir.Value]:
        """Yield the values that depend on statistics of an activation, up to the next layers."""
        starts = [n for n in graph if is_op(n, *_NORMS) or (n.op_type.startswith("Reduce") and n not in self._at)]
        seen: set[ir.Node] = set()
        waiting = list(starts)
        while waiting:
            node = waiting.pop()
            if node in seen or node in self._at:
                continue
            seen.add(node)
            yield from node.outputs
            waiting.extend(reader for out in node.outputs for reader in consumers(out))


def _holds_data(value: ir.Value) -> bool:
    """Return whether a value is an activation, and no constant or size."""
    return not is_constant(value) and (value.dtype is None or value.dtype.is_floating_point())
