"""Rescaling: one factor for each channel of an activation moves into constants. Finds the sites, and applies factors.

    layer(x, W)  =  layer(x / s, W s)         s > 0, one for each channel

The weights of the readers take s. The tracer (trace.py) finds constants that take 1 / s in the graph, not by names:

    norm      the gain and the shift of a LayerNormalization, GroupNormalization or RMSNormalization
    adaln     x (1 + scale) + shift: the rows of the layer that makes scale and shift, W / s, b / s, and for the scale
              (b + 1 - s) / s (DiTAS); or the tables in which freeze_time wrote them
    linear    the rows and the bias of a layer, through ReLU too (DFQ, arXiv 1906.04721)
    value     the rows that make the values of attention: softmax mixes tokens and no channels
    gated     value * gelu(gate): the rows that make the value
    run_time  no constant takes 1 / s (`reason` says why): a Mul divides the activation

All layers that read a value take the same factors. If anything else reads the value, it can only be divided at run
time. `find_pairs` finds products of two activations instead, (q s) (k / s)^T. Factors are exact in real numbers; in
float32 they round.

A shift as well, x = s (x' + o), is legal if a sum on the way holds a constant (RepQ-ViT, arXiv 2212.08254) and no
reader pads with zeros, because 0 is not o.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import PassError
from ..graph.nodes import Names, consumers, is_op, name_of
from ..graph.ops import Layer, is_mover, layer_of, layers
from ..graph.require import inputs, required
from .axes import Atom, AxisSize, Layout, sizes_of
from .edits import Edit, add_to_bias, apply_edit, other_readers
from .ends import Request, Route
from .nodes import before_cut, before_mover, eventual, op_and_name
from .refusal import Refusal
from .scaling import Factors, channel_axis, divide_value, input_channels, multiplied_weight, multiply_weight
from .trace import Tracer

SiteKind = Literal["norm", "adaln", "linear", "value", "gated", "run_time"]
# The first of these marks on a route is the kind of its site; without any, the kind is linear.
KIND_ORDER: tuple[SiteKind, ...] = ("value", "gated", "adaln", "norm")


@dataclass(frozen=True, eq=False)
class RescalingSite:
    """A value whose channels can be divided, all layers that read it, and the constants that take the division.

    `edits` change the constants that take 1 / s. `shift_edits` take a shift too, if `shift_reason` is empty.
    `dividers` are the nodes that read the quotient of a Mul at run time.
    """

    value: ir.Value
    axis: int
    readers: tuple[Layer, ...]
    kind: SiteKind
    reason: str
    edits: tuple[Edit, ...] = ()
    shift_edits: tuple[Edit, ...] = ()
    shift_reason: str = ""
    dividers: tuple[ir.Node, ...] = ()

    @property
    def name(self) -> str:
        return name_of(self.value)

    @property
    def channels(self) -> int:
        return input_channels(self.readers[0])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the readers' inputs: the value, or outputs of movers. Channels keep their numbers."""
        return tuple(dict.fromkeys(name_of(layer.activations[0]) for layer in self.readers))


@dataclass(frozen=True, eq=False)
class Pair:
    """A product of two activations, query times key; q s and k / s have the same product.

    `reason` says why it takes no factors; it is empty for a pair that does.

    There is a factor for each head and channel if the heads can be separated, else one for each channel of a head.
    """

    node: ir.Node
    channels: int
    query_edits: tuple[Edit, ...] = ()
    key_edits: tuple[Edit, ...] = ()
    reason: str = ""
    kind: Literal["query_key"] = "query_key"

    @property
    def name(self) -> str:
        return self.node.name or name_of(self.node.outputs[0])


def find_sites(graph: ir.Graph) -> list[RescalingSite]:
    """Return the sites in the order of the graph. Every layer with a constant weight reads exactly one of them."""
    found = [layer for layer in layers(graph) if layer.weight is not None]
    tracer = Tracer({layer.output: layer for layer in found})
    groups: dict[tuple[ir.Value, int], list[Layer]] = {}
    movers: dict[tuple[ir.Value, int], set[ir.Node]] = {}
    for layer in found:
        value, axis, passed = _source(layer)
        groups.setdefault((value, axis), []).append(layer)
        movers.setdefault((value, axis), set()).update(passed)
    return [
        site
        for (value, axis), readers in groups.items()
        for site in _sites_of(tracer, value, axis, readers, movers[value, axis])
    ]


