"""Constants that end a route and take the factors: the rows of a layer, the gain and the shift of a norm, a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..graph.nodes import is_constant, is_op
from ..graph.ops import Layer
from .axes import Layout
from .edits import Edit, Role
from .nodes import op_and_name
from .refusal import Refusal

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
CHANNEL_NORMS = ("GroupNormalization", "InstanceNormalization", "BatchNormalization")


@dataclass(frozen=True)
class Request:
    """A requested change of a value: v -> v m + a, where `offset` is added later and `shift` says that a is wanted."""

    layout: Layout
    offset: float = 0.0
    shift: bool = False

    @property
    def plain(self) -> bool:
        """Return whether the request is for factors only."""
        return self.offset == 0 and not self.shift

    def on(self, layout: Layout) -> Request:
        return replace(self, layout=layout)


@dataclass(frozen=True)
class Route:
    """The edits that fulfil a request, with marks of nodes passed on the way: "norm", "adaln", "value", "gated"."""

    edits: tuple[Edit, ...]
    marks: frozenset[str] = frozenset()

    def marked(self, mark: str) -> Route:
        return replace(self, marks=self.marks | {mark})

    def __add__(self, other: Route) -> Route:
        return Route(self.edits + other.edits, self.marks | other.marks)


def edit_route(node: ir.Node, index: int, layout: Layout, role: Role, request: Request) -> Route | Refusal:
    if layout.channels() is None:
        return Refusal(f"{op_and_name(node)} joins channels and something of unknown length")
    return Route((Edit(node, index, layout, role, request.offset, request.shift),))


def rows_route(layer: Layer, request: Request) -> Route | Refusal:
    """Return the route that ends at the rows of a layer and its bias."""
    node, layout = layer.node, request.layout
    axis = 1 if layer.kind == "conv" else layout.rank - 1
    if not layout.only_on(axis):
        return Refusal(f"the rows of {op_and_name(node)} are not the channels (something in between mixes them)")
    if not request.plain and layer.bias is None and is_op(node, "MatMul"):
        return Refusal(f"{op_and_name(node)} has no bias")
    return edit_route(node, 1, Layout((layout.axes[axis],), layout.base), "rows", request)


def norm_route(node: ir.Node, request: Request) -> Route | Refusal:
    """Return the route that ends at the gain and the shift of a norm."""
    layout, gain = request.layout, node.inputs[1] if len(node.inputs) > 1 else None
    first = 1
    if not is_op(node, *CHANNEL_NORMS):
        first = (node.attributes["axis"].as_int() if "axis" in node.attributes else -1) % layout.rank
    axes = (1,) if is_op(node, *CHANNEL_NORMS) else tuple(range(first, layout.rank))
    if not layout.only_on(*axes):
        return Refusal(f"{op_and_name(node)} mixes channels")
    if gain is None or not is_constant(gain) or gain.shape is None:
        return Refusal(f"{op_and_name(node)} has no gain that is constant")
    own = Layout(tuple(layout.axes[d] for d in axes), layout.base)
    index = own.channels()
    if index is None or np.broadcast_shapes(index.shape, gain.shape.numpy()) != tuple(gain.shape.numpy()):
        return Refusal(f"{op_and_name(node)} has a gain for each group, not for each channel")
    route = edit_route(node, 1, own, "gain", Request(own))
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    if isinstance(route, Refusal):
        return route
    if shift is None:
        return route.marked("norm") if request.plain else Refusal(f"{op_and_name(node)} has no shift")
    term = (
        edit_route(node, 2, own, "term", request)
        if is_constant(shift)
        else Refusal(f"{op_and_name(node)} has a shift that is computed")
    )
    return term if isinstance(term, Refusal) else (route + term).marked("norm")
