"""How far up the graph a factor for each channel of a value can move, and which constants take it.

`Tracer.trace` walks from a value to its producers. It ends at constants that can hold the factors (the rows of a layer,
the gain and the shift of a norm, a table) and returns the edits to them, or a Refusal. On the way no value may have
another reader, because that reader would see the factors.

These let factors through: data movers; ReLU and other positively homogeneous functions; pooling; the values of
attention, since softmax mixes tokens and no channels; one operand of a product (the value half of a GEGLU; `1 + scale`
of an adaptive norm); both operands of a sum. Every other nonlinearity stops them, and so do norms, which mix channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from ..graph.nodes import consumers, is_constant, is_op, name_of, numpy_of
from ..graph.ops import Layer, is_mover
from ..graph.require import required, tensor_of
from .axes import Atom, sizes_of
from .edits import Role, only_reads_sizes
from .ends import CHANNEL_NORMS, NORMS, Request, Route, edit_route, norm_route, rows_route
from .nodes import (
    before_mover,
    changed_axes,
    constant_operand,
    eventual,
    modulates,
    op_and_name,
    operand,
    own_gate,
    pads_zeros,
    part_of,
    read_by_others,
    smaller_first,
)
from .refusal import Refusal

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Abs")
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


class Tracer:
    """Traces in one graph. `layers` maps the output of each layer with a constant weight to that layer."""

    def __init__(self, layers: dict[ir.Value, Layer]) -> None:
        self._layers = layers

    def into(self, node: ir.Node, index: int, request: Request) -> Route | Refusal:
        """Return the route that divides input `index` of a node. The input may have no other reader."""
        value = required(node.inputs[index], f"input {index}", node)
        if is_constant(value):
            if value.dtype != ir.DataType.FLOAT:
                return Refusal(f"{op_and_name(node)} reads a constant that is not float32")
            return edit_route(node, index, request.layout, "term", request)
        if why := read_by_others(value, node):
            return Refusal(why)
        if sum(v is value for v in node.inputs) > 1:
            return Refusal(f"{op_and_name(node)} reads {name_of(value)!r} twice")
        return self.trace(value, request)

    def trace(self, value: ir.Value, request: Request) -> Route | Refusal:
        """Return the route for a value whose readers all take the same factors."""
        node = value.producer()
        if node is None:
            return Refusal(f"{name_of(value)!r} is an input of the graph")
        if value in self._layers:
            return rows_route(self._layers[value], request)
        if is_mover(node) or is_op(node, "Identity", "Expand"):
            layout = before_mover(node, request.layout)
            return layout if isinstance(layout, Refusal) else self.into(node, 0, request.on(layout))
        special: dict[str, Callable[[ir.Node, ir.Value, Request], Route | Refusal]] = {
            "Add": self._add,
            "Sub": self._sub,
            "Mul": self._mul,
            "Div": self._div,
            "MatMul": self._attention,
            "Gather": self._gather,
            "Split": self._part,
            "Slice": self._part,
            "Concat": self._concat,
        }
        if is_op(node, *special):
            return special[node.op_type](node, value, request)
        if is_op(node, *CHANNEL_NORMS) or node.op_type in NORMS:
            return norm_route(node, request)
        if is_op(node, *HOMOGENEOUS, *POOLS, "Pad", "ReduceMean"):
            return self._homogeneous(node, request)
        return Refusal(f"{op_and_name(node)} in between lets no factors through (it is not homogeneous)")

    def _homogeneous(self, node: ir.Node, request: Request) -> Route | Refusal:
        x = node.inputs[0]
        sizes = None if x is None else sizes_of(x)
        if not request.plain or sizes is None or len(sizes) != request.layout.rank:
            return Refusal(f"{op_and_name(node)} in between lets no summands through")
        if is_op(node, "PRelu") and not is_constant(node.inputs[1]):
            return Refusal(f"{op_and_name(node)} has a slope that is computed")
        layout = request.layout
        if not is_op(node, *HOMOGENEOUS):
            if is_op(node, "Pad") and not pads_zeros(node):
                return Refusal(f"{op_and_name(node)} pads with something else than zeros")
            if any(layout.on(d) for d in changed_axes(node, layout.rank)):
                return Refusal(f"{op_and_name(node)} computes across channels")
            for d in changed_axes(node, layout.rank):
                layout = layout.without_channels(d, sizes[d])
        return self.into(node, 0, request.on(layout))

    def _add(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        number = constant_operand(node)
        if number is None:
            return self._sum(node, request)
        x = 1 - number
        constant = required(node.inputs[number], f"input {number}", node)
        if tensor_of(constant).size == 1 and not request.shift:  # x takes the later summand, too
            later = request.offset + float(numpy_of(constant).reshape(()))
            route = self._operand(node, x, replace(request, offset=later))
            if isinstance(route, Route):
                return route
        route, own = (
            self._operand(node, x, Request(request.layout)),
            edit_route(node, number, request.layout, "term", request),
        )
        return route + own if isinstance(route, Route) and isinstance(own, Route) else _first_refusal(route, own)

    def _sum(self, node: ir.Node, request: Request) -> Route | Refusal:
        """Return a route in which both operands take the factors, and one of them the summands."""
        reason = ""
        for first in (0, 1):
            one = self._operand(node, first, request)
            two = self._operand(node, 1 - first, Request(request.layout)) if isinstance(one, Route) else one
            if isinstance(one, Route) and isinstance(two, Route):
                return one + two
            reason = reason or str(two)
        return Refusal(f"{op_and_name(node)} adds two activations (a residual stream), and {reason}")

    def _operand(self, node: ir.Node, index: int, request: Request) -> Route | Refusal:
        """Return the route of one operand of an elementwise node. The operand may be broadcast."""
        layout = operand(node, index, request.layout)
        return layout if isinstance(layout, Refusal) else self.into(node, index, request.on(layout))

    def _sub(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        if not request.plain:
            return Refusal(f"{op_and_name(node)} in between lets no summands through")
        return self._sum(node, request)

    def _mul(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        number = constant_operand(node)
        if number is not None:
            return self._scale(node, number, request, "gain")
        if not request.plain:
            return Refusal(f"{op_and_name(node)} in between lets no summands through")
        if own_gate(node):
            return Refusal(
                f"{op_and_name(node)} is an activation function such as SiLU or GELU, which is not homogeneous"
            )
        reasons = []
        for index in smaller_first(node):
            route = self._operand(node, index, request)
            if isinstance(route, Route):
                return route.marked("adaln" if modulates(node, index) else "gated")
            reasons.append(route.reason)
        return Refusal(f"{op_and_name(node)} multiplies two activations: {'; '.join(reasons)}")

    def _div(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        if constant_operand(node) == 1:
            return self._scale(node, 1, request, "divisor")
        if not request.plain:
            return Refusal(f"{op_and_name(node)} in between lets no summands through")
        return self._operand(node, 0, request)

    def _scale(self, node: ir.Node, number: int, request: Request, role: Role) -> Route | Refusal:
        """Return the route through a constant factor: one for each channel takes the factors, a scalar passes them."""
        if not request.plain:
            return Refusal(f"{op_and_name(node)} in between lets no summands through")
        constant = tensor_of(node.inputs[number])
        if constant.size == 1:
            return self._operand(node, 1 - number, request)
        own = list(constant.shape.numpy())
        spread = [n for d, n in enumerate(own) if n != 1 and not request.layout.on(d + request.layout.rank - len(own))]
        if spread:
            return Refusal(
                f"{op_and_name(node)} has a factor for each token, not for each channel (rotary embeddings?)"
            )
        route = edit_route(node, number, request.layout, role, request)
        return route if isinstance(route, Refusal) else route.marked("norm")

    def _attention(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        """Return the route through a product: its rows come from the first operand, its columns from the second."""
        layout = request.layout
        if layout.rank < 2 or not request.plain:
            return Refusal(f"{op_and_name(node)} in between lets no summands through")
        index = 0 if layout.on(layout.rank - 2) else 1
        if index == 0 and layout.on(layout.rank - 1):
            return Refusal(f"{op_and_name(node)} makes channels out of both of its operands")
        x = node.inputs[index]
        sizes = None if x is None else sizes_of(x)
        if sizes is None or len(sizes) != layout.rank:
            return Refusal(f"{op_and_name(node)} broadcasts its operands")
        if any(layout.on(d) and sizes[d] == 1 for d in range(layout.rank - 2)):
            return Refusal(f"{op_and_name(node)} broadcasts its operands")
        summed = layout.rank - 1 if index == 0 else layout.rank - 2
        route = self.into(node, index, Request(layout.without_channels(summed, sizes[summed])))
        return route if isinstance(route, Refusal) else route.marked("value")

    def _gather(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        """Return the route into a row of a table (of timesteps, of classes), or into one part of an activation."""
        table, rows = node.inputs[0], node.inputs[1]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if table is None or rows is None or rows.shape is None:
            return Refusal(f"{op_and_name(node)} reads what is not known")
        count = len(rows.shape)
        if not is_constant(table):
            return self._part(node, value, request)
        if axis != 0 or any(request.layout.on(d) for d in range(count)):
            return Refusal(f"{op_and_name(node)} does not gather whole rows")
        return edit_route(node, 0, replace(request.layout, axes=((), *request.layout.axes[count:])), "term", request)

    def _part(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        """Return the route into one of equal parts: the factors reach the rows of that part only."""
        found = part_of(node, value)
        whole = node.inputs[0]
        sizes = None if whole is None else sizes_of(whole)
        if found is None or whole is None or sizes is None or len(sizes) - request.layout.rank not in (0, 1):
            return Refusal(f"{op_and_name(node)} takes a part that is not known, or not one of equal parts")
        axis, start, length, total = found
        atoms = (Atom(total // length, 0, start // length),)
        if len(sizes) > request.layout.rank:  # Gather with a number removes the axis
            axes = (*request.layout.axes[:axis], atoms, *request.layout.axes[axis:])
        else:
            here = request.layout.axes[axis] or ((Atom(length),) if length > 1 else ())
            axes = (*request.layout.axes[:axis], atoms + here, *request.layout.axes[axis + 1 :])
        layout = replace(request.layout, axes=axes)
        if whole.is_graph_output():
            return Refusal(f"{name_of(whole)!r} is an output of the graph")
        for other in consumers(whole):
            theirs = [part_of(other, out) for out in other.outputs if out.uses()] if other is not node else []
            apart = all(t and t[0] == axis and (t[1] >= start + length or t[1] + t[2] <= start) for t in theirs)
            if other is not node and not only_reads_sizes(other) and not (theirs and apart):
                return Refusal(f"{op_and_name(eventual(other))} reads {name_of(whole)!r}, too")
        return self.trace(whole, request.on(layout))

    def _concat(self, node: ir.Node, value: ir.Value, request: Request) -> Route | Refusal:
        layout, axis = request.layout, node.attributes["axis"].as_int() % request.layout.rank
        route, base = Route(()), layout.base
        for index, x in enumerate(node.inputs):
            sizes = None if x is None else sizes_of(x)
            if sizes is None:
                return Refusal(f"{op_and_name(node)} joins a value of unknown rank")
            size = sizes[axis]
            part = layout.without_channels(axis, size)
            if layout.on(axis):
                whole = layout.axes[axis]
                if len(whole) != 1 or whole[0].only is not None or not isinstance(size, int):
                    return Refusal(f"{op_and_name(node)} joins channels in another order")
                part = replace(layout.with_axis(axis, (Atom(size, whole[0].stride),)), base=base)
                base += size * whole[0].stride
            found = self.into(node, index, request.on(part))
            if isinstance(found, Refusal):
                return Refusal(f"{op_and_name(node)} joins several values, and {found}")
            route = route + found
        return route


def _first_refusal(*answers: Route | Refusal) -> Refusal:
    """Return the first refusal among several answers."""
    return next(answer for answer in answers if isinstance(answer, Refusal))