def rescale_site(
    graph: ir.Graph, names: Names, site: RescalingSite, factors: npt.ArrayLike, shifts: npt.ArrayLike | None = None
) -> None:
    """Divide a site's value by the factors `[C]` and multiply the weights of its readers by them.

    With `shifts` o `[C]` the value becomes x / s - o, and the biases of the readers make up for o. The result is exact.
    The caller removes nodes that have become unused.
    """
    s = np.asarray(factors, np.float64)
    if s.shape != (site.channels,) or not (np.isfinite(s) & (s > 0)).all():
        raise ValueError(f"{site.name}: {site.channels} positive factors, not {s.shape}")
    if shifts is not None and (site.kind == "run_time" or site.shift_reason):
        raise ValueError(f"{site.name} takes no shift: {site.shift_reason or site.reason}")
    if site.kind == "run_time":
        if site.value.shape is None:
            raise PassError(f"{site.name} has no known rank", where=site.name, hint="run normalize first")
        divide_value(graph, names, site.value, site.dividers, s, site.axis)
    o = np.zeros_like(s) if shifts is None else np.asarray(shifts, np.float64)
    for edit in site.edits if shifts is None else site.shift_edits:
        apply_edit(graph, names, edit, 1 / s, -o)
    for reader in site.readers:
        multiply_weight(graph, names, _now(reader), s)
        if shifts is not None:
            layer = _now(reader)
            moved = multiplied_weight(layer, o).astype(np.float64)
            out = 0 if layer.kind == "conv" else layer.weight_axis
            add_to_bias(graph, names, layer.node, moved.sum(axis=tuple(d for d in range(moved.ndim) if d != out)))


def _now(layer: Layer) -> Layer:
    """Return a layer with its current weight: other sites may have replaced it."""
    return required(layer_of(layer.node), "the layer that reads a rescaled value", layer.node)


def _source(layer: Layer) -> tuple[ir.Value, int, set[ir.Node]]:
    """Return (value, channel axis, movers passed): a layer's input, traced back while one axis holds its channels.

    Parts of a value, such as the tokens of the text and of the image, are views of it like those that movers give.
    """
    value, axis = layer.activations[0], channel_axis(layer)
    sizes, passed = sizes_of(value), set()
    if sizes is None:
        return value, axis, set()
    channels = input_channels(layer)
    layout = Layout.of(sizes, axis).with_axis(axis % len(sizes), (Atom(channels, 1),) if channels > 1 else ())
    while (node := value.producer()) is not None and node.inputs[0] is not None:
        if not is_mover(node) and not is_op(node, "Split", "Slice"):
            break
        before = before_mover(node, layout) if is_mover(node) else before_cut(node, layout)
        if isinstance(before, Refusal) or not any(before.whole(d, channels) for d in range(before.rank)):
            break
        passed.add(node)
        value, layout = node.inputs[0], before
    axis = next(d for d in range(layout.rank) if layout.whole(d, channels)) if channels > 1 else axis
    return value, axis, passed


def _sites_of(
    tracer: Tracer, value: ir.Value, axis: int, readers: list[Layer], movers: set[ir.Node]
) -> list[RescalingSite]:
    """Return one site for a value that only layers read, else a run-time site for each view that they have of it."""
    known = movers | {layer.node for layer in readers}
    reason = ""
    for seen in dict.fromkeys([value, *(out for node in movers for out in node.outputs)]):
        if seen.is_graph_output():
            reason = f"{name_of(seen)!r} is an output of the graph"
        elif others := other_readers(seen, known):
            reader = op_and_name(eventual(others[0]))
            reason = f"{reader} reads {name_of(seen)!r}, too, and is no layer that can take the factors"
    sizes = sizes_of(value)
    if sizes is None:
        reason = f"the rank of {name_of(value)!r} is not known"
    if reason or sizes is None:
        views: dict[ir.Value, list[Layer]] = {}
        for layer in readers:
            views.setdefault(layer.activations[0], []).append(layer)
        return [
            RescalingSite(
                view, channel_axis(own[0]), tuple(own), "run_time", reason, dividers=tuple(n.node for n in own)
            )
            for view, own in views.items()
        ]
    layout = Layout.of(sizes, axis)
    route = tracer.trace(value, Request(layout))
    if isinstance(route, Refusal):
        nodes = tuple(n for n in consumers(value) if n in known)
        return [RescalingSite(value, axis, tuple(readers), "run_time", route.reason, dividers=nodes)]
    kind: SiteKind = next((kind for kind in KIND_ORDER if kind in route.marks), "linear")
    shift = _pads(readers) or tracer.trace(value, Request(layout, shift=True))
    refused, edits = (shift.reason, ()) if isinstance(shift, Refusal) else ("", shift.edits)
    return [RescalingSite(value, axis, tuple(readers), kind, "", route.edits, edits, refused)]


