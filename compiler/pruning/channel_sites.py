"""Channels between two layers that can be removed from the graph: the places, found by the graph and not by names.

A layer makes C channels. Through operations that keep channels apart they reach layers that read them, and no others:

    layer(W1, b1) -> activation functions, factors, additions -> layers(W2)

Removing channels drops rows of W1 and b1, the entries of constants on the way, and columns of W2. Norms mix channels,
so nothing is removed across them; a concatenation, a Split or a Reshape ends the search too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.nodes import consumers, is_constant, is_op, name_of, numpy_of
from ..graph.ops import Layer
from ..graph.require import shape_of

UNARY = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Softplus", "Elu"),
    *("Selu", "Celu", "Abs", "Neg", "Exp", "Sqrt", "Identity", "Clip", "Swish"),
)
BINARY = ("Mul", "Add", "Sub", "Div", "Pow")
MAKING = "the layer that makes them"


@dataclass(eq=False)
class ChannelSite:
    """The layer that makes the channels, those that read them from `value`, and constants with their channels' axis."""

    maker: Layer
    channels: int
    axis: int
    readers: list[Layer] = field(default_factory=list)
    constants: dict[ir.Value, int] = field(default_factory=dict)
    path: list[ir.Value] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the layer that makes the channels."""
        return self.maker.name

    @property
    def value(self) -> ir.Value:
        """What the readers read."""
        return self.readers[0].activations[0]

    def remove(self, kept: npt.NDArray[np.int64]) -> dict[ir.Value, npt.NDArray[np.float32]]:
        """Set the shapes on the way to the channels that are kept, and return the constants that get smaller."""
        for value in self.path:
            if value.shape is not None:
                sizes = list(value.shape)
                sizes[self.axis % len(sizes)] = len(kept)
                value.shape = ir.Shape(sizes)
        return {value: np.take(numpy_of(value), kept, axis) for value, axis in self.constants.items()}


def input_axis(layer: Layer) -> int:
    """Return the axis of a weight's input channels."""
    return 1 - layer.require_weight_axis()


def channel_site(maker: Layer, by_node: dict[ir.Node, Layer]) -> ChannelSite | str:
    """Return the site behind a layer with a weight, or why its channels stay."""
    if maker.kind == "conv" and _groups(maker) > 1:
        return f"{MAKING} has groups"
    weight, axis = maker.require_weight(), maker.require_weight_axis()
    channels = int(shape_of(weight).numpy()[axis])
    site = ChannelSite(maker, channels, 1 if maker.kind == "conv" else -1)
    site.constants[weight] = axis
    if maker.bias is not None:
        if not is_constant(maker.bias):
            return "its bias depends on the timestep"
        site.constants[maker.bias] = 0
    allowed = {maker.node} | ({maker.bias_add} if maker.bias_add is not None else set())
    site.path = list(dict.fromkeys([maker.node.outputs[0], maker.output]))
    for value in site.path:  # grows
        if value.is_graph_output():
            return "they are an output of the graph"
        for node in consumers(value):
            if node in allowed:
                continue
            reason = _follow(site, node, value, by_node)
            if reason is not None:
                return reason
            allowed.add(node)
    if not site.readers or any(reader.activations[0] is not site.value for reader in site.readers):
        return "no layer reads them" if not site.readers else "layers read them in different places"
    outside = [n for n in allowed - {maker.node} for v in n.inputs if v is not None and not _known(site, n, v)]
    if outside:
        return f"{outside[0].op_type} brings in other channels"
    for constant in (*site.constants, *(reader.require_weight() for reader in site.readers)):
        if any(use.node not in allowed for use in constant.uses()) or constant.is_graph_output():
            return f"something else reads {name_of(constant)}"
    return site


def _follow(site: ChannelSite, node: ir.Node, value: ir.Value, by_node: dict[ir.Node, Layer]) -> str | None:
    layer = by_node.get(node)
    if layer is not None:
        if layer.weight is None or layer.kind != site.maker.kind or (layer.kind == "conv" and _groups(layer) > 1):
            return f"{node.op_type} {layer.name!r} reads them in another way"
        if layer.activations[0] is not value or layer.node is site.maker.node:
            return "a layer has them as its weight"
        site.readers.append(layer)
        return None
    if is_op(node, *UNARY):
        site.path += [node.outputs[0]]
        return None
    if not is_op(node, *BINARY):
        return f"{node.op_type} mixes or moves them"
    for other in node.inputs:
        if other is not None and is_constant(other):
            along = _channel_axis(site, other, value)
            if along is None:
                return f"{node.op_type} has a constant of another rank"
            if along >= 0:
                site.constants[other] = along
    site.path += [node.outputs[0]] if node.outputs[0] not in site.path else []
    return None


def _channel_axis(site: ChannelSite, constant: ir.Value, value: ir.Value) -> int | None:
    """Return the axis of the channels in a constant, -1 where it has none, None if it is not known."""
    sizes, rank = shape_of(constant).numpy(), None if value.shape is None else len(value.shape)
    if rank is None or len(sizes) > rank:
        return None
    at = site.axis % rank - (rank - len(sizes))
    return at if at >= 0 and sizes[at] == site.channels else (-1 if at < 0 or sizes[at] == 1 else None)


def _known(site: ChannelSite, node: ir.Node, value: ir.Value) -> bool:
    return is_constant(value) or value in site.path


def _groups(layer: Layer) -> int:
    attribute = layer.node.attributes.get("group")
    return 1 if attribute is None else int(attribute.as_int())