def _pads(readers: list[Layer]) -> Refusal | None:
    """Return a refusal that names a reader that pads with zeros, which a shift would change, or None."""
    for layer in readers:
        attributes = layer.node.attributes
        padded = "pads" in attributes and any(attributes["pads"].as_ints())
        automatic = "auto_pad" in attributes and attributes["auto_pad"].as_string().startswith("SAME")
        if padded or automatic:
            return Refusal(f"{op_and_name(layer.node)} pads with zeros")
    return None


def find_pairs(graph: ir.Graph) -> list[Pair]:
    """Return the products of two activations, each with the edits that take the factors of its contracted axis."""
    tracer = Tracer({layer.output: layer for layer in layers(graph) if layer.weight is not None})
    found = []
    for layer in layers(graph):
        if layer.kind == "attention" and not is_op(layer.activations[0].producer(), "Softmax"):  # weights times values
            found.append(_pair(tracer, layer.node))
    return found


def _pair(tracer: Tracer, node: ir.Node) -> Pair:
    query, key = inputs(node, 2)
    out, left, right = sizes_of(node.outputs[0]), sizes_of(query), sizes_of(key)
    if left is None or out is None or (right is not None and len(left) != len(right)) or len(left) < 3:
        return Pair(node, 0, reason=f"{op_and_name(node)} broadcasts its operands")
    width = left[-1]
    if not isinstance(width, int):
        return Pair(node, 0, reason=f"{op_and_name(node)} contracts an axis of unknown length")
    if right is None:
        right = [*left[:-2], width, out[-1]]
    reason = ""
    heads = [n for n in left[1:-2] if isinstance(n, int) and n > 1]
    for each in [heads, []] if heads and len(left) == 4 else [[]]:
        channels = int(np.prod([*each, width]))
        routes = []
        for index, sizes, axis in ((0, left, len(left) - 1), (1, right, len(left) - 2)):
            layout = _contracted(sizes, axis, width, bool(each))
            routes.append(tracer.into(node, index, Request(layout)))
        query_route, key_route = routes
        if isinstance(query_route, Route) and isinstance(key_route, Route):
            return Pair(node, channels, query_route.edits, key_route.edits)
        reason = reason or next(r.reason for r in routes if isinstance(r, Refusal))
    return Pair(node, 0, reason=reason)


def _contracted(sizes: list[AxisSize], axis: int, width: int, heads: bool) -> Layout:
    """Return the layout whose channels are the contracted axis, with the axis of the heads in front of it."""
    layout = Layout.of(sizes, axis)
    return layout.with_axis(1, (Atom(sizes[1], width),)) if heads else layout


def rescale_pair(graph: ir.Graph, names: Names, pair: Pair, factors: npt.ArrayLike) -> None:
    """Multiply the queries by the factors `[channels]`, and divide the keys by them."""
    s: Factors = np.asarray(factors, np.float64)
    if pair.reason:
        raise ValueError(f"{pair.name} takes no factors: {pair.reason}")
    if s.shape != (pair.channels,) or not (np.isfinite(s) & (s > 0)).all():
        raise ValueError(f"{pair.name}: {pair.channels} positive factors, not {s.shape}")
    for edits, multiply in ((pair.query_edits, s), (pair.key_edits, 1 / s)):
        for edit in edits:
            apply_edit(graph, names, edit, multiply, np.zeros_like(s))
